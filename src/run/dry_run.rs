//! A run up to where the first weight would be read: every input checked, memory, disk and time counted.

use super::encode;
use super::input::Input;
use crate::device::counting::Counting;
use crate::device::{ModelOps, SolveOps};
use crate::plan::{DiskPlan, MemoryPlan, Rates, StageEstimate, StateBytes, TimePlan};
use crate::progress::{Observer, Stage, StageTime};
use crate::report::CalibrationCounts;
use crate::report::settings::RunSettings;
use anyhow::{Context, Result};
use serde::Serialize;

/// What a run would take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DryRun {
    /// The checkpoint's `model_type`.
    pub family: String,
    /// Device that would compute, such as `cpu`.
    pub device: String,
    /// What became of the calibration data.
    pub calibration: CalibrationCounts,
    /// Memory of device and host.
    pub memory: MemoryPlan,
    /// Room on disk.
    pub disk: DiskPlan,
    /// Time, estimated.
    pub time: TimePlan,
}

/// Checks and counts a run, see [`dry_run`](super::dry_run).
pub(super) fn dry_run<D: ModelOps + SolveOps>(
    device: &D,
    settings: &RunSettings,
    observer: &mut dyn Observer,
) -> Result<DryRun> {
    settings.check()?;
    let settings = &settings.plain();
    let mut stages: Vec<StageTime> = Vec::new();
    let (input, data) = Input::read::<D>(settings, &mut stages, observer)?;
    let packed = data.packed();
    let subject = input.subject(&packed);
    let (memory, counted) = input.plan(&Counting::of(device), &data, &subject)?;
    let disk = input.disk(StateBytes::of(&subject, device.element_bytes()), &settings.out)?;

    let mut file_bytes = 0;
    for file in input.checkpoint.weight_files() {
        file_bytes += file.metadata().with_context(|| format!("cannot read {}", file.display()))?.len();
    }
    let rates = Rates::measure(device, &subject)?;
    let mut time = TimePlan::new(&counted, rates, file_bytes, input.sizes.before - input.sizes.float_layers);
    // This stage has just been through.
    for StageTime { stage, seconds } in stages.into_iter().filter(|time| time.stage == Stage::Data) {
        time.seconds += seconds;
        time.stages.insert(0, StageEstimate { stage, seconds, load: Default::default() });
    }
    let calibration = encode::counts(&data.calibration, input.config.image_token);
    Ok(DryRun { family: input.family.into(), device: device.name(), calibration, memory, disk, time })
}
