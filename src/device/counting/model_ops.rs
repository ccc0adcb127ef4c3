//! Calibration forward and backward, counted.

use super::device::Counting;
use super::tensor::CountedTensor;
use crate::device::checks::{self, Header, OTHER_GRADIENT, alike, fits_rows, longest};
use crate::device::work::ByKind;
use crate::device::{Activation, AttentionOperands, ModelOps, QuantizedWeight, Rotary, Span, Work};
use crate::tensor::{Float, Matrix, Stored, StoredMatrix};
use anyhow::{Context, Result, ensure};
use std::ops::Range;

/// Values that a nonlinearity counts as.
const NONLINEAR: f64 = 3.0;

/// Most rows of a product that takes as long as its weights need to be read.
const FEW_ROWS: usize = 16;

/// Work of a backward pass through attention, by that of the forward pass: five products instead of two.
const BACKWARD: f64 = 2.5;

impl ModelOps for Counting {
    fn upload_model(&self, matrix: Matrix) -> Result<CountedTensor> {
        self.passes_host((matrix.rows(), matrix.cols()), self.element);
        self.tensor(matrix.rows(), matrix.cols(), self.element)
    }

    fn upload_model_with(
        &self,
        (rows, cols): (usize, usize),
        make: impl FnOnce() -> Result<Matrix>,
    ) -> Result<CountedTensor> {
        self.meanwhile(make)?;
        self.passes_host((rows, cols), self.element);
        self.tensor(rows, cols, self.element)
    }

    fn upload_stored(&self, stored: StoredMatrix<'_>) -> Result<CountedTensor> {
        let made = self.tensor(stored.rows(), stored.cols(), self.element)?;
        self.comes_from_file((stored.rows(), stored.cols()));
        self.values(made.count());
        Ok(made)
    }

    fn upload_stored_with<S: Stored>(
        &self,
        (rows, cols): (usize, usize),
        read: impl FnOnce() -> Result<S>,
    ) -> Result<CountedTensor> {
        self.meanwhile(read)?;
        self.comes_from_file((rows, cols));
        let made = self.tensor(rows, cols, self.element)?;
        self.values(made.count());
        Ok(made)
    }

    fn dequantize(&self, weight: &QuantizedWeight<'_>) -> Result<CountedTensor> {
        weight.groups()?;
        let made = self.tensor(weight.rows, weight.cols, self.element)?;
        match self.host {
            true => self.ledger.drop_codes(weight.codes.len() as u64),
            // A GPU takes the codes first.
            false => self.takes(None, weight.codes.len() + 5 * weight.scales.len()),
        }
        self.values(made.count());
        Ok(made)
    }

    fn element_type(&self) -> Float {
        self.element
    }

    fn gather_rows(&self, table: &CountedTensor, indices: &[u32]) -> Result<CountedTensor> {
        self.check([table])?;
        checks::gathered(table, indices)?;
        let made = self.tensor(indices.len(), table.cols, table.float)?;
        self.takes(None, size_of_val(indices));
        self.values(made.count());
        Ok(made)
    }

    fn scatter_rows(&self, target: &mut CountedTensor, indices: &[u32], source: &CountedTensor) -> Result<()> {
        self.check([&*target, source])?;
        checks::scattered(&*target, indices, source)?;
        self.takes(None, size_of_val(indices));
        self.values(source.count());
        Ok(())
    }

    fn slice_rows(&self, x: &CountedTensor, rows: Range<usize>) -> Result<CountedTensor> {
        self.check([x])?;
        checks::sliced(x, &rows)?;
        let made = self.tensor(rows.len(), x.cols, x.float)?;
        self.values(made.count());
        Ok(made)
    }

    fn append_rows(&self, x: &mut CountedTensor, more: &CountedTensor) -> Result<()> {
        self.check([&*x, more])?;
        checks::appended(&*x, more)?;
        self.values(more.count());
        let host = self.host;
        // As the devices do: the CPU takes room for some more, a GPU for as many again.
        x.append(more.rows, |before, needed| if host { needed.max(before + before / 8) } else { 2 * needed })
    }

    fn reshape(&self, x: CountedTensor, rows: usize, cols: usize) -> Result<CountedTensor> {
        ensure!(Some(x.rows * x.cols) == rows.checked_mul(cols), "{} cannot form a {rows}x{cols} matrix", x.describe());
        let mut x = x;
        (x.rows, x.cols) = (rows, cols);
        Ok(x)
    }

    fn linear(&self, x: &CountedTensor, weight: &CountedTensor, bias: Option<&CountedTensor>) -> Result<CountedTensor> {
        self.check([x, weight].into_iter().chain(bias))?;
        self.operands(x, weight, x.cols == weight.cols)?;
        let made = self.tensor(x.rows, weight.rows, x.float)?;
        let product = Work::Linear { inner: x.cols, outputs: weight.rows };
        self.takes(Some(product), 0);
        if let Some(bias) = bias {
            checks::fits_outputs(bias, x, weight.rows)?;
            self.takes(Some(Work::Bias { rows: x.rows, outputs: weight.rows }), 0);
        }
        self.product(&made, x.cols);
        if x.rows <= FEW_ROWS {
            self.values(weight.count());
        }
        Ok(made)
    }

    fn matmul(&self, a: &CountedTensor, b: &CountedTensor) -> Result<CountedTensor> {
        self.check([a, b])?;
        self.operands(a, b, a.cols == b.rows)?;
        let made = self.tensor(a.rows, b.cols, a.float)?;
        self.takes(Some(Work::Linear { inner: a.cols, outputs: b.cols }), 0);
        self.product(&made, a.cols);
        Ok(made)
    }

