//! What memory a run takes on its device, counted before it starts: one way to count, for refusals, for streaming, for
//! estimates.
//!
//! Each stage holds something throughout (the vision tower; a decoder block on both paths) and something more at its worst
//! step. What grows with the samples is the residual streams, rotary tables and features for later blocks alone, and those
//! can be streamed: parked in page-locked host memory but for the chunk at work and the next.

mod beside;
mod counted;
mod host;
mod totals;

pub use beside::WAITING;
pub use counted::{Counted, CountedStep};
pub use totals::MemoryPlan;

use super::{HostPlan, Process, Subject, told};
use crate::device::Device;
use crate::device::counting::Counting;
use crate::progress::human_bytes;
use crate::quantize::block::Activations;
use crate::quantize::settings::{Importance, Refit, Solver, SolverSettings};
use anyhow::{Result, bail};

impl MemoryPlan {
    /// The plan of a run on a device and under its limit, with what was counted for it: activations resident where they fit, else
    /// streamed. Errors, with the numbers, where even that does not fit, and as the run does of shapes that do not go together.
    pub fn fit(subject: &Subject<'_>, device: &Counting) -> Result<(Self, Counted)> {
        let limit_bytes = device.memory_limit();
        let fits = |plan: &Self| limit_bytes.is_none_or(|limit| plan.device_bytes <= limit);
        let mut refused = None;
        for activations in [Activations::Resident, Activations::Streamed] {
            let counted = subject.count(device, activations)?;
            let plan = Self::new(device, activations, &counted);
            if fits(&plan) {
                return Ok((plan, counted));
            }
            refused = Some(plan);
        }
        let worst = refused.iter().flat_map(|plan| &plan.stages).max_by_key(|stage| stage.bytes);
        let Some(worst) = worst else { bail!("a plan without stages") };
        bail!(
            "the run does not fit into {} of GPU memory: {} takes {} with activations in host memory ({}){}; allow more \
             with --max-gpu-memory where the GPU has it (fewer samples would not help)",
            human_bytes(limit_bytes.unwrap_or(u64::MAX)),
            worst.step,
            human_bytes(worst.bytes),
            told(&worst.entries),
            cheaper(subject, device, worst.bytes)?
        )
    }

    fn new(device: &Counting, activations: Activations, counted: &Counted) -> Self {
        let stages = counted.stages();
        Self {
            device_is_host: device.is_host(),
            limit_bytes: device.memory_limit(),
            activations,
            device_bytes: stages.iter().map(|stage| stage.bytes).max().unwrap_or(0),
            host_bytes: counted.parked_bytes,
            stages,
            host: HostPlan::default(),
        }
    }

    /// This plan with the memory of `process` on the host. Errors, with the numbers, where the machine has not as much.
    pub fn with_host(mut self, counted: &Counted, process: &Process) -> Result<Self> {
        self.host = host::count(&self, counted, process);
        self.host.check("the run", "fewer samples, --solver gptq or --solver rtn take less")?;
        Ok(self)
    }
}

/// What the cheaper solvers would take, where that is less than `bytes`.
fn cheaper(subject: &Subject<'_>, device: &Counting, bytes: u64) -> Result<String> {
    let with = |name: &str, kind: Solver, importance: Importance| -> Result<Option<String>> {
        let solver = SolverSettings { solver: kind, ..subject.solver.clone() };
        let mut subject = Subject { solver: &solver, importance, ..subject.clone() };
        if kind == Solver::Rtn {
            // It reads no data.
            (subject.chunks, subject.places, subject.refit) = (Vec::new(), Vec::new(), Refit::None);
        }
        let counted = subject.count(device, Activations::Streamed)?;
        let taken = counted.stages().iter().map(|stage| stage.bytes).max().unwrap_or(0);
        Ok((taken < bytes).then(|| format!("; {name} would take {}", human_bytes(taken))))
    };
    let mut told = with("--solver gptq", Solver::Gptq, subject.importance)?.unwrap_or_default();
    if subject.solver.solver != Solver::Rtn {
        told += &with("--solver rtn", Solver::Rtn, Importance::None)?.unwrap_or_default();
    }
    Ok(told)
}
