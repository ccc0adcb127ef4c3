//! How long a run takes: its work, as it was counted, divided by what this machine does of each kind in a moment.

use super::Counted;
use crate::plan::{Load, Rates, StageEstimate};
use crate::progress::Stage;
use serde::Serialize;

/// An estimate of a run's time. It does not know what else the machine will do, or how fast its disk is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TimePlan {
    /// All stages that take long, in their order.
    pub stages: Vec<StageEstimate>,
    /// Sum of the stages' seconds.
    pub seconds: f64,
    /// What this machine did of each kind of work in a second.
    pub rates: Rates,
}

impl TimePlan {
    /// Time of a run of so much work, whose checkpoint has `file_bytes` in all files and `kept_bytes` in tensors that are copied.
    pub fn new(counted: &Counted, rates: Rates, file_bytes: u64, kept_bytes: u64) -> Self {
        let loads = [
            (Stage::Checksums, Load { checked: file_bytes as f64, ..Load::default() }),
            // All weights are read once to be checked, those that are kept written once.
            (Stage::Write, Load { values: (file_bytes + kept_bytes) as f64 / 4.0, ..Load::default() }),
            (Stage::Vision, counted.vision),
            (Stage::Blocks, counted.blocks),
        ];
        let stages: Vec<StageEstimate> = loads
            .into_iter()
            .map(|(stage, load)| StageEstimate { stage, seconds: load.seconds(&rates), load })
            .collect();
        Self { seconds: stages.iter().map(|stage| stage.seconds).sum(), stages, rates }
    }
}
