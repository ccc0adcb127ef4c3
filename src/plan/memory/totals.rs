//! The memory of a run, stage by stage.

use crate::plan::{HostPlan, StagePlan};
use crate::progress::{Stage, human_bytes};
use crate::quantize::block::Activations;
use serde::Serialize;

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

impl MemoryPlan {
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
        let limit = self.limit_bytes.map_or_else(String::new, |limit| format!(" of {}", human_bytes(limit)));
        let host = match self.activations {
            Activations::Resident => "activations stay there".to_owned(),
            Activations::Streamed => {
                format!("activations are streamed from {} of host memory", human_bytes(self.host_bytes))
            }
        };
        let mut lines = Vec::new();
        if !self.device_is_host {
            lines.push(format!("GPU memory: {}{limit}; {host}", human_bytes(self.device_bytes)));
            self.stages.iter().for_each(|stage| lines.extend(stage.lines()));
        }
        lines.extend(self.host.lines());
        lines
    }
}
