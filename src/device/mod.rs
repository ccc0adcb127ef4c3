//! The operations a device offers. Everything above this module is written once, against these traits.
//!
//! A device owns tensors: dense row-major matrices in whatever storage suits it (float32 on the CPU; on a GPU the model in its own
//! type; nothing but shapes where it only [counts](counting)). Two small sets of operations cover the whole program: [`ModelOps`] for
//! calibration and evaluation, [`SolveOps`] for the statistics and the solver.

mod checks;
pub mod counting;
pub mod cpu;
pub mod cuda;
mod grid;
mod model_ops;
mod solve_ops;
mod work;

pub use counting::Label;
pub use grid::{Grid, GridRule, LOSS_SHRINKS, LOSS_STRETCHES, ScaleMisfit, WIDTHS, told_widths};
pub use model_ops::{Activation, AttentionOperands, AttentionShape, ModelOps, QuantizedWeight, Rotary, Span};
pub use solve_ops::{
    BLOCK, BlockCodes, BlockShape, ColumnBlock, CrossFactor, Factor, Factored, Group, GroupGrid, LayerInputs,
    PermuteSymmetric, ProductRange, SolveOps, SolveState,
};
pub use work::ByKind;

use crate::tensor::Matrix;
use anyhow::Result;
use serde::Serialize;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Most that a device's own memory pool held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PoolPeak {
    /// Bytes that the pool took from the device, those between and behind tensors included.
    pub reserved_bytes: u64,
    /// Bytes of tensors, rounded up as the pool does.
    pub used_bytes: u64,
}

/// Work that takes memory for itself while it runs, beside its arguments and results: for memory plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// [`ModelOps::linear`] and [`ModelOps::matmul`].
    Linear {
        /// Channels of the input.
        inner: usize,
        /// Channels of the output.
        outputs: usize,
    },
    /// [`SolveOps::weighted_squared_norm`].
    WeightedNorm {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of it.
        features: usize,
    },
    /// The bias of a [`ModelOps::linear`].
    Bias {
        /// Rows of the input.
        rows: usize,
        /// Channels of the output.
        outputs: usize,
    },
    /// [`ModelOps::attention`].
    Attention {
        /// Rows of queries and keys.
        tokens: usize,
        /// The longest span.
        longest: usize,
        /// Heads.
        shape: AttentionShape,
    },
    /// [`ModelOps::attention_backward`], of the same.
    AttentionBackward {
        /// Rows of queries and keys.
        tokens: usize,
        /// The longest span.
        longest: usize,
        /// Heads.
        shape: AttentionShape,
    },
    /// [`SolveOps::accumulate_statistics`].
    Statistics {
        /// Rows of the inputs.
        tokens: usize,
        /// Width of the inputs.
        features: usize,
        /// Whether there is a cross term.
        cross: bool,
    },
    /// [`SolveOps::factor`] and [`SolveOps::cross_factor`].
    Factor {
        /// Side of the matrix.
        features: usize,
    },
    /// [`SolveOps::add_product`] of all columns before the last `columns` of a layer.
    Carry {
        /// Inputs of the layer.
        features: usize,
        /// Columns that are brought up to date.
        columns: usize,
    },
}

/// Owner of tensors: dense row-major matrices `[rows, cols]` in device memory. A clone is the same device.
pub trait Device: Clone + Send + Sync + 'static {
    /// A dense row-major matrix in device memory.
    type Tensor: Send + Sync + 'static;

    /// Name for logs and reports, such as `cpu`.
    fn name(&self) -> String;

    /// Libraries and drivers that results may depend on beside the device itself, with their versions.
    fn libraries(&self) -> BTreeMap<&'static str, String> {
        BTreeMap::new()
    }

    /// A tensor of zeros.
    fn zeros(&self, rows: usize, cols: usize) -> Result<Self::Tensor>;

    /// Zeros `[features, features]` of which nothing below the diagonal will ever be written: they take
    /// [`triangle_bytes`](Self::triangle_bytes).
    fn zero_triangle(&self, features: usize) -> Result<Self::Tensor> {
        self.zeros(features, features)
    }

    /// Fills a tensor with zeros.
    fn clear(&self, tensor: &mut Self::Tensor) -> Result<()>;

    /// Copies a host matrix to the device.
    fn upload(&self, matrix: Matrix) -> Result<Self::Tensor>;

    /// [`upload`](Self::upload) of a matrix of this shape, which `make` computes, where the device keeps numbers at all.
    fn upload_with(&self, _shape: (usize, usize), make: impl FnOnce() -> Result<Matrix>) -> Result<Self::Tensor> {
        self.upload(make()?)
    }

    /// Copies a tensor back to the host.
    fn download(&self, tensor: &Self::Tensor) -> Result<Matrix>;

    /// The values of a tensor in its own type, little-endian, row by row. What is [parked](Self::park) is read where it is, and stays
    /// there.
    fn bytes<'a>(&self, tensor: &'a Self::Tensor) -> Result<Cow<'a, [u8]>>;

    /// Index of the first row that holds a NaN or an infinity, if any.
    fn first_non_finite_row(&self, tensor: &Self::Tensor) -> Result<Option<usize>>;

    /// `Σ_c (scales_c · x_c)²` of each row of a tensor of any storage; scales `[cols]`.
    fn scaled_squares_rows(&self, tensor: &Self::Tensor, scales: &[f32]) -> Result<Vec<f32>>;

    /// Says that a tensor is not needed for a while. A device may move it out of its memory, behind the work enqueued so far,
    /// and returns at once. Until it is fetched, any use but that and [`shape`](Self::shape) is an error there. A device
    /// whose memory is the host's does nothing.
    fn park(&self, _tensor: &mut Self::Tensor) -> Result<()> {
        Ok(())
    }

    /// Starts to bring a parked tensor back and returns at once; work that uses it is ordered behind the copy. Nothing
    /// happens to a tensor that is not parked.
    fn fetch(&self, _tensor: &mut Self::Tensor) -> Result<()> {
        Ok(())
    }

    /// Whether the device works while the host does other things. Otherwise the host's cores are the device, and nothing is won by doing
    /// anything beside its work.
    fn works_beside_host(&self) -> bool {
        false
    }

    /// Bytes of device memory that may be in use at once; `None` where it is the host's.
    fn memory_limit(&self) -> Option<u64> {
        None
    }

    /// Most bytes of device memory that were in use at once since [`reset_peak`](Self::reset_peak); `None` where it is the
    /// host's.
    fn peak_bytes(&self) -> Option<u64> {
        None
    }

    /// Begins to look for a new peak.
    fn reset_peak(&self) {}

    /// The most that the device's own memory pool held since it was made or limited; `None` where there is none.
    fn pool_peak(&self) -> Result<Option<PoolPeak>> {
        Ok(None)
    }

    /// Bytes of memory that `work` takes for itself.
    fn workspace(&self, _work: Work) -> u64 {
        0
    }

    /// Bytes that statistics `[features, features]` take of which only the upper triangle is written.
    fn triangle_bytes(&self, features: usize) -> u64 {
        4 * (features as u64).pow(2)
    }

    /// Says what the tensors hold that are made until the result is dropped, to a device that keeps [books](counting) of them.
    fn label(&self, _what: &'static str) -> Label {
        Label::default()
    }

    /// `(rows, cols)` of a tensor.
    fn shape(&self, tensor: &Self::Tensor) -> (usize, usize);
}
