//! Where to compute.

use crate::values::DeviceChoice;
use anyhow::{Context, Result};
use std::path::Path;
use vlmq::checkpoint::Checkpoint;
use vlmq::device::Device;
use vlmq::device::cuda::{Cuda, Precision};
use vlmq::model::families;

/// Names a library of emulated kernels, which `--device cuda` then runs on the host: for tests (kernels/README.md).
const EMULATED_KERNELS: &str = "VLMQ_EMULATED_KERNELS";

/// What was chosen.
pub(crate) enum Chosen {
    Cpu,
    Cuda(Cuda),
}

/// Takes the device that was asked for, to run the checkpoint in `model` in its own precision. A device that was asked for
/// by name and cannot be had is an error; `auto` says why it makes do with the CPU.
pub(crate) fn choose(choice: DeviceChoice, model: &Path) -> Result<Chosen> {
    // The checkpoint is read once there is a device to read it for.
    let any = Precision::F32;
    let device = match choice {
        DeviceChoice::Cpu => return Ok(Chosen::Cpu),
        DeviceChoice::Auto => match Cuda::open(0, any) {
            Ok(device) => device,
            Err(why) => {
                log::info!("computing on the CPU: {why:#}");
                return Ok(Chosen::Cpu);
            }
        },
        DeviceChoice::Cuda(index) => match std::env::var_os(EMULATED_KERNELS) {
            Some(library) => Cuda::emulated(Path::new(&library), any).context(EMULATED_KERNELS)?,
            None => Cuda::open(index, any)
                .with_context(|| format!("cannot compute on --device cuda:{index} (--device cpu goes without)"))?,
        },
    };
    let precision = families::float_type(&Checkpoint::open(model)?)?.into();
    log::info!("computing on {}, the model in {precision:?}", device.name());
    Ok(Chosen::Cuda(device.with_precision(precision)))
}