    fn add_assign(&self, x: &mut CountedTensor, y: &CountedTensor) -> Result<()> {
        self.alike(x, y)?;
        self.values(x.count());
        Ok(())
    }

    fn scaled_difference(&self, a: &CountedTensor, b: &CountedTensor, _factor: f32) -> Result<CountedTensor> {
        self.alike(a, b)?;
        self.values(a.count());
        self.like(a)
    }

    fn rms_norm(&self, x: &CountedTensor, weight: &CountedTensor, _eps: f32) -> Result<CountedTensor> {
        self.norm(x, [weight])
    }

    fn rms_norm_backward(
        &self,
        x: &CountedTensor,
        weight: &CountedTensor,
        d_out: &CountedTensor,
        _eps: f32,
    ) -> Result<CountedTensor> {
        self.alike(d_out, x).context(OTHER_GRADIENT)?;
        self.norm(x, [weight])
    }

    fn layer_norm(
        &self,
        x: &CountedTensor,
        weight: &CountedTensor,
        bias: &CountedTensor,
        _eps: f32,
    ) -> Result<CountedTensor> {
        self.norm(x, [weight, bias])
    }

    fn rotate(&self, x: &mut CountedTensor, rotary: &Rotary<CountedTensor>, _transposed: bool) -> Result<()> {
        let Rotary { cos, sin } = rotary;
        self.check([&*x, cos, sin])?;
        checks::rotated(&*x, rotary)?;
        ensure!([cos.float, sin.float] == [Float::F32; 2], "rotary tables {} where float32 is needed", cos.describe());
        self.values(x.count());
        Ok(())
    }

    fn attention(&self, operands: &AttentionOperands<'_, CountedTensor>) -> Result<CountedTensor> {
        let &AttentionOperands { q, spans, shape, .. } = operands;
        let attention = self.attended(operands)?;
        let made = self.like(q)?;
        let (tokens, longest) = (q.rows, longest(spans));
        self.takes(Some(Work::Attention { tokens, longest, shape }), size_of_val(spans));
        self.ledger.work(ByKind { attention, values: made.count(), ..ByKind::default() });
        Ok(made)
    }

    fn attention_backward(
        &self,
        operands: &AttentionOperands<'_, CountedTensor>,
        d_out: &CountedTensor,
    ) -> Result<(CountedTensor, CountedTensor, CountedTensor)> {
        let &AttentionOperands { q, k, v, spans, shape } = operands;
        let forward = self.attended(operands)?;
        self.check([d_out])?;
        checks::gradients(operands, d_out)?;
        let made = (self.like(q)?, self.like(k)?, self.like(v)?);
        let (tokens, longest) = (q.rows, longest(spans));
        self.takes(Some(Work::AttentionBackward { tokens, longest, shape }), size_of_val(spans));
        let values = made.0.count() + made.1.count() + made.2.count();
        self.ledger.work(ByKind { attention: BACKWARD * forward, values, ..ByKind::default() });
        Ok(made)
    }

    fn activate(&self, x: &CountedTensor, _activation: Activation) -> Result<CountedTensor> {
        self.check([x])?;
        self.values(NONLINEAR * x.count());
        self.like(x)
    }

    fn gated(&self, gate: &CountedTensor, up: &CountedTensor, _activation: Activation) -> Result<CountedTensor> {
        self.alike(gate, up)?;
        self.values(NONLINEAR * gate.count());
        self.like(gate)
    }

    fn mean_abs_rows(&self, x: &CountedTensor) -> Result<CountedTensor> {
        self.check([x])?;
        let made = self.tensor(x.rows, 1, Float::F32)?;
        self.values(x.count());
        Ok(made)
    }
}

impl Counting {
    /// The work of a product of this result.
    fn product(&self, made: &CountedTensor, inner: usize) {
        let products = 2.0 * made.count() * inner as f64;
        self.ledger.work(ByKind { products, values: made.count(), ..ByKind::default() });
    }

    fn operands(&self, a: &CountedTensor, b: &CountedTensor, fit: bool) -> Result<()> {
        ensure!(fit && a.float == b.float, "product of {} and {}", a.describe(), b.describe());
        Ok(())
    }

    fn norm<const N: usize>(&self, x: &CountedTensor, parts: [&CountedTensor; N]) -> Result<CountedTensor> {
        self.check([x].into_iter().chain(parts))?;
        parts.into_iter().try_for_each(|part| fits_rows(part, x))?;
        self.values(x.count());
        self.like(x)
    }

    fn alike(&self, a: &CountedTensor, b: &CountedTensor) -> Result<()> {
        self.check([a, b])?;
        alike(a, b)
    }

    /// Floating-point operations of attention; scores that are masked are left out.
    fn attended(&self, operands: &AttentionOperands<'_, CountedTensor>) -> Result<f64> {
        let &AttentionOperands { q, k, v, spans, shape } = operands;
        self.check([q, k, v])?;
        checks::heads(operands)?;
        checks::spans(operands)?;
        let scores = |span: &Span| {
            let (queries, keys) = (span.q.len() as f64, span.k.len() as f64);
            queries * if shape.causal { keys - (queries - 1.0).max(0.0) / 2.0 } else { keys }
        };
        Ok(4.0 * spans.iter().map(scores).sum::<f64>() * q.cols as f64)
    }
}
