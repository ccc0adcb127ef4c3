//! Parts that vision towers are made of.

use super::decoder::Linear;
use crate::checkpoint::Checkpoint;
use crate::device::{Activation, AttentionShape, ModelOps, Rotary, Span};
use anyhow::Result;

/// A layer norm: weight and bias `[1, width]`.
pub struct LayerNorm<T> {
    weight: T,
    bias: T,
}

impl<T> LayerNorm<T> {
    /// Epsilon of every layer norm in the vision towers.
    const EPS: f32 = 1e-6;

    /// Reads `module.weight` and `module.bias`.
    pub fn load<D: ModelOps<Tensor = T>>(
        device: &D,
        checkpoint: &Checkpoint,
        module: &str,
        width: usize,
    ) -> Result<Self> {
        let part = |part: &str| device.upload_model(checkpoint.vector(&format!("{module}.{part}"), width)?);
        Ok(Self { weight: part("weight")?, bias: part("bias")? })
    }

    /// Normalises every row.
    pub fn apply<D: ModelOps<Tensor = T>>(&self, device: &D, x: &T) -> Result<T> {
        device.layer_norm(x, &self.weight, &self.bias, Self::EPS)
    }
}

/// Two linear layers with a nonlinearity between them.
pub struct Mlp<T> {
    first: Linear<T>,
    second: Linear<T>,
    activation: Activation,
}

impl<T> Mlp<T> {
    /// Reads both layers, biases included. `widths` are input, inner and output width.
    pub fn load<D: ModelOps<Tensor = T>>(
        device: &D,
        checkpoint: &Checkpoint,
        (first, second): (&str, &str),
        widths: [usize; 3],
        activation: Activation,
    ) -> Result<Self> {
        let first = Linear::load(device, checkpoint, first, (widths[1], widths[0]), true)?;
        let second = Linear::load(device, checkpoint, second, (widths[2], widths[1]), true)?;
        Ok(Self { first, second, activation })
    }

    /// Applies the two layers.
    pub fn apply<D: ModelOps<Tensor = T>>(&self, device: &D, x: &T) -> Result<T> {
        let inner = device.activate(&self.first.apply(device, x)?, self.activation)?;
        self.second.apply(device, &inner)
    }
}

/// Bidirectional attention over fused query, key and value weights.
pub struct FusedAttention<T> {
    qkv: [Linear<T>; 3],
    output: Linear<T>,
    shape: AttentionShape,
}

impl<T> FusedAttention<T> {
    /// Reads `module.qkv` (`[3 · width, width]`, queries first, then keys, then values) and `module.proj`.
    pub fn load<D: ModelOps<Tensor = T>>(
        device: &D,
        checkpoint: &Checkpoint,
        module: &str,
        width: usize,
        heads: usize,
    ) -> Result<Self> {
        let weight = checkpoint.linear(&format!("{module}.qkv"), 3 * width, width)?;
        let weight = device.upload_model(weight)?;
        let bias = device
            .upload_model(checkpoint.vector(&format!("{module}.qkv.bias"), 3 * width)?.reshaped(3 * width, 1)?)?;
        let part = |i: usize| -> Result<Linear<T>> {
            let rows = i * width..(i + 1) * width;
            let bias = device.reshape(device.slice_rows(&bias, rows.clone())?, 1, width)?;
            Ok(Linear { weight: device.slice_rows(&weight, rows)?, bias: Some(bias) })
        };
        let qkv = [part(0)?, part(1)?, part(2)?];
        let output = Linear::load(device, checkpoint, &format!("{module}.proj"), (width, width), true)?;
        let shape = AttentionShape { heads, kv_heads: heads, head_dim: width / heads, causal: false };
        Ok(Self { qkv, output, shape })
    }

    /// Attention inside each span.
    pub fn apply<D: ModelOps<Tensor = T>>(&self, device: &D, x: &T, rotary: &Rotary<T>, spans: &[Span]) -> Result<T> {
        let mut q = self.qkv[0].apply(device, x)?;
        let mut k = self.qkv[1].apply(device, x)?;
        let v = self.qkv[2].apply(device, x)?;
        device.rotate(&mut q, rotary, false)?;
        device.rotate(&mut k, rotary, false)?;
        self.output.apply(device, &device.attention(&q, &k, &v, spans, self.shape)?)
    }
}
