//! A block on its way to its codes.

use super::chunk::{Activations, Pass};
use super::set::LayerSet;
use crate::codes::QuantizedLinear;
use crate::device::{ModelOps, SolveOps};
use crate::model::config::DecoderConfig;
use crate::model::decoder::{Block, Layout, Projection};
use crate::progress::Stop;
use crate::quantize::SolveReport;
use crate::quantize::importance::{Factors, ImportanceSpread};
use crate::quantize::settings::{Importance, ImportancePower, Refit, SolverSettings};
use anyhow::Result;

/// A layer that has its codes.
pub struct SolvedLayer {
    /// The layer's place in its block.
    pub projection: Projection,
    /// Codes, scales, zeros.
    pub linear: QuantizedLinear,
    /// How the solve went.
    pub report: SolveReport,
    /// Spread of the importance factors; `None` where all tokens counted alike.
    pub importance: Option<ImportanceSpread>,
}

/// What a block has to say beside its layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockOutcome {
    /// How far the quantized path's residual stream is from the float path's behind the block: the mean over calibration tokens of
    /// `Σ|x_quantized − x_float| / Σ|x_float|`, those without a float path left out. `None` where there is none, or where it
    /// overflows.
    pub path_error: Option<f64>,
    /// Normalised importance factors of all tokens, chunk by chunk; `None` where all counted alike.
    pub factors: Option<Vec<Factors>>,
}

/// Quantizes one block and advances both paths through it.
pub struct BlockQuantizer<'a, D: ModelOps + SolveOps> {
    /// Where everything is computed.
    pub device: &'a D,
    /// Shape of the decoder.
    pub config: &'a DecoderConfig,
    /// The solver's settings.
    pub settings: &'a SolverSettings,
    /// How tokens are weighted.
    pub importance: Importance,
    /// The power of their factors.
    pub importance_power: ImportancePower,
    /// Whether scales are refitted.
    pub refit: Refit,
    /// Where the chunks are between passes.
    pub activations: Activations,
    /// Ends the work between chunks and layers.
    pub stop: &'a Stop,
    /// Number of the block, from 0.
    pub index: usize,
    /// The block with its float weights.
    pub float: Block<D::Tensor>,
    /// The block once more; its weights are replaced as layers are solved.
    pub quantized: Block<D::Tensor>,
}

impl<D: ModelOps + SolveOps> BlockQuantizer<'_, D> {
    /// A pass over the chunks that ends with `residual` added, if with any.
    pub(super) fn pass(&self, with_float: bool, residual: Option<Projection>) -> Pass<'_, D> {
        let leaves = residual.filter(|&residual| residual == Projection::Down).map(|_| self.index);
        Pass { device: self.device, activations: self.activations, stop: self.stop, with_float, leaves }
    }

    /// The input of a set's layers, from the residual stream `x` of the path that runs through `block`.
    pub(super) fn input(
        &self,
        set: LayerSet,
        block: &Block<D::Tensor>,
        x: &D::Tensor,
        layout: &Layout<D::Tensor>,
    ) -> Result<D::Tensor> {
        let (device, config) = (self.device, self.config);
        match set {
            LayerSet::Attention => block.attention_input(device, config, x),
            LayerSet::Output => block.output_input(device, config, x, layout),
            LayerSet::Mlp => block.mlp_input(device, config, x),
            LayerSet::Down => block.down_input(device, config, x),
        }
    }

    /// What a path meets at the end of the block.
    pub(super) fn leave(&self, layout: &Layout<D::Tensor>, x: &mut D::Tensor, residual: Projection) -> Result<()> {
        match residual {
            Projection::Down => layout.add_deepstack(self.device, x, self.index),
            _ => Ok(()),
        }
    }

    pub(super) fn place(&self, projection: Projection) -> String {
        place_of(projection, self.index)
    }
}

/// A layer's name in errors.
pub(super) fn place_of(projection: Projection, index: usize) -> String {
    format!("cannot quantize {} of block {index}", projection.module())
}
