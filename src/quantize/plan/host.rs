//! Memory of the process: what it holds when a plan is made, and what comes to it.

use super::count::{Counter, F32, Step, entry};
use super::system::{Room, room, status_bytes};
use super::{Activations, Costs, Entry, Job, MemoryPlan, StagePlan};
use crate::calibration::sequence::Sequence;
use crate::checkpoint::Checkpoint;
use crate::heap;
use crate::progress::Stage;
use crate::quantize::settings::Solver;
use anyhow::{Result, ensure};
use indicatif::HumanBytes;
use serde::Serialize;

/// What a process holds before any weight is read, and what it will read. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Memory that it holds.
    pub held: u64,
    /// Most that it ever held.
    pub peak: u64,
    /// What it gives back once the samples are embedded: their images and tokens.
    pub data: u64,
    /// A stored weight.
    pub stored: u64,
    /// The largest tensor that keeps its precision, in the file.
    pub largest_kept: u64,
    /// The largest tensor that embeds samples, in the file; 0 where none are read.
    pub largest_embedding: u64,
}

impl Process {
    /// This one. 0 is held where the system does not tell.
    pub fn now(checkpoint: &Checkpoint, sequences: &[&Sequence], kept: impl Fn(&str) -> bool) -> Result<Self> {
        // What reading the data left free would count as held.
        heap::trim();
        let mut process = Self {
            held: held(!sequences.is_empty()),
            peak: status_bytes("VmHWM").unwrap_or(0),
            data: sequences.iter().map(|sequence| data_bytes(sequence)).sum(),
            ..Self::default()
        };
        for name in checkpoint.names().filter(|name| kept(name)) {
            let tensor = checkpoint.tensor(name)?;
            process.largest_kept = process.largest_kept.max(tensor.bytes.len() as u64);
        }
        Ok(process)
    }
}

/// Pages of the program and its libraries that a run touches, of 15 MiB of code and constants, without calibration data
/// (round-to-nearest) and with; half a MiB more or less, as the system maps pages around those touched. When a plan is made,
/// some have not been yet.
const PROGRAM: [u64; 2] = [20 << 19, 27 << 19];

/// What this process holds; 0 where the system does not tell.
fn held(with_data: bool) -> u64 {
    match (status_bytes("RssAnon"), status_bytes("RssFile"), status_bytes("RssShmem")) {
        (Some(own), Some(files), Some(shared)) => own + shared + files.max(PROGRAM[usize::from(with_data)]),
        _ => status_bytes("VmRSS").unwrap_or(0),
    }
}

/// Pixels, tokens and positions of a sample.
fn data_bytes(sequence: &Sequence) -> u64 {
    let pixels: usize = sequence.images.iter().flat_map(|image| image.crops()).map(|crop| crop.as_raw().len()).sum();
    (pixels + size_of_val(&sequence.tokens[..]) + size_of_val(&sequence.positions[..])) as u64
}

/// Memory of the process on the host.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct HostPlan {
    /// What the process held when the plan was made: program, tokenizer, decoded images.
    pub held_bytes: u64,
    /// What it may come to hold beside that, with what else was running then; `None` where the system does not tell.
    pub available_bytes: Option<u64>,
    /// Most that it may ever hold; `None` where the system does not tell.
    pub total_bytes: Option<u64>,
    /// Most that it will hold.
    pub bytes: u64,
    /// The stages in their order.
    pub stages: Vec<StagePlan>,
    /// Most that it held; `None` before the end, and where the system does not tell.
    pub measured_bytes: Option<u64>,
}

impl HostPlan {
    /// Of a job whose device memory is as `device` says. Without a `process` it is what the job adds to any.
    pub(super) fn new(job: &Job<'_>, costs: &Costs<'_>, device: &MemoryPlan, process: &Process) -> Self {
        let host = Host { job, costs, device, process, counter: Counter::new(job, costs, device.activations) };
        let data = (process.peak > 0).then(|| {
            let before = entry("program, tokenizer and data, at most", process.peak);
            StagePlan::new(Stage::Data, ("reading data".into(), vec![before]))
        });
        let vision = job.embedder.is_some().then(|| StagePlan::new(Stage::Vision, host.vision()));
        let rest = [(Stage::Write, host.write()), (Stage::Blocks, host.blocks())];
        let rest = rest.map(|(stage, step)| StagePlan::new(stage, step));
        let stages: Vec<StagePlan> = data.into_iter().chain(vision).chain(rest).collect();
        let room = (process.held > 0).then(room).flatten();
        Self {
            held_bytes: process.held,
            available_bytes: room.map(|Room { available, .. }| available),
            total_bytes: room.map(|Room { total, .. }| total),
            bytes: stages.iter().map(|stage| stage.bytes).max().unwrap_or(0),
            stages,
            measured_bytes: None,
        }
    }

