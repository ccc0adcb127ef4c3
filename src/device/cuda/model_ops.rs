//! Calibration forward and backward on the GPU.

use super::Cuda;
use super::bindings::{
    vlmq_activate_args, vlmq_activation, vlmq_attention_args, vlmq_attention_backward_args, vlmq_gather_rows_args,
    vlmq_mean_abs_rows_args, vlmq_norm_args, vlmq_norm_backward_args, vlmq_rotate_args,
};
use super::memory::Memory;
use super::tensor::{CudaTensor, dtype_of};
use crate::device::checks::{self, Header, OTHER_GRADIENT, alike, fits_rows, longest};
use crate::device::{Activation, AttentionOperands, AttentionShape, ModelOps, QuantizedWeight, Rotary};
use crate::tensor::{Float, Matrix, StoredMatrix};
use anyhow::{Context, Result, ensure};
use std::ops::Range;
use std::ptr;

/// Widest head that the attention kernels take.
const WIDEST_HEAD: usize = 256;

impl ModelOps for Cuda {
    fn upload_model(&self, matrix: Matrix) -> Result<CudaTensor> {
        self.tensor_of(&matrix, self.precision)
    }

    fn upload_stored(&self, stored: StoredMatrix<'_>) -> Result<CudaTensor> {
        if stored.float() != self.precision {
            return self.upload_model(stored.to_matrix());
        }
        let mut tensor = self.tensor(stored.rows(), stored.cols(), self.precision)?;
        // A GPU's hosts are little-endian, as files are.
        tensor.memory.write(0, stored.bytes())?;
        Ok(tensor)
    }

    fn element_type(&self) -> Float {
        self.precision
    }

    fn dequantize(&self, weight: &QuantizedWeight<'_>) -> Result<CudaTensor> {
        self.weight_of_codes(weight)
    }

    fn gather_rows(&self, table: &CudaTensor, indices: &[u32]) -> Result<CudaTensor> {
        checks::gathered(table, indices)?;
        let mut out = self.tensor(indices.len(), table.cols, table.precision)?;
        let indices = Memory::of(&self.runtime, indices)?;
        self.launch(&vlmq_gather_rows_args {
            table: self.read(table)?,
            indices: indices.at(0),
            rows: out.rows as i64,
            row_bytes: out.row_bytes() as i64,
            out: self.write(&mut out)?,
            scatter: 0,
        })?;
        Ok(out)
    }

    fn scatter_rows(&self, target: &mut CudaTensor, indices: &[u32], source: &CudaTensor) -> Result<()> {
        checks::scattered(&*target, indices, source)?;
        let indices = Memory::of(&self.runtime, indices)?;
        self.launch(&vlmq_gather_rows_args {
            table: self.read(source)?,
            indices: indices.at(0),
            out: self.write(target)?,
            rows: source.rows as i64,
            row_bytes: source.row_bytes() as i64,
            scatter: 1,
        })
    }

    fn slice_rows(&self, x: &CudaTensor, rows: Range<usize>) -> Result<CudaTensor> {
        checks::sliced(x, &rows)?;
        let mut out = self.tensor(rows.len(), x.cols, x.precision)?;
        let width = x.row_bytes();
        out.memory.copy_from(0, &x.memory, rows.start * width..rows.end * width)?;
        Ok(out)
    }

    fn append_rows(&self, x: &mut CudaTensor, more: &CudaTensor) -> Result<()> {
        checks::appended(&*x, more)?;
        let (old, added) = (x.bytes(), more.bytes());
        if old + added > x.memory.bytes() {
            // Twice the size: a cache that grows row by row is copied a few times, not each time.
            let mut larger = Memory::new(&self.runtime, 2 * (old + added))?;
            larger.copy_from(0, &x.memory, 0..old)?;
            x.memory = larger;
        }
        x.memory.copy_from(old, &more.memory, 0..added)?;
        x.rows += more.rows;
        Ok(())
    }

    fn reshape(&self, x: CudaTensor, rows: usize, cols: usize) -> Result<CudaTensor> {
        ensure!(x.rows * x.cols == rows * cols, "{} cannot form a {rows}x{cols} matrix", x.describe());
        Ok(CudaTensor { rows, cols, ..x })
    }

    fn linear(&self, x: &CudaTensor, weight: &CudaTensor, bias: Option<&CudaTensor>) -> Result<CudaTensor> {
        let mut y = self.tensor(x.rows, weight.rows, x.precision)?;
        let Some(bias) = bias else {
            self.product((x, 0), (weight, true), &mut y)?;
            return Ok(y);
        };
        checks::fits_outputs(bias, x, weight.rows)?;
        self.biased_product(x, weight, bias, &mut y)?;
        Ok(y)
    }

