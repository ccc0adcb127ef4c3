//! What the statistics and the solver need of a device.
//!
//! The solver factors `H = R·Rᵀ` with `R` upper triangular, from the last index backwards, so that `R⁻¹` is the factor
//! that GPTQ reads (`H⁻¹ = R⁻ᵀR⁻¹`) and no inverse of H is ever made. `R̄ = R·diag(R)⁻¹` has a unit diagonal; only the
//! inverses of its diagonal blocks, `Ū_BB = R̄_BB⁻¹`, are needed explicitly.

use super::{Device, GridRule};
use anyhow::Result;
use std::ops::Range;

/// Widest block of columns that is quantized one column at a time, and row stride of the stored diagonal blocks.
pub const BLOCK: usize = 128;

/// `H = R·Rᵀ`, in the form in which the solver reads it.
#[derive(Clone, Debug)]
pub struct Factor<T> {
    /// `[in, in]`: R̄, unit upper triangular, zeros below.
    pub root: T,
    /// `[in, BLOCK]`: rows of a block of columns hold Ū_BB in their first `block.len()` columns.
    pub inverses: T,
    /// `[1, in]`: diagonal of R.
    pub diagonal: T,
}

/// What [`SolveOps::factor`] came to.
#[derive(Clone, Debug)]
pub enum Factored<T> {
    /// The factor.
    Done(Factor<T>),
    /// The matrix is not positive definite to working precision: the pivot of this index is not positive.
    NotPositive {
        /// Index into the matrix, processing order.
        pivot: usize,
    },
}

/// The GPTAQ term in the coordinates of [`Factor`]: `P = M·Ū`.
#[derive(Clone, Debug)]
pub struct CrossFactor<T> {
    /// `[in, in]`: `M = α·triu(C·R⁻ᵀ, 1)·diag(R)⁻¹`, zeros on and below the diagonal.
    pub scaled: T,
    /// `[in, BLOCK]`: rows of a block of columns hold `P_BB = M_BB·Ū_BB` in their first `block.len()` columns.
    pub blocks: T,
}

/// Scales and zeros of some groups, `[rows, groups]`, row by row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GroupGrid {
    /// Exact in the storage type of the grid rule.
    pub scales: Vec<f32>,
    /// Each below `2^bits`.
    pub zeros: Vec<u8>,
}

/// How the symmetric matrix is taken into processing order.
#[derive(Clone, Copy, Debug)]
pub struct PermuteSymmetric<'a> {
    /// Place → original index.
    pub order: &'a [u32],
    /// Value of the diagonal, in original order, in place of the matrix's own.
    pub diagonal: &'a [f32],
}

/// The parts of `a` and `b` that are multiplied, and the columns of `c` that they go into.
#[derive(Clone, Debug)]
pub struct ProductRange {
    /// Columns of `a`, and rows of `b`.
    pub inner: Range<usize>,
    /// Columns of `b`.
    pub columns: Range<usize>,
    /// First column of `c` that is written.
    pub target: usize,
}

/// What a layer's solve carries from block to block. Columns are in processing order.
#[derive(Clone, Debug)]
pub struct SolveState<T> {
    /// `[rows, in]`: `W − Ŵ` where a column has its code, `W` where it does not yet.
    pub residual: T,
    /// `[rows, in]`, GPTAQ: the weights that the cross term carries on, for columns that have their code.
    pub carried: Option<T>,
    /// `[rows, in]`, GPTAQ carrying rounded weights: `E·P_BB` with E = weight before rounding − weight after.
    pub shift: Option<T>,
    /// `[rows, span]`: `(W − Ŵ)·R̄` of the current span's columns, from the columns that have their code.
    pub error: T,
    /// `[rows, span]`, GPTAQ: the same of the cross term.
    pub cross: Option<T>,
}

/// What some tokens bring to a layer.
#[derive(Debug)]
pub struct LayerInputs<'a, T> {
    /// `[tokens, in]`: the inputs where every earlier layer is quantized.
    pub u: &'a T,
    /// `[tokens, in]`: the same tokens' inputs where nothing is.
    pub f: Option<&'a T>,
    /// `[tokens]`: importance factors, all 1 when absent.
    pub g: Option<&'a [f32]>,
}

/// One block of columns to quantize.
#[derive(Debug)]
pub struct ColumnBlock<'a, T> {
    /// The columns; at most [`BLOCK`] of them where `factor` is given.
    pub columns: Range<usize>,
    /// First column of the span that `error` and `cross` stand for.
    pub span: usize,
    /// Columns of a group; divides the block unless `grid` is given.
    pub group: usize,
    /// Scales and zeros `[rows, 1]` of the one group that the block lies in; absent where groups lie in the block and
    /// take their range from the weights current at their first column.
    pub grid: Option<&'a GroupGrid>,
    /// How ranges become grids.
    pub rule: GridRule,
    /// Absent for round-to-nearest.
    pub factor: Option<&'a Factor<T>>,
    /// The cross term of GPTAQ.
    pub cross: Option<&'a CrossFactor<T>>,
}

