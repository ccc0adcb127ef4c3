//! What running a model needs of a device: calibration forward and backward, evaluation.

use super::Device;
use super::cpu::vector;
use crate::tensor::{Float, Matrix, Stored, StoredMatrix};
use anyhow::{Result, ensure};
use std::ops::Range;

/// Heads of an attention module. Query head `h` reads key/value head `h / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Whether a query sees only keys up to its own place. The last query of a span stands at the span's last key, so
    /// a decoding step with one query and a filled key/value cache is the same operation.
    pub causal: bool,
}

/// One sequence among the packed rows: its query rows and its key/value rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Rows of the query tensor.
    pub q: Range<usize>,
    /// Rows of the key and value tensors.
    pub k: Range<usize>,
}

impl Span {
    /// A sequence that attends to itself.
    pub fn own(rows: Range<usize>) -> Self {
        Self { q: rows.clone(), k: rows }
    }
}

/// Elementwise nonlinearities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)` with the error function.
    Gelu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// `x · sigmoid(1.702 x)`.
    QuickGelu,
}

/// Cosines and sines of the rotary embedding, one row a token, `head_dim / 2` columns each.
#[derive(Clone, Debug)]
pub struct Rotary<T> {
    /// `[tokens, head_dim / 2]`.
    pub cos: T,
    /// `[tokens, head_dim / 2]`.
    pub sin: T,
}

/// A quantized weight `[rows, cols]`: value `[r, c]` is `scale · (code − zero)` of the column's group.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedWeight<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Codes, `[rows, cols]`.
    pub codes: &'a [u8],
    /// Scales, `[rows, groups]`.
    pub scales: &'a [f32],
    /// Zeros, `[rows, groups]`.
    pub zeros: &'a [u8],
    /// Group of each column; `None`: equal runs of columns.
    pub group_index: Option<&'a [u32]>,
}

impl QuantizedWeight<'_> {
    /// Writes the values of a row to `out`, `[cols]`. Panics where the row is not all there.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let groups = self.scales.len() / self.rows;
        let codes = &self.codes[row * self.cols..][..self.cols];
        let (scales, zeros) = (&self.scales[row * groups..][..groups], &self.zeros[row * groups..][..groups]);
        let Some(index) = self.group_index else {
            let width = (self.cols / groups.max(1)).max(1);
            for (group, (out, codes)) in out.chunks_mut(width).zip(codes.chunks(width)).enumerate() {
                vector::dispatch(|| write_group(out, codes, scales[group], zeros[group]));
            }
            return;
        };
        for ((out, &code), &group) in out.iter_mut().zip(codes).zip(index) {
            *out = scales[group as usize] * (f32::from(code) - f32::from(zeros[group as usize]));
        }
    }

    /// Groups of a row. Errors where the parts do not have the shapes they should.
    pub(crate) fn groups(&self) -> Result<usize> {
        let Self { rows, cols, .. } = *self;
        let groups = self.scales.len().checked_div(rows).unwrap_or(0);
        let runs = self.group_index.is_none() && groups > 0 && cols.is_multiple_of(groups);
        let index =
            self.group_index.is_some_and(|i| i.len() == cols && i.iter().all(|&group| (group as usize) < groups));
        ensure!(
            self.codes.len() == rows * cols
                && self.scales.len() == rows * groups
                && self.zeros.len() == self.scales.len()
                && (runs || index || self.codes.is_empty()),
            "{} codes, {} scales and {} zeros do not make a weight of {rows}x{cols}",
            self.codes.len(),
            self.scales.len(),
            self.zeros.len()
        );
        Ok(groups)
    }
}

/// Writes the values of codes that share a scale and a zero.
#[inline(always)]
fn write_group(out: &mut [f32], codes: &[u8], scale: f32, zero: u8) {
    let zero = f32::from(zero);
    out.iter_mut().zip(codes).for_each(|(out, &code)| *out = scale * (f32::from(code) - zero));
}

/// What attention is of.
#[derive(Debug)]
pub struct AttentionOperands<'a, T> {
    /// Queries, `[tq, heads · head_dim]`.
    pub q: &'a T,
    /// Keys, `[tk, kv_heads · head_dim]`.
    pub k: &'a T,
    /// Values, of the shape of the keys.
    pub v: &'a T,
    /// The queries and keys that see each other.
    pub spans: &'a [Span],
    /// Heads.
    pub shape: AttentionShape,
}

/// Forward and backward operations on activations `[tokens, channels]`.
pub trait ModelOps: Device {
    /// Copies a weight or an activation to the device, in the precision that the model runs in (the CPU: float32).
    /// Everything that meets activations comes this way; rotary tables and statistics stay float32
    /// ([`upload`](Device::upload)).
    fn upload_model(&self, matrix: Matrix) -> Result<Self::Tensor>;

    /// Copies numbers of a model to the device as they are stored: those of the model's own type are copied as they are. Waits no longer than
    /// until they may change.
    fn upload_stored(&self, stored: StoredMatrix<'_>) -> Result<Self::Tensor> {
        self.upload_model(stored.to_matrix())
    }

