//! What a checkpoint holds, what would be quantized, and what that would cost.

pub use super::devices::inspect;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::formats::Format;
use crate::checkpoint::{Packing, Quantization};
use crate::device::{ModelOps, SolveOps};
use crate::model::config::Section;
use crate::model::decoder::{Projection, module_name};
use crate::model::families::{self, ModelConfig};
use crate::model::language_model::check_headers;
use crate::model::parts::{self, part_of};
use crate::plan::{CheckSize, DecoderShape, Job, MemoryPlan, block_work};
use crate::plan::{ChunkSize, Costs, Rates};
use crate::quantize::settings::{Importance, Refit, Solver, SolverSettings};
use crate::report::settings::CHUNK_TOKENS;
use crate::report::split::largest_split;
use anyhow::{Result, ensure};
use serde::Serialize;
use std::path::Path;

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

/// Counts what quantizing a decoder would take; `rates` are asked for once the work is known.
pub fn estimate(
    shape: &DecoderShape,
    workload: &Workload,
    costs: &Costs<'_>,
    rates: impl FnOnce(&Job<'_>) -> Result<Rates>,
) -> Result<Estimate> {
    let solver = SolverSettings { solver: workload.solver, ..SolverSettings::default() };
    let per_chunk = (CHUNK_TOKENS / workload.tokens.max(1)).max(1);
    let chunk = ChunkSize {
        tokens: per_chunk * workload.tokens,
        longest: workload.tokens,
        pairs: per_chunk * workload.tokens * workload.tokens,
        ..ChunkSize::default()
    };
    let chunks = vec![chunk; workload.samples.div_ceil(per_chunk)];
    let importance = workload.importance;
    let (embedder, check, refit) = (None, CheckSize::default(), Refit::usual(&solver));
    let job = Job { shape: *shape, solver: &solver, importance, refit, chunks, deepstack: 0, embedder, check };
    let (work, rates) = (block_work(&job), rates(&job)?);
    Ok(Estimate {
        workload: *workload,
        peak_memory_bytes: MemoryPlan::resident(&job, costs).device_bytes,
        flops: work.flops(),
        seconds: work.seconds(&rates),
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
    let checkpoint = Checkpoint::open(folder)?;
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
            Some(estimate(&shape, &workload, &Costs::of(device), |job| Rates::measure(device, job))?)
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
            let fits = |size: &usize| kinds.iter().all(|kind| kind.group_sizes.contains(size));
            let sizes = [128, 64, 32].into_iter().filter(fits).map(Some).chain([None]);
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

    const SEVEN_BILLION: DecoderShape =
        DecoderShape { blocks: 28, hidden: 3584, intermediate: 18944, heads: 28, kv_heads: 4, head_dim: 128 };

    fn of(solver: Solver, importance: Importance) -> Estimate {
        let rates = Rates {
            products: 1e12,
            attention: 1e12,
            statistics: 1e12,
            factors: 1e12,
            codes: f64::INFINITY,
            values: f64::INFINITY,
            checked: 1.0,
        };
        let workload = Workload { samples: 512, tokens: 512, solver, importance };
        estimate(&SEVEN_BILLION, &workload, &Costs::plain(4), |_| Ok(rates)).unwrap()
    }

    #[test]
    fn block_weights_are_those_of_a_7b_model() {
        // 3584·(3584 + 512 + 512 + 3584) + 3·3584·18944
        assert_eq!(SEVEN_BILLION.block_weights(), 233_046_016);
    }

    #[test]
    fn estimates_are_of_the_known_size() {
        // 7B, 512 samples of 512 tokens: 28 blocks of two forward passes of about 122 TFLOP and 104 TFLOP of H.
        let gptq = of(Solver::Gptq, Importance::None);
        assert!((8e15..11e15).contains(&gptq.flops), "{:e}", gptq.flops);
        // One stream of 3.8 GB in float32, weights of 1.9 GB, H and factor of 2.9 GB.
        assert!((8e9..9e9).contains(&(gptq.peak_memory_bytes as f64)), "{}", gptq.peak_memory_bytes);
        // The second stream, C and the cross term.
        let vlmq = of(Solver::Gptaq, Importance::Vlmq);
        assert!((14.5e9..15.5e9).contains(&(vlmq.peak_memory_bytes as f64)), "{}", vlmq.peak_memory_bytes);
        assert!((gptq.seconds / (gptq.flops / 1e12) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn more_method_costs_more() {
        let flops = |solver, importance| of(solver, importance).flops;
        let rising = [
            flops(Solver::Rtn, Importance::Vlmq),
            flops(Solver::Gptq, Importance::None),
            flops(Solver::Gptq, Importance::Vlmq),
            flops(Solver::Gptaq, Importance::Vlmq),
        ];
        assert_eq!(rising[0], 0.0);
        assert!(rising.is_sorted_by(|a, b| a < b), "{rising:?}");
    }

    #[test]
    fn group_sizes_divide() {
        assert_eq!(group_sizes(384), [32, 64, 128]);
        assert_eq!(group_sizes(29568), [32, 64, 128]);
        assert!(group_sizes(1176).is_empty());
    }
}
