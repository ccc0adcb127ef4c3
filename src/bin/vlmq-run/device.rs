//! Where to compute.

use crate::values::DeviceChoice;
use anyhow::{Context, Result, bail};
use std::path::Path;
use vlmq::checkpoint::Checkpoint;
use vlmq::device::Device;
use vlmq::device::cuda::Cuda;
use vlmq::model::families;
use vlmq::tensor::Float;

/// Names a library of emulated kernels, which `--device cuda` then runs on the host: for tests (kernels/README.md).
const EMULATED_KERNELS: &str = "VLMQ_EMULATED_KERNELS";

/// What was chosen.
pub(crate) enum Chosen {
    Cpu,
    Cuda(Cuda),
}

/// Takes the device that was asked for, to run the checkpoint in `model` in its own precision. A device that was asked for
/// by name and cannot be had is an error; `auto` says why it makes do with the CPU. `limit`: bytes of GPU memory to use at
/// most, an error where there is no GPU to use.
pub(crate) fn choose(choice: DeviceChoice, model: &Path, limit: Option<u64>) -> Result<Chosen> {
    let no_limit = || match limit {
        Some(_) => bail!("--max-gpu-memory limits what a GPU holds, but the run is on the CPU; ask for --device cuda"),
        None => Ok(Chosen::Cpu),
    };
    // The checkpoint is read once there is a device to read it for.
    let any = Float::F32;
    let device = match choice {
        DeviceChoice::Cpu => return no_limit(),
        DeviceChoice::Auto => match Cuda::open(0, any) {
            Ok(device) => device,
            Err(why) => {
                log::info!("computing on the CPU: {why:#}");
                return no_limit();
            }
        },
        DeviceChoice::Cuda(index) => match std::env::var_os(EMULATED_KERNELS) {
            Some(library) => Cuda::emulated(Path::new(&library), any).context(EMULATED_KERNELS)?,
            None => Cuda::open(index, any)
                .with_context(|| format!("cannot compute on --device cuda:{index} (--device cpu goes without)"))?,
        },
    };
    if let Some(limit) = limit {
        device.limit_memory(limit).context("--max-gpu-memory")?;
    }
    let precision = families::float_type(&Checkpoint::open(model)?)?;
    log::info!("computing on {}, the model in {precision:?}", device.name());
    Ok(Chosen::Cuda(device.with_precision(precision)))
}
