//! What a checkpoint holds, what would be quantized, and what that would cost.

pub use super::devices::inspect;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::formats::Format;
use crate::checkpoint::{Packing, Quantization};
use crate::data::sequence::Sequence;
use crate::device::counting::Counting;
use crate::device::{ModelOps, SolveOps};
use crate::model::config::Section;
use crate::model::decoder::{Projection, module_name};
use crate::model::families::{self, ModelConfig};
use crate::model::language_model::check_headers;
use crate::model::parts::{self, part_of};
use crate::plan::{DecoderShape, Rates, Subject, SubjectChunk};
use crate::quantize::block::Activations;
use crate::quantize::settings::{Importance, Refit, Solver, SolverSettings};
use crate::report::settings::CHUNK_TOKENS;
use crate::report::split::largest_split;
use anyhow::{Result, ensure};
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;

/// A part of a checkpoint: vision tower, embeddings, decoder, …
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Name of the part.
    pub name: String,
    /// Tensors in it.
    pub tensors: usize,
    /// Bytes of the tensors in the file.
    pub bytes: u64,
    /// Storage types of the tensors, such as `BF16`.
    pub types: Vec<String>,
}

/// Linear layers of the same place in every decoder block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LinearKind {
    /// Name inside the block, such as `self_attn.q_proj`.
    pub name: String,
    /// How many there are: one a block.
    pub count: usize,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Bytes of one in the file.
    pub bytes: u64,
    /// Group sizes of the usual ones (32, 64, 128, 256, 512, 1024) that divide its input features.
    pub group_sizes: Vec<usize>,
}

/// Group sizes among the usual ones that divide `cols` input features.
pub fn group_sizes(cols: usize) -> Vec<usize> {
    [32, 64, 128, 256, 512, 1024].into_iter().filter(|&size| size <= cols && cols.is_multiple_of(size)).collect()
}

/// Group sizes, the usual one first, that divide the input features of all layers, and behind them whole rows.
fn fitting_groups(cols: impl Iterator<Item = usize> + Clone) -> impl Iterator<Item = Option<usize>> {
    let fits = move |size: &usize| cols.clone().all(|cols| group_sizes(cols).contains(size));
    [128, 64, 32].into_iter().filter(fits).map(Some).chain([None])
}

/// The amount of calibration that an estimate is for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Workload {
    /// Calibration samples.
    pub samples: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// How codes are found.
    pub solver: Solver,
    /// How tokens are weighted.
    pub importance: Importance,
}

/// What quantizing would take, by the counts of [`plan`](crate::plan); the vision tower and reading files are left out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The work it is for.
    #[serde(flatten)]
    pub workload: Workload,
    /// Bytes of the device's memory held at the worst moment of quantizing the blocks, activations included.
    pub peak_memory_bytes: u64,
    /// Floating-point operations of products.
    pub flops: f64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Floating-point operations a second that products by weights reached here.
    pub flops_per_second: f64,
}

/// Counts what quantizing a checkpoint would take in the place of `device`; `rates` are asked for once the work is known. Errors as a run
/// does of tensors that are missing or of another shape.
pub fn estimate(
    checkpoint: &Arc<Checkpoint>,
    config: &ModelConfig,
    workload: &Workload,
    device: &Counting,
    rates: impl FnOnce(&Subject<'_>) -> Result<Rates>,
) -> Result<Estimate> {
    let cols = Projection::ALL.map(|projection| projection.shape(&config.decoder).1);
    let group_size = fitting_groups(cols.into_iter()).next().flatten();
    let solver = SolverSettings { solver: workload.solver, group_size, ..SolverSettings::default() };
    // Text of any kind, but for the place of an image.
    let tokens = vec![u32::from(config.image_token == 0); workload.tokens];
    let positions = (0..).map(|place| [place; 3]).take(workload.tokens).collect();
    let sequence =
        Sequence { id: String::new(), tokens, vision_tokens: 0, images: Vec::new(), positions, answer: 0..0 };
    let (samples, importance, refit) = match workload.solver {
        Solver::Rtn => (0, Importance::None, Refit::None),
        Solver::Gptq | Solver::Gptaq => (workload.samples, workload.importance, Refit::usual(&solver)),
    };
    let per_chunk = (CHUNK_TOKENS / workload.tokens.max(1)).max(1);
    let chunk = |first| SubjectChunk {
        sequences: vec![&sequence; per_chunk.min(samples - first)],
        held_out: false,
        checked: false,
    };
    let chunks = (0..samples).step_by(per_chunk).map(chunk).collect();
    let (format, places, images) = (Format::COMPRESSED_TENSORS, Vec::new(), false);
    let subject = Subject { checkpoint, config, solver: &solver, format, importance, refit, chunks, places, images };
    let counted = subject.count(device, Activations::Resident)?;
    let rates = rates(&subject)?;
    Ok(Estimate {
        workload: *workload,
        peak_memory_bytes: counted.stages().last().map_or(0, |stage| stage.bytes),
        flops: counted.blocks.flops(),
        seconds: counted.blocks.seconds(&rates),
        flops_per_second: rates.products,
    })
}

/// What [`inspect`] found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// The folder.
    pub model: String,
    /// The checkpoint's `model_type`.
    pub family: String,
    /// The quantization that it has already, such as `gptq 4-bit`; `None` for a float checkpoint.
    pub quantization: Option<String>,
    /// Sizes of the decoder.
    pub decoder: DecoderShape,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Parts of the checkpoint, in the order in which data passes them.
    pub parts: Vec<Part>,
    /// What would be quantized.
    pub quantizable: Vec<LinearKind>,
    /// Over how many GPUs servers can split it: as it is quantized, or would be at the default width with the usual groups that
    /// fit all layers, the largest first, and whole rows.
    pub splits: Vec<Split>,
    /// Estimate of a run; `None` where it is quantized already.
    pub estimate: Option<Estimate>,
}