    fn matmul(&self, a: &CudaTensor, b: &CudaTensor) -> Result<CudaTensor> {
        let mut y = self.tensor(a.rows, b.cols, a.precision)?;
        self.product((a, 0), (b, false), &mut y)?;
        Ok(y)
    }

    fn add_assign(&self, x: &mut CudaTensor, y: &CudaTensor) -> Result<()> {
        alike(x, y)?;
        self.add(self.read(x)?, y, x, (1.0, 1.0))
    }

    fn scaled_difference(&self, a: &CudaTensor, b: &CudaTensor, factor: f32) -> Result<CudaTensor> {
        alike(a, b)?;
        let mut out = self.tensor(a.rows, a.cols, a.precision)?;
        self.add(self.read(a)?, b, &mut out, (-1.0, factor))?;
        Ok(out)
    }

    fn rms_norm(&self, x: &CudaTensor, weight: &CudaTensor, eps: f32) -> Result<CudaTensor> {
        self.norm(x, weight, None, eps)
    }

    fn rms_norm_backward(
        &self,
        x: &CudaTensor,
        weight: &CudaTensor,
        d_out: &CudaTensor,
        eps: f32,
    ) -> Result<CudaTensor> {
        alike(d_out, x).context(OTHER_GRADIENT)?;
        fits_rows(weight, x)?;
        let mut d_x = self.tensor(x.rows, x.cols, x.precision)?;
        self.launch(&vlmq_norm_backward_args {
            x: self.read(x)?,
            weight: self.read(weight)?,
            d_y: self.read(d_out)?,
            d_x: self.write(&mut d_x)?,
            rows: x.rows as i64,
            cols: x.cols as i64,
            eps,
            dtype: dtype_of(x.precision),
        })?;
        Ok(d_x)
    }

    fn layer_norm(&self, x: &CudaTensor, weight: &CudaTensor, bias: &CudaTensor, eps: f32) -> Result<CudaTensor> {
        self.norm(x, weight, Some(bias), eps)
    }

    fn rotate(&self, x: &mut CudaTensor, rotary: &Rotary<CudaTensor>, transposed: bool) -> Result<()> {
        let Rotary { cos, sin } = rotary;
        let half = cos.cols;
        checks::rotated(&*x, rotary)?;
        self.launch(&vlmq_rotate_args {
            x: self.write(x)?,
            cos: self.floats(cos)?,
            sin: self.floats(sin)?,
            tokens: x.rows as i64,
            heads: (x.cols / (2 * half)) as i64,
            head_dim: 2 * half as i64,
            transposed: transposed.into(),
            dtype: dtype_of(x.precision),
        })
    }

    fn attention(&self, operands: &AttentionOperands<'_, CudaTensor>) -> Result<CudaTensor> {
        let (job, q) = (Attention::new(self, operands)?, operands.q);
        let mut out = self.tensor(q.rows, q.cols, q.precision)?;
        self.launch(&vlmq_attention_args { out: self.write(&mut out)?, ..job.forward })?;
        Ok(out)
    }

    fn attention_backward(
        &self,
        operands: &AttentionOperands<'_, CudaTensor>,
        d_out: &CudaTensor,
    ) -> Result<(CudaTensor, CudaTensor, CudaTensor)> {
        let job = Attention::new(self, operands)?;
        let &AttentionOperands { q, k, v, spans, shape } = operands;
        checks::gradients(operands, d_out)?;
        // Kept from the forward pass they would cost a chunk's activations; computing them again costs two products of five.
        let mut out = self.tensor(q.rows, q.cols, q.precision)?;
        let mut log_sum = self.tensor(q.rows, shape.heads, Float::F32)?;
        let forward =
            vlmq_attention_args { out: self.write(&mut out)?, log_sum: self.floats_mut(&mut log_sum)?, ..job.forward };
        self.launch(&forward)?;
        let mut gradients = [
            self.tensor(q.rows, q.cols, q.precision)?,
            self.tensor(k.rows, k.cols, k.precision)?,
            self.tensor(v.rows, v.cols, v.precision)?,
        ];
        let [d_q, d_k, d_v] = &mut gradients;
        self.launch_with_workspace(vlmq_attention_backward_args {
            q: forward.q,
            k: forward.k,
            v: forward.v,
            out: forward.out,
            log_sum: forward.log_sum,
            d_out: self.read(d_out)?,
            d_q: self.write(d_q)?,
            d_k: self.write(d_k)?,
            d_v: self.write(d_v)?,
            spans: forward.spans,
            span_count: forward.span_count,
            longest_q: forward.longest_q,
            longest_k: longest(spans) as i64,
            q_rows: forward.q_rows,
            k_rows: forward.k_rows,
            heads: forward.heads,
            kv_heads: forward.kv_heads,
            head_dim: forward.head_dim,
            causal: forward.causal,
            dtype: forward.dtype,
            workspace: ptr::null_mut(),
            workspace_bytes: 0,
        })?;
        let [d_q, d_k, d_v] = gradients;
        Ok((d_q, d_k, d_v))
    }

