//! Memory of the process during a run: what it holds when the plan is made, and what comes to it.

use super::counted::{Counted, CountedStep};
use super::totals::MemoryPlan;
use crate::plan::{Entry, HostPlan, Process, StagePlan, Step, entry, worst};
use crate::progress::Stage;

/// The host's memory of a run that was counted, whose device memory is as `memory` says. Without a `process` it is what the run adds to
/// any.
pub(super) fn count(memory: &MemoryPlan, counted: &Counted, process: &Process) -> HostPlan {
    let data = (process.peak > 0).then(|| {
        let before = entry("program, tokenizer and data, at most", process.peak);
        StagePlan::new(Stage::Data, ("reading data".into(), vec![before]))
    });
    let mapped = entry("the file's pages of the largest tensor", process.largest_kept);
    let write = ("copying tensors".to_owned(), vec![held(process.held), mapped]);
    let host = Host { memory, counted };
    // Images and tokens are given back once the samples are embedded.
    let after_data = process.held.saturating_sub(process.data);
    let computed = [(Stage::Vision, process.held), (Stage::Blocks, after_data)];
    let computed = computed.into_iter().filter_map(|(stage, before)| host.stage(stage, before));
    HostPlan::new(data.into_iter().chain([StagePlan::new(Stage::Write, write)]).chain(computed).collect(), process)
}

fn held(bytes: u64) -> Entry {
    entry("program, tokenizer and data", bytes)
}

/// Counts on the host.
struct Host<'a> {
    memory: &'a MemoryPlan,
    counted: &'a Counted,
}

impl Host<'_> {
    /// A stage at its worst step, in a process that holds so much; `None` where there is no such stage.
    fn stage(&self, stage: Stage, before: u64) -> Option<StagePlan> {
        let mut steps = self.counted.steps.iter().filter(|step| step.stage == stage).peekable();
        steps.peek()?;
        Some(StagePlan::new(stage, worst(steps.map(|step| self.step(step, before)))))
    }

    /// What is held before, the device's memory where that is the host's, and what goes between the two.
    fn step(&self, step: &CountedStep, before: u64) -> Step {
        let (name, entries) = &step.device;
        let device = entries.iter().filter(|_| self.memory.device_is_host).cloned();
        let first = [held(before), entry("page-locked residual streams", self.memory.host_bytes)];
        (name.clone(), first.into_iter().chain(device).chain(step.on_host.clone()).collect())
    }
}
