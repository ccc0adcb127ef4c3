//! What a run takes of a machine before it starts: memory by stage and step, work by kind and time, room on the disk.

mod disk;
pub mod evaluation;
mod host;
mod memory;
mod rates;
mod sizes;
mod state;
mod subject;
pub(crate) mod system;
mod time;
mod work;

pub use disk::DiskPlan;
pub use host::{HostPlan, Process};
pub use memory::{Counted, CountedStep, MemoryPlan, WAITING};
pub use sizes::DecoderShape;
pub use state::{StateBytes, state_bytes};
pub use subject::{Subject, SubjectChunk};
pub use time::TimePlan;
pub use work::{Load, Rates, StageEstimate};

pub use crate::device::ByKind;
use crate::progress::{Stage, human_bytes};
use serde::Serialize;

/// A name and its bytes of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// What the memory holds.
    pub name: String,
    /// Bytes of memory.
    pub bytes: u64,
}

pub(crate) fn entry(name: &str, bytes: u64) -> Entry {
    Entry { name: name.into(), bytes }
}

/// A step's name and what is held in it.
pub type Step = (String, Vec<Entry>);

/// Bytes that a step holds.
pub(crate) fn bytes_of((_, entries): &Step) -> u64 {
    entries.iter().map(|entry| entry.bytes).sum()
}

/// The step that holds most.
pub(crate) fn worst(steps: impl IntoIterator<Item = Step>) -> Step {
    steps.into_iter().max_by_key(bytes_of).unwrap_or_default()
}

/// Entries in words: `a block 1.00 GiB, logits 2.00 MiB`.
pub(crate) fn told(entries: &[Entry]) -> String {
    let parts: Vec<String> =
        entries.iter().map(|entry| format!("{} {}", entry.name, human_bytes(entry.bytes))).collect();
    parts.join(", ")
}

/// A stage of the run at its worst step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StagePlan {
    /// The stage.
    pub stage: Stage,
    /// The step that takes most, such as `factoring mlp.down_proj`.
    pub step: String,
    /// What is in memory then.
    pub entries: Vec<Entry>,
    /// Sum of the entries' bytes.
    pub bytes: u64,
    /// Most that the stage had in use; `None` before it ran, and on a device whose memory is the host's.
    pub measured_bytes: Option<u64>,
}

impl StagePlan {
    pub(crate) fn new(stage: Stage, step: Step) -> Self {
        let bytes = bytes_of(&step);
        let (step, entries) = step;
        let entries = entries.into_iter().filter(|entry| entry.bytes > 0).collect();
        Self { stage, step, entries, bytes, measured_bytes: None }
    }

    /// The stage in lines.
    pub(crate) fn lines(&self) -> Vec<String> {
        let first = format!("  {}, at {}: {}", self.stage, self.step, human_bytes(self.bytes));
        let rest = self.entries.iter().map(|entry| format!("    {} {}", human_bytes(entry.bytes), entry.name));
        [first].into_iter().chain(rest).collect()
    }
}

/// Bytes of a float32 value, in which statistics, the solver and logits are kept.
pub(crate) const F32: u64 = 4;
