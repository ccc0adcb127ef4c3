//! What memory a run takes on its device, counted before it starts: one way to count, for refusals, for streaming, for
//! estimates.
//!
//! Each stage holds something throughout (the vision tower; a decoder block on both paths) and something more at its worst
//! step. What grows with the samples is the residual streams, rotary tables and features for later blocks alone, and those
//! can be streamed: parked in page-locked host memory but for the chunk at work and the next.

mod count;
mod disk;
mod host;
mod rates;
mod time;

pub use count::state_bytes;
pub use disk::DiskPlan;
pub use time::TimePlan;
pub(crate) use time::blocks as block_work;

use super::inspect::DecoderShape;
use super::settings::{Importance, Refit, Solver, SolverSettings};
use crate::model::families::VisionLoad;
use crate::plan::{ChunkSize, Costs, HostPlan, Process, StagePlan, told};
use crate::progress::Stage;
use anyhow::{Result, bail};
use count::Counter;
use indicatif::HumanBytes;
use serde::Serialize;

/// Where the residual streams and rotary tables are between passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// In device memory.
    #[default]
    Resident,
    /// In page-locked host memory; a chunk is fetched while the one before it is worked on, and parked behind it.
    Streamed,
}

/// Memory of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MemoryPlan {
    /// Whether the device's memory is the host's.
    pub device_is_host: bool,
    /// Bytes that the device may use; `None` where it is not limited.
    pub limit_bytes: Option<u64>,
    /// Where activations are between passes.
    pub activations: Activations,
    /// Device memory of the stage that takes most.
    pub device_bytes: u64,
    /// Page-locked host memory.
    pub host_bytes: u64,
    /// The stages in their order.
    pub stages: Vec<StagePlan>,
    /// Memory of the process on the host.
    pub host: HostPlan,
}

/// What embeds samples. Counts are of values, not of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EmbedderSize {
    /// Values of the vision tower and its projector; 0 where no sample has an image.
    pub tower: usize,
    /// Sizes of the tower.
    pub load: VisionLoad,
}

/// What is asked of the model behind its last block, see [`check`](super::check).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckSize {
    /// Tokens that are predicted; 0 where nothing is asked.
    pub tokens: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
}

/// What the plan is for.
#[derive(Clone, Debug)]
pub struct Job<'a> {
    /// Sizes of the decoder.
    pub shape: DecoderShape,
    /// The solver's settings.
    pub solver: &'a SolverSettings,
    /// How tokens are weighted.
    pub importance: Importance,
    /// Whether scales are refitted.
    pub refit: Refit,
    /// The calibration data, in order.
    pub chunks: Vec<ChunkSize>,
    /// Levels of image features that are added behind the first blocks; see [`DeepStack`](crate::model::decoder::DeepStack).
    pub deepstack: usize,
    /// `None` where the vision stage is left out.
    pub embedder: Option<EmbedderSize>,
    /// What follows the last block.
    pub check: CheckSize,
}

impl MemoryPlan {
    /// The plan of a job under a limit: activations resident where they fit, else streamed. Errors, with the numbers, where
    /// even that does not fit.
    pub fn fit(job: &Job<'_>, costs: &Costs<'_>, limit_bytes: Option<u64>) -> Result<Self> {
        let fits = |plan: &Self| limit_bytes.is_none_or(|limit| plan.device_bytes <= limit);
        let plan = Self::new(job, costs, limit_bytes, Activations::Resident);
        if fits(&plan) {
            return Ok(plan);
        }
        let plan = Self::new(job, costs, limit_bytes, Activations::Streamed);
        if fits(&plan) {
            return Ok(plan);
        }
        let Some(worst) = plan.stages.iter().max_by_key(|stage| stage.bytes) else { bail!("a plan without stages") };
        bail!(
            "the run does not fit into {} of GPU memory: {} takes {} with activations in host memory ({}){}; allow more \
             with --max-gpu-memory where the GPU has it (fewer samples would not help)",
            HumanBytes(limit_bytes.unwrap_or(u64::MAX)),
            worst.step,
            HumanBytes(worst.bytes),
            told(&worst.entries),
            cheaper(job, costs, &plan)
        )
    }