/// A group of columns whose grid is found before its blocks are quantized, because it is wider than one.
#[derive(Debug)]
pub struct Group<'a, T> {
    /// The columns.
    pub columns: Range<usize>,
    /// The blocks that make it up.
    pub blocks: &'a [Range<usize>],
    /// How its range becomes its grid.
    pub rule: GridRule,
    /// What corrections and losses are made of; may be absent where neither is asked for.
    pub factor: Option<&'a Factor<T>>,
    /// The cross term of GPTAQ.
    pub cross: Option<&'a CrossFactor<T>>,
    /// Whether the group is the current span, so that its weights are corrected by the state's `error` and `cross`;
    /// otherwise they are the state's own.
    pub is_span: bool,
}

/// Codes of one block of columns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockCodes {
    /// Codes, `[rows, block]`.
    pub codes: Vec<u8>,
    /// `[rows, block / group]`, or `[rows, 1]` repeating the given grid.
    pub grid: GroupGrid,
    /// `‖(W − Ŵ)·R‖²` of the block's columns; without a factor `‖W − Ŵ‖²`.
    pub error: f64,
}

/// What a block of columns brings to a layer's codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// Columns.
    pub columns: usize,
    /// Groups that begin in it; 1 where it lies in a group whose grid is given.
    pub groups: usize,
}

/// Weighted second-order statistics, factorization and blockwise error propagation on float32 tensors.
pub trait SolveOps: Device {
    /// The codes of a layer while its blocks are being quantized. They stay on the device until all are there, so that no
    /// block waits for the host.
    type Codes;

    /// Room for the codes of `rows` rows in `blocks`, in the order in which these will be quantized.
    fn room_for_codes(&self, rows: usize, blocks: &[BlockShape]) -> Result<Self::Codes>;

    /// The codes, block by block. Waits. Errors where a scale did not fit its storage type.
    fn take_codes(&self, codes: Self::Codes, rule: &GridRule) -> Result<Vec<BlockCodes>>;

    /// Columns of a weight `[rows, in]` of any storage in processing order, in float32; those of `dead` inputs (original
    /// indices) are zero.
    fn permute_columns(&self, weight: &Self::Tensor, order: &[u32], dead: &[usize]) -> Result<Self::Tensor>;

    /// `hessian += Uᵀ·diag(g²)·U` (upper triangle only) and `cross += (F − U)ᵀ·diag(g²)·U`, hessian and cross `[in, in]`. Tokens
    /// with g = 0 are not read. Sums are accurate enough for
    /// float32 to be within 1e-6 relative of the exact sum.
    fn accumulate_statistics(
        &self,
        hessian: &mut Self::Tensor,
        cross: Option<&mut Self::Tensor>,
        inputs: &LayerInputs<'_, Self::Tensor>,
    ) -> Result<()>;

    /// Diagonal of a square tensor.
    fn diagonal(&self, x: &Self::Tensor) -> Result<Vec<f32>>;

    /// A symmetric matrix, given by its upper triangle, in processing order (upper triangle).
    fn permute_symmetric(&self, x: &Self::Tensor, how: PermuteSymmetric<'_>) -> Result<Self::Tensor>;

    /// Rows and columns of a square matrix in processing order. Only the upper triangle of the result is read later.
    fn permute(&self, x: &Self::Tensor, order: &[u32]) -> Result<Self::Tensor>;

    /// Factors a positive definite matrix, given by its upper triangle, over consecutive `blocks` of columns, each at
    /// most [`BLOCK`] wide.
    fn factor(&self, h: Self::Tensor, blocks: &[Range<usize>]) -> Result<Factored<Self::Tensor>>;

    /// `M` and the blocks of `P` from the cross statistics in processing order (upper triangle).
    fn cross_factor(
        &self,
        c: Self::Tensor,
        factor: &Factor<Self::Tensor>,
        blocks: &[Range<usize>],
        alpha: f32,
    ) -> Result<CrossFactor<Self::Tensor>>;

    /// `c += a·b` on the columns and rows of `range`.
    fn add_product(&self, c: &mut Self::Tensor, a: &Self::Tensor, b: &Self::Tensor, range: &ProductRange)
    -> Result<()>;

    /// The squared Frobenius norm `‖x‖²_F`.
    fn squared_norm(&self, x: &Self::Tensor) -> Result<f64>;

    /// `‖x‖²_H = tr(x·H·xᵀ)`: x `[rows, in]`, `h` by its upper triangle.
    fn weighted_squared_norm(&self, x: &Self::Tensor, h: &Self::Tensor) -> Result<f64>;

    /// Scales and zeros `[rows, 1]` of `group`, from its weights as they are before its first column is quantized:
    /// `W + (error + cross)·R̄⁻¹` on the group where it is the current span. Errors where a scale does not fit its storage
    /// type.
    fn group_grid(&self, state: &SolveState<Self::Tensor>, group: &Group<'_, Self::Tensor>) -> Result<GroupGrid>;

    /// Quantizes the columns of a block one after the other (method section 3, steps 6 and 7), adds them to `codes` and
    /// updates `state`. A scale that does not fit its storage type is an error here or in
    /// [`take_codes`](Self::take_codes).
    fn quantize_block(
        &self,
        block: &ColumnBlock<'_, Self::Tensor>,
        state: &mut SolveState<Self::Tensor>,
        codes: &mut Self::Codes,
    ) -> Result<()>;
}