    fn activate(&self, x: &CudaTensor, activation: Activation) -> Result<CudaTensor> {
        self.activated(x, None, activation)
    }

    fn gated(&self, gate: &CudaTensor, up: &CudaTensor, activation: Activation) -> Result<CudaTensor> {
        alike(gate, up)?;
        self.activated(gate, Some(up), activation)
    }

    fn mean_abs_rows(&self, x: &CudaTensor) -> Result<CudaTensor> {
        let mut means = self.tensor(x.rows, 1, Float::F32)?;
        self.launch(&vlmq_mean_abs_rows_args {
            x: self.read(x)?,
            means: self.floats_mut(&mut means)?,
            rows: x.rows as i64,
            cols: x.cols as i64,
            dtype: dtype_of(x.precision),
        })?;
        Ok(means)
    }
}

impl Cuda {
    fn norm(&self, x: &CudaTensor, weight: &CudaTensor, bias: Option<&CudaTensor>, eps: f32) -> Result<CudaTensor> {
        for part in [Some(weight), bias].into_iter().flatten() {
            fits_rows(part, x)?;
        }
        let mut y = self.tensor(x.rows, x.cols, x.precision)?;
        self.launch(&vlmq_norm_args {
            x: self.read(x)?,
            weight: self.read(weight)?,
            bias: bias.map_or(Ok(ptr::null()), |bias| self.read(bias))?,
            y: self.write(&mut y)?,
            rows: x.rows as i64,
            cols: x.cols as i64,
            eps,
            dtype: dtype_of(x.precision),
        })?;
        Ok(y)
    }

    fn activated(&self, x: &CudaTensor, up: Option<&CudaTensor>, activation: Activation) -> Result<CudaTensor> {
        let mut y = self.tensor(x.rows, x.cols, x.precision)?;
        self.launch(&vlmq_activate_args {
            x: self.read(x)?,
            up: up.map_or(Ok(ptr::null()), |up| self.read(up))?,
            y: self.write(&mut y)?,
            count: (x.rows * x.cols) as i64,
            activation: match activation {
                Activation::Silu => vlmq_activation::VLMQ_SILU,
                Activation::Gelu => vlmq_activation::VLMQ_GELU,
                Activation::GeluTanh => vlmq_activation::VLMQ_GELU_TANH,
                Activation::QuickGelu => vlmq_activation::VLMQ_QUICK_GELU,
            },
            dtype: dtype_of(x.precision),
        })?;
        Ok(y)
    }
}

/// Checked arguments of an attention call, outputs missing.
struct Attention {
    forward: vlmq_attention_args,
    /// What `forward.spans` points to.
    _spans: Memory,
}

impl Attention {
    fn new(device: &Cuda, operands: &AttentionOperands<'_, CudaTensor>) -> Result<Self> {
        let &AttentionOperands { q, k, v, spans, shape } = operands;
        let AttentionShape { heads, kv_heads, head_dim, causal } = shape;
        checks::heads(operands)?;
        ensure!(
            head_dim.is_multiple_of(2) && head_dim <= WIDEST_HEAD,
            "attention heads of {head_dim}: on a GPU they must be even and at most {WIDEST_HEAD} wide"
        );
        checks::spans(operands)?;
        let mut bounds = Vec::with_capacity(spans.len());
        for span in spans {
            let ends = [span.q.start, span.q.end, span.k.start, span.k.end];
            let mut bound = [0i32; 4];
            for (to, from) in bound.iter_mut().zip(ends) {
                *to = i32::try_from(from).context("more than 2^31 tokens at a time")?;
            }
            bounds.push(bound);
        }
        // vlmq_span is these four numbers.
        let spans_there = Memory::of(&device.runtime, bounds.as_flattened())?;
        let forward = vlmq_attention_args {
            q: device.read(q)?,
            k: device.read(k)?,
            v: device.read(v)?,
            out: ptr::null_mut(),
            log_sum: ptr::null_mut(),
            spans: spans_there.at(0),
            span_count: spans.len() as i64,
            longest_q: spans.iter().map(|span| span.q.len()).max().unwrap_or(0) as i64,
            q_rows: q.rows as i64,
            k_rows: k.rows as i64,
            heads: heads as i64,
            kv_heads: kv_heads as i64,
            head_dim: head_dim as i64,
            causal: causal.into(),
            dtype: dtype_of(q.precision),
        };
        Ok(Self { forward, _spans: spans_there })
    }
}