/// What a group size leaves of tensor parallelism.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Split {
    /// Columns that share a scale; `None`: the row.
    pub group_size: Option<usize>,
    /// See [`largest_split`].
    pub gpus: usize,
}

/// Reads a checkpoint's configuration and headers, see [`inspect`](super::devices::inspect).
pub(super) fn of<D: ModelOps + SolveOps>(device: &D, folder: &Path) -> Result<Inspection> {
    let checkpoint = Arc::new(Checkpoint::open(folder)?);
    let config = families::of::<D>(&checkpoint)?.config(&checkpoint)?;
    check_headers::<D>(&checkpoint, &config, true)?;
    let shape = DecoderShape::of(&config.decoder);
    let stored = checkpoint.quantization()?;
    let quantizable: Vec<LinearKind> = Projection::ALL
        .iter()
        .map(|&projection| linear_kind(&checkpoint, &config, projection))
        .collect::<Result<_>>()?;
    let splits = splits(&shape, stored, &quantizable);
    let estimate = match stored {
        Some(_) => None,
        None => {
            let (solver, importance) = (SolverSettings::default().solver, Importance::Vlmq);
            let workload = Workload { samples: 512, tokens: 512, solver, importance };
            let counting = Counting::of(device);
            Some(estimate(&checkpoint, &config, &workload, &counting, |subject| Rates::measure(device, subject))?)
        }
    };
    let parts = parts(&checkpoint, &config)?;
    Ok(Inspection {
        model: folder.display().to_string(),
        family: Section::root(&checkpoint)?.text("model_type")?.to_owned(),
        quantization: stored.map(|quantization| quantization.to_string()),
        decoder: shape,
        bytes: parts.iter().map(|part| part.bytes).sum(),
        parts,
        quantizable,
        splits,
        estimate,
    })
}

/// See [`Inspection::splits`].
fn splits(shape: &DecoderShape, stored: Option<Quantization>, kinds: &[LinearKind]) -> Vec<Split> {
    let split = |format, settings: &SolverSettings| Split {
        group_size: settings.group_size,
        gpus: largest_split(shape, format, settings),
    };
    let Quantization { format, packing } = match stored {
        Some(stored) => stored,
        None => {
            let sizes = fitting_groups(kinds.iter().map(|kind| kind.cols));
            let settings = |group_size| SolverSettings { group_size, ..SolverSettings::default() };
            return sizes.map(|size| split(Format::COMPRESSED_TENSORS, &settings(size))).collect();
        }
    };
    let Packing { bits, group_size, symmetric } = packing;
    vec![split(format, &SolverSettings { bits, group_size, symmetric, ..SolverSettings::default() })]
}

/// The layers of one place, which are there in every block.
fn linear_kind(checkpoint: &Checkpoint, config: &ModelConfig, projection: Projection) -> Result<LinearKind> {
    let (rows, cols) = projection.shape(&config.decoder);
    let mut bytes = 0;
    for block in 0..config.decoder.layers {
        let module = module_name(&config.names, block, projection);
        bytes = match checkpoint.is_quantized() {
            true => module_bytes(checkpoint, &module)?,
            false => checkpoint.tensor(&format!("{module}.weight"))?.bytes.len() as u64,
        };
    }
    let name = projection.module().to_owned();
    Ok(LinearKind { name, count: config.decoder.layers, rows, cols, bytes, group_sizes: group_sizes(cols) })
}

/// Bytes of everything under a module but its bias.
fn module_bytes(checkpoint: &Checkpoint, module: &str) -> Result<u64> {
    let prefix = format!("{module}.");
    let bias = format!("{module}.bias");
    let names: Vec<&str> = checkpoint.names().filter(|name| name.starts_with(&prefix) && *name != bias).collect();
    ensure!(!names.is_empty(), "no tensor of {module} is in the checkpoint");
    names.iter().map(|name| Ok(checkpoint.tensor(name)?.bytes.len() as u64)).sum()
}

/// Sums tensors up by where they stand.
fn parts(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Vec<Part>> {
    let part = |part: parts::Part| Part { name: part.to_string(), tensors: 0, bytes: 0, types: Vec::new() };
    let mut parts = parts::Part::ALL.map(part);
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(name)?;
        let part = &mut parts[part_of(name, config) as usize];
        part.tensors += 1;
        part.bytes += tensor.bytes.len() as u64;
        let dtype = format!("{:?}", tensor.dtype);
        if !part.types.contains(&dtype) {
            part.types.push(dtype);
        }
    }
    Ok(parts.into_iter().filter(|part| part.tensors > 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_sizes_divide() {
        assert_eq!(group_sizes(384), [32, 64, 128]);
        assert_eq!(group_sizes(29568), [32, 64, 128]);
        assert!(group_sizes(1176).is_empty());
    }
}
