//! What memory a run takes on its device, counted before it starts: one way to count, for refusals, for streaming, for
//! estimates.
//!
//! Each stage holds something throughout (the vision tower; a decoder block on both paths) and something more at its worst
//! step. What grows with the samples is the residual streams, rotary tables and features for later blocks alone, and those
//! can be streamed: parked in page-locked host memory but for the chunk at work and the next.

mod count;
mod counted;
mod host;
mod totals;

pub use counted::{Counted, Subject, SubjectChunk};
pub use totals::MemoryPlan;

use super::{CheckSize, Costs, HostPlan, Job, Process, StagePlan, told};
use crate::progress::{Stage, human_bytes};
use crate::quantize::block::Activations;
use crate::quantize::settings::{Importance, Refit, Solver, SolverSettings};
use anyhow::{Result, bail};
use count::Counter;

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
            human_bytes(limit_bytes.unwrap_or(u64::MAX)),
            worst.step,
            human_bytes(worst.bytes),
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

    /// This plan with the memory of `process` on the host. Errors, with the numbers, where the machine has not as much.
    pub fn with_host(mut self, job: &Job<'_>, costs: &Costs<'_>, process: &Process) -> Result<Self> {
        self.host = host::count(job, costs, &self, process);
        self.host.check("the run", "fewer samples, --solver gptq or --solver rtn take less")?;
        Ok(self)
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
        (bytes < plan.device_bytes).then(|| format!("; {name} would take {}", human_bytes(bytes)))
    };
    let gptq = with("--solver gptq", Solver::Gptq, job.importance);
    let rtn = with("--solver rtn", Solver::Rtn, Importance::None).filter(|_| job.solver.solver != Solver::Rtn);
    gptq.into_iter().chain(rtn).collect()
}