    /// Errors, with the numbers, where the machine has not as much memory, and warns where it has not as much left.
    pub(super) fn check(&self) -> Result<()> {
        let worst = self.stages.iter().max_by_key(|stage| stage.bytes);
        let parts: Vec<String> = worst
            .iter()
            .flat_map(|stage| &stage.entries)
            .map(|entry| format!("{} {}", entry.name, HumanBytes(entry.bytes)))
            .collect();
        let step = worst.map_or_else(String::new, |stage| format!("{}, {}", stage.stage, stage.step));
        let needs = format!("{step} takes {} of host memory ({})", HumanBytes(self.bytes), parts.join(", "));
        if let Some(total) = self.total_bytes {
            ensure!(
                self.bytes <= total,
                "the run does not fit into the {} of memory and swap that this process may have: {needs}; fewer samples, \
                 --solver gptq or --solver rtn take less",
                HumanBytes(total)
            );
        }
        let more = self.bytes.saturating_sub(self.held_bytes);
        if let Some(available) = self.available_bytes.filter(|&available| available < more) {
            log::warn!("{needs}, but {} more than now are left: the system may end the run", HumanBytes(available));
        }
        Ok(())
    }

    /// The plan in lines.
    pub fn lines(&self) -> Vec<String> {
        let room = self.available_bytes.map_or_else(String::new, |available| {
            format!("; {} held now, {} more available", HumanBytes(self.held_bytes), HumanBytes(available))
        });
        let mut lines = vec![format!("host memory: {}{room}", HumanBytes(self.bytes))];
        self.stages.iter().for_each(|stage| lines.extend(stage.lines()));
        lines
    }
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

    /// Bytes of a tensor on its way to the device: mapped from the file, as float32, and in the device's precision.
    fn loading(&self, values: u64) -> u64 {
        let converted = if self.costs.element_bytes < F32 { self.costs.element_bytes } else { 0 };
        values * (self.process.stored + F32 + converted)
    }

    fn after_data(&self) -> u64 {
        self.process.held.saturating_sub(self.process.data)
    }

    /// A stage's worst step.
    fn worst(steps: Vec<Step>) -> Step {
        let bytes = |(_, entries): &Step| entries.iter().map(|entry| entry.bytes).sum::<u64>();
        steps.into_iter().max_by_key(bytes).unwrap_or_default()
    }

    fn vision(&self) -> Step {
        let Some(embedder) = &self.job.embedder else { return Step::default() };
        let held = entry("program, tokenizer and data", self.process.held);
        if self.costs.host {
            let weights = F32 * (embedder.table + embedder.tower) as u64;
            let mapped = entry("the file's pages of the largest tensor", self.process.largest_embedding);
            let loading = vec![held, entry("embedding table and vision tower", weights), mapped];
            let encoding = self.with(self.process.held, Stage::Vision, Vec::new());
            let step = self.device.stages.iter().find(|plan| plan.stage == Stage::Vision);
            let step = step.map_or_else(String::new, |plan| plan.step.clone());
            return Self::worst(vec![("loading".into(), loading), (step, encoding)]);
        }
        let loading = self.loading(self.process.largest_embedding / self.process.stored.max(1));
        let loading =
            self.with(self.process.held, Stage::Vision, vec![entry("the largest tensor on its way", loading)]);
        let patches = self.job.chunks.iter().map(|chunk| chunk.patches).max().unwrap_or(0) * embedder.load.patch;
        let patches = patches as u64 * (F32 + self.costs.element_bytes);
        let encoding = self.with(self.process.held, Stage::Vision, vec![entry("patches of a chunk", patches)]);
        Self::worst(vec![("loading".into(), loading), ("encoding images".into(), encoding)])
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
        Self::worst(steps.into_iter().map(|(name, own)| step(name, own)).collect())
    }
}
