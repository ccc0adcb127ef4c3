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
mod vision;
mod work;

pub use disk::DiskPlan;
pub use host::{HostPlan, Process};
pub use memory::{Counted, CountedStep, MemoryPlan};
pub use sizes::DecoderShape;
pub use state::{StateBytes, state_bytes};
pub use subject::{Subject, SubjectChunk};
pub use time::TimePlan;
pub use vision::ChunkSize;
pub(crate) use vision::encoding;
pub use work::{Load, Rates, StageEstimate};

pub use crate::device::ByKind;
use crate::device::{ModelOps, Work};
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

/// What numbers take on a device.
pub struct Costs<'a> {
    /// Bytes of a weight or an activation.
    pub(crate) element_bytes: u64,
    /// Whether the device's memory is the host's.
    pub(crate) host: bool,
    /// Bytes that work takes for itself.
    pub(crate) workspace: Box<dyn Fn(Work) -> u64 + 'a>,
}

impl<'a> Costs<'a> {
    /// Costs of a device.
    pub fn of<D: ModelOps>(device: &'a D) -> Self {
        Self {
            element_bytes: device.element_bytes() as u64,
            host: device.peak_bytes().is_none(),
            workspace: Box::new(|work| device.workspace(work)),
        }
    }

    /// Costs of a device with memory of its own, weights and activations of so many bytes, and no work space.
    pub fn plain(element_bytes: usize) -> Self {
        Self { element_bytes: element_bytes as u64, host: false, workspace: Box::new(|_| 0) }
    }

    /// Bytes of weights or activations.
    pub(crate) fn stored(&self, values: u64) -> u64 {
        values * self.element_bytes
    }

    /// Bytes that work takes for itself.
    pub(crate) fn workspace(&self, work: Work) -> u64 {
        (self.workspace)(work)
    }

    /// Bytes of a tensor on its way to the device: `mapped` from the file and, where the device's precision is another, as float32
    /// and in that.
    pub(crate) fn loading(&self, values: u64, mapped: u64) -> u64 {
        if mapped == self.stored(values) {
            return mapped;
        }
        let converted = if self.element_bytes < F32 { self.element_bytes } else { 0 };
        mapped + values * (F32 + converted)
    }
}

/// Bytes of small tables for kernels: importance factors, row numbers, bounds of samples and images.
pub(crate) fn tables(rows: u64) -> u64 {
    4096 + 16 * rows
}
