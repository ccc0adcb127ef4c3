//! Memory of the process during a run: what it holds when the plan is made, and what comes to it.

use super::count::Counter;
use super::totals::MemoryPlan;
use crate::plan::Job;
use crate::plan::{Costs, Entry, F32, HostPlan, Process, StagePlan, Step, entry, worst};
use crate::progress::Stage;
use crate::quantize::block::Activations;
use crate::quantize::settings::Solver;

/// The host's memory of a job whose device memory is as `device` says. Without a `process` it is what the job adds to any.
pub(super) fn count(job: &Job<'_>, costs: &Costs<'_>, device: &MemoryPlan, process: &Process) -> HostPlan {
    let host = Host { job, costs, device, process, counter: Counter::new(job, costs, device.activations) };
    let data = (process.peak > 0).then(|| {
        let before = entry("program, tokenizer and data, at most", process.peak);
        StagePlan::new(Stage::Data, ("reading data".into(), vec![before]))
    });
    let vision = job.embedder.is_some().then(|| StagePlan::new(Stage::Vision, host.vision()));
    let rest = [(Stage::Write, host.write()), (Stage::Blocks, host.blocks())];
    let rest = rest.map(|(stage, step)| StagePlan::new(stage, step));
    HostPlan::new(data.into_iter().chain(vision).chain(rest).collect(), process)
}

/// Counts on the host.
struct Host<'a> {
    job: &'a Job<'a>,
    costs: &'a Costs<'a>,
    device: &'a MemoryPlan,
    process: &'a Process,
    counter: Counter<'a>,
}

impl Host<'_> {
    /// What is held before a stage, and the device's memory where that is the host's.
    fn with(&self, before: u64, stage: Stage, own: Vec<Entry>) -> Vec<Entry> {
        let device = self.device.stages.iter().filter(|plan| self.costs.host && plan.stage == stage);
        let pinned = match self.device.activations {
            Activations::Resident => 0,
            Activations::Streamed => self.device.host_bytes,
        };
        let first = [entry("program, tokenizer and data", before), entry("page-locked residual streams", pinned)];
        first.into_iter().chain(device.flat_map(|plan| plan.entries.clone())).chain(own).collect()
    }

    /// Bytes of a tensor on its way to the device.
    fn loading(&self, values: u64) -> u64 {
        self.costs.loading(values, values * self.process.stored)
    }

    fn after_data(&self) -> u64 {
        self.process.held.saturating_sub(self.process.data)
    }

    fn vision(&self) -> Step {
        let Some(embedder) = &self.job.embedder else { return Step::default() };
        let held = entry("program, tokenizer and data", self.process.held);
        if self.costs.host {
            let weights = F32 * embedder.tower as u64;
            let mapped = entry("the file's pages of the largest tensor", self.process.largest_embedding);
            let loading = vec![held, entry("vision tower", weights), mapped];
            let encoding = self.with(self.process.held, Stage::Vision, Vec::new());
            let step = self.device.stages.iter().find(|plan| plan.stage == Stage::Vision);
            let step = step.map_or_else(String::new, |plan| plan.step.clone());
            return worst([("loading".into(), loading), (step, encoding)]);
        }
        let loading = self.loading(self.process.largest_embedding / self.process.stored.max(1));
        let loading =
            self.with(self.process.held, Stage::Vision, vec![entry("the largest tensor on its way", loading)]);
        let patches = self.job.chunks.iter().map(|chunk| chunk.patches).max().unwrap_or(0) * embedder.load.patch;
        let rows = self.job.chunks.iter().map(|chunk| chunk.tokens).max().unwrap_or(0) * self.job.shape.hidden;
        let patches = (patches as u64 * (F32 + self.costs.element_bytes)).max(self.loading(rows as u64));
        let encoding = self.with(
            self.process.held,
            Stage::Vision,
            vec![entry("patches or rows of the embedding of a chunk", patches)],
        );
        worst([("loading".into(), loading), ("encoding images".into(), encoding)])
    }

    fn write(&self) -> Step {
        let mapped = entry("the file's pages of the largest tensor", self.process.largest_kept);
        let streams = if self.costs.host { self.counter.all_chunks() } else { 0 };
        let own = vec![entry("residual streams of all samples", streams), mapped];
        ("copying tensors".into(), self.with(self.after_data(), Stage::Write, own))
    }

    fn blocks(&self) -> Step {
        let shape = &self.job.shape;
        let (hidden, inner) = (shape.hidden as u64, shape.intermediate as u64);
        if self.costs.host {
            let step = self.device.stages.iter().find(|plan| plan.stage == Stage::Blocks);
            let step = step.map_or_else(String::new, |plan| plan.step.clone());
            return (step, self.with(self.after_data(), Stage::Blocks, Vec::new()));
        }
        let loading = entry("the largest weight on its way", self.loading(hidden * inner));
        let solving = match self.job.solver.solver {
            Solver::Rtn => entry("a layer and its codes", Counter::rounding(hidden, inner)),
            // As they come from the device and as they are put together, then as bytes of the file.
            Solver::Gptq | Solver::Gptaq => entry("codes of a layer", 3 * hidden * inner),
        };
        let step = |name: &str, own| (name.to_owned(), self.with(self.after_data(), Stage::Blocks, vec![own]));
        // Of both paths, as the device has them and in float32.
        let (tokens, part) = (self.job.check.tokens as u64, self.counter.head_part());
        let logits = tokens * part * (2 * F32 + self.costs.element_bytes) + self.loading(part * hidden);
        let comparing = entry("rows of the output head on their way, logits", logits);
        let steps =
            [("loading a block", loading), ("solving mlp.down_proj", solving), ("comparing the paths", comparing)];
        worst(steps.into_iter().map(|(name, own)| step(name, own)))
    }
}