    /// [`upload_model`](Self::upload_model) of a matrix of this shape, which `make` computes, where the device keeps numbers at all.
    fn upload_model_with(&self, _shape: (usize, usize), make: impl FnOnce() -> Result<Matrix>) -> Result<Self::Tensor> {
        self.upload_model(make()?)
    }

    /// [`upload_stored`](Self::upload_stored) of a matrix of this shape, which `read` finds, where the device keeps numbers at all.
    fn upload_stored_with<S: Stored>(
        &self,
        _shape: (usize, usize),
        read: impl FnOnce() -> Result<S>,
    ) -> Result<Self::Tensor> {
        self.upload_stored(read()?.stored())
    }

    /// The values of a quantized weight, as [`upload_model`](Self::upload_model) would bring them.
    fn dequantize(&self, weight: &QuantizedWeight<'_>) -> Result<Self::Tensor>;

    /// That precision: what [`download`](Device::download) gives of an activation is exact in it.
    fn element_type(&self) -> Float;

    /// Bytes of a value in that precision.
    fn element_bytes(&self) -> usize {
        self.element_type().bytes()
    }

    /// Rows of `table` by index: `[indices, cols]`.
    fn gather_rows(&self, table: &Self::Tensor, indices: &[u32]) -> Result<Self::Tensor>;

    /// Overwrites the rows `indices` of `target` by the rows of `source`, in order.
    fn scatter_rows(&self, target: &mut Self::Tensor, indices: &[u32], source: &Self::Tensor) -> Result<()>;

    /// A copy of some consecutive rows.
    fn slice_rows(&self, x: &Self::Tensor, rows: Range<usize>) -> Result<Self::Tensor>;

    /// Appends the rows of `more` to `x` (the key/value cache).
    fn append_rows(&self, x: &mut Self::Tensor, more: &Self::Tensor) -> Result<()>;

    /// A tensor of the same values under another shape.
    fn reshape(&self, x: Self::Tensor, rows: usize, cols: usize) -> Result<Self::Tensor>;

    /// `x · weightᵀ + bias`: x `[t, in]`, weight `[out, in]`, bias `[1, out]` → `[t, out]`.
    fn linear(&self, x: &Self::Tensor, weight: &Self::Tensor, bias: Option<&Self::Tensor>) -> Result<Self::Tensor>;

    /// `a · b`: `[m, k] · [k, n]` (the backward of [`linear`](Self::linear): `dX = dY · weight`).
    fn matmul(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;

    /// `x += y`.
    fn add_assign(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;

    /// `factor · (a − b)`.
    fn scaled_difference(&self, a: &Self::Tensor, b: &Self::Tensor, factor: f32) -> Result<Self::Tensor>;

    /// `x / sqrt(mean(x²) + eps) · weight` per row; weight `[1, cols]`.
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Tensor, eps: f32) -> Result<Self::Tensor>;

    /// Gradient of [`rms_norm`](Self::rms_norm) for its input `x`, `d_out` being the output's (the weight gets none): with
    /// `r = 1 / sqrt(mean(x²) + eps)`, `r · (weight ∘ d_out − x · r² · mean(weight ∘ d_out ∘ x))` per row.
    fn rms_norm_backward(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        d_out: &Self::Tensor,
        eps: f32,
    ) -> Result<Self::Tensor>;

    /// `(x − mean) / sqrt(var + eps) · weight + bias` per row; weight and bias `[1, cols]`.
    fn layer_norm(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        bias: &Self::Tensor,
        eps: f32,
    ) -> Result<Self::Tensor>;

    /// Rotary embedding in place, halves rotated (NeoX style), on `[tokens, heads · head_dim]`. `transposed` applies
    /// the inverse rotation, which is the backward of the forward one.
    fn rotate(&self, x: &mut Self::Tensor, rotary: &Rotary<Self::Tensor>, transposed: bool) -> Result<()>;

    /// Softmax attention, scaled by `head_dim^-0.5`, each span on its own → `[tq, heads · head_dim]`.
    fn attention(&self, operands: &AttentionOperands<'_, Self::Tensor>) -> Result<Self::Tensor>;

    /// Gradients `(dq, dk, dv)` of [`attention`](Self::attention) for the output gradient `d_out`.
    fn attention_backward(
        &self,
        operands: &AttentionOperands<'_, Self::Tensor>,
        d_out: &Self::Tensor,
    ) -> Result<(Self::Tensor, Self::Tensor, Self::Tensor)>;

    /// The nonlinearity, elementwise.
    fn activate(&self, x: &Self::Tensor, activation: Activation) -> Result<Self::Tensor>;

    /// `activation(gate) ∘ up`.
    fn gated(&self, gate: &Self::Tensor, up: &Self::Tensor, activation: Activation) -> Result<Self::Tensor>;

    /// Mean over columns of the absolute values, one value a row (the importance factor, paper section 4): `[rows, 1]` in float32.
    fn mean_abs_rows(&self, x: &Self::Tensor) -> Result<Self::Tensor>;
}
