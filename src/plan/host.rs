//! Memory of the process: what it holds when a plan is made, and what comes to it.

use super::system::{Room, room, status_bytes};
use super::{StagePlan, told};
use crate::checkpoint::Checkpoint;
use crate::data::sequence::Sequence;
use crate::heap;
use crate::progress::human_bytes;
use anyhow::{Result, ensure};
use serde::Serialize;

/// What a process holds before any weight is read, and what it will read. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Memory that it holds.
    pub held: u64,
    /// Most that it ever held.
    pub peak: u64,
    /// Memory that is given back once the samples are embedded: their images and tokens.
    pub data: u64,
    /// The largest tensor that keeps its precision, in the file.
    pub largest_kept: u64,
}

impl Process {
    /// This one. 0 is held where the system does not tell.
    pub fn now(checkpoint: &Checkpoint, sequences: &[&Sequence], kept: impl Fn(&str) -> bool) -> Result<Self> {
        // What reading the data left free would count as held.
        heap::trim();
        let mut process = Self::holding(!sequences.is_empty());
        process.data = sequences.iter().map(|sequence| Self::data_of(sequence)).sum();
        for name in checkpoint.names().filter(|name| kept(name)) {
            let tensor = checkpoint.tensor(name)?;
            process.largest_kept = process.largest_kept.max(tensor.bytes.len() as u64);
        }
        Ok(process)
    }

    /// This one, with data in it.
    pub(crate) fn with_data() -> Self {
        heap::trim();
        Self::holding(true)
    }

    fn holding(with_data: bool) -> Self {
        Self { held: held(with_data), peak: status_bytes("VmHWM").unwrap_or(0), ..Self::default() }
    }

    /// Bytes of a sample's pixels, tokens and positions.
    pub(crate) fn data_of(sequence: &Sequence) -> u64 {
        let pixels: usize =
            sequence.images.iter().flat_map(|image| image.crops()).map(|crop| crop.as_raw().len()).sum();
        (pixels + size_of_val(&sequence.tokens[..]) + size_of_val(&sequence.positions[..])) as u64
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

/// Memory of the process on the host.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct HostPlan {
    /// What the process held when the plan was made: program, tokenizer, decoded images.
    pub held_bytes: u64,
    /// Memory that the process may come to hold beside that, with what else was running then; `None` where the system does not tell.
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
    /// Plan of these stages, in `process`.
    pub(crate) fn new(stages: Vec<StagePlan>, process: &Process) -> Self {
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

    /// Errors, with the numbers, where the machine has not as much memory, and warns where it has not as much left. `what` needs it,
    /// and `remedy` would take less.
    pub(crate) fn check(&self, what: &str, remedy: &str) -> Result<()> {
        let worst = self.stages.iter().max_by_key(|stage| stage.bytes);
        let parts = worst.map_or_else(String::new, |stage| told(&stage.entries));
        let step = worst.map_or_else(String::new, |stage| format!("{}, {}", stage.stage, stage.step));
        let needs = format!("{step} takes {} of host memory ({parts})", human_bytes(self.bytes));
        if let Some(total) = self.total_bytes {
            ensure!(
                self.bytes <= total,
                "{what} does not fit into the {} of memory and swap that this process may have: {needs}; {remedy}",
                human_bytes(total)
            );
        }
        let more = self.bytes.saturating_sub(self.held_bytes);
        if let Some(available) = self.available_bytes.filter(|&available| available < more) {
            log::warn!("{needs}, but {} more than now are left: the system may end the run", human_bytes(available));
        }
        Ok(())
    }

    /// The plan in lines.
    pub fn lines(&self) -> Vec<String> {
        let room = self.available_bytes.map_or_else(String::new, |available| {
            format!("; {} held now, {} more available", human_bytes(self.held_bytes), human_bytes(available))
        });
        let mut lines = vec![format!("host memory: {}{room}", human_bytes(self.bytes))];
        self.stages.iter().for_each(|stage| lines.extend(stage.lines()));
        lines
    }
}