    /// The plan of a job without a limit.
    pub fn resident(job: &Job<'_>, costs: &Costs<'_>) -> Self {
        Self::new(job, costs, None, Activations::Resident)
    }

    fn new(job: &Job<'_>, costs: &Costs<'_>, limit_bytes: Option<u64>, activations: Activations) -> Self {
        let counter = Counter::new(job, costs, activations);
        let vision = job.embedder.as_ref().map(|embedder| StagePlan::new(Stage::Vision, counter.vision(embedder)));
        let stages: Vec<_> = vision.into_iter().chain([StagePlan::new(Stage::Blocks, counter.blocks())]).collect();
        let host_bytes = match activations {
            Activations::Resident => 0,
            Activations::Streamed => counter.all_chunks(),
        };
        let device_bytes = stages.iter().map(|stage| stage.bytes).max().unwrap_or(0);
        Self {
            device_is_host: costs.host,
            limit_bytes,
            activations,
            device_bytes,
            host_bytes,
            stages,
            host: HostPlan::default(),
        }
    }

    /// The same with the memory of `process` on the host. Errors, with the numbers, where the machine has not as much.
    pub fn with_host(mut self, job: &Job<'_>, costs: &Costs<'_>, process: &Process) -> Result<Self> {
        self.host = host::count(job, costs, &self, process);
        self.host.check("the run", "fewer samples, --solver gptq or --solver rtn take less")?;
        Ok(self)
    }

    /// Notes what a stage had in use, if it is more than was noted before.
    pub fn measured(&mut self, stage: Stage, bytes: Option<u64>) {
        let stages = self.stages.iter_mut().filter(|plan| plan.stage == stage);
        stages.for_each(|plan| plan.measured_bytes = plan.measured_bytes.max(bytes));
    }

    /// What was noted of the stages.
    pub fn measurements(&self) -> Vec<(Stage, Option<u64>)> {
        self.stages.iter().map(|plan| (plan.stage, plan.measured_bytes)).collect()
    }

    /// Most that was in use in any stage, once they have run.
    pub fn measured_bytes(&self) -> Option<u64> {
        self.stages.iter().filter_map(|stage| stage.measured_bytes).max()
    }

    /// The plan in lines.
    pub fn lines(&self) -> Vec<String> {
        let limit = self.limit_bytes.map_or_else(String::new, |limit| format!(" of {}", HumanBytes(limit)));
        let host = match self.activations {
            Activations::Resident => "activations stay there".to_owned(),
            Activations::Streamed => {
                format!("activations are streamed from {} of host memory", HumanBytes(self.host_bytes))
            }
        };
        let mut lines = Vec::new();
        if !self.device_is_host {
            lines.push(format!("GPU memory: {}{limit}; {host}", HumanBytes(self.device_bytes)));
            self.stages.iter().for_each(|stage| lines.extend(stage.lines()));
        }
        lines.extend(self.host.lines());
        lines
    }
}

/// What the cheaper solvers would take, where that is less.
fn cheaper(job: &Job<'_>, costs: &Costs<'_>, plan: &MemoryPlan) -> String {
    let with = |name: &str, kind: Solver, importance: Importance| {
        let solver = SolverSettings { solver: kind, ..job.solver.clone() };
        let mut job = Job { solver: &solver, importance, ..job.clone() };
        if kind == Solver::Rtn {
            // It reads no data.
            (job.chunks, job.embedder, job.check) = (Vec::new(), None, CheckSize::default());
            job.refit = Refit::None;
        }
        let bytes = MemoryPlan::new(&job, costs, None, Activations::Streamed).device_bytes;
        (bytes < plan.device_bytes).then(|| format!("; {name} would take {}", HumanBytes(bytes)))
    };
    let gptq = with("--solver gptq", Solver::Gptq, job.importance);
    let rtn = with("--solver rtn", Solver::Rtn, Importance::None).filter(|_| job.solver.solver != Solver::Rtn);
    gptq.into_iter().chain(rtn).collect()
}
