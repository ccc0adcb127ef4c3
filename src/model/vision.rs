//! Parts that vision towers are made of.

use super::decoder::Linear;
use super::source::Source;
use crate::device::{Activation, AttentionOperands, AttentionShape, ModelOps, Rotary, Span};
use anyhow::Result;

/// Epsilon of every norm in the vision towers.
const NORM_EPS: f32 = 1e-6;

/// Sizes of a tower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TowerSizes {
    /// Width of the stream.
    pub width: usize,
    /// Heads of the attention.
    pub heads: usize,
    /// Width inside the MLP.
    pub inner: usize,
    /// Blocks.
    pub depth: usize,
}

/// A norm of rows, weight and bias `[1, width]`.
pub enum Norm<T> {
    /// Mean taken off, with a bias.
    Layer {
        /// The weight, `[1, width]`.
        weight: T,
        /// The bias, `[1, width]`.
        bias: T,
    },
    /// Root mean square.
    Rms {
        /// The weight, `[1, width]`.
        weight: T,
    },
}

impl<T> Norm<T> {
    /// Reads `module.weight` and `module.bias`.
    pub fn layer<S: Source<Tensor = T>>(source: &S, module: &str, width: usize) -> Result<Self> {
        let part = |part: &str| source.vector(&format!("{module}.{part}"), width);
        Ok(Self::Layer { weight: part("weight")?, bias: part("bias")? })
    }

    /// The norm whose weight is `module.weight`.
    pub fn rms<S: Source<Tensor = T>>(source: &S, module: &str, width: usize) -> Result<Self> {
        Ok(Self::Rms { weight: source.vector(&format!("{module}.weight"), width)? })
    }

    /// Normalises every row.
    pub fn apply<D: ModelOps<Tensor = T>>(&self, device: &D, x: &T) -> Result<T> {
        match self {
            Self::Layer { weight, bias } => device.layer_norm(x, weight, bias, NORM_EPS),
            Self::Rms { weight } => device.rms_norm(x, weight, NORM_EPS),
        }
    }
}

/// A feed-forward network; every layer has a bias.
pub enum Mlp<T> {
    /// Two linear layers with a nonlinearity between them.
    Plain {
        /// Layer to the inner width.
        first: Linear<T>,
        /// Layer back from the inner width.
        second: Linear<T>,
        /// Nonlinearity between the layers.
        activation: Activation,
    },
    /// `down(activation(gate(x)) ∘ up(x))`.
    Gated {
        /// Layer to the inner width, through the nonlinearity.
        gate: Linear<T>,
        /// Layer to the inner width, which the gate multiplies.
        up: Linear<T>,
        /// Layer back from the inner width.
        down: Linear<T>,
        /// Nonlinearity of the gate.
        activation: Activation,
    },
}

impl<T> Mlp<T> {
    /// Reads two layers with a nonlinearity between them. `widths` are input, inner and output width.
    pub fn plain<S: Source<Tensor = T>>(
        source: &S,
        (first, second): (&str, &str),
        widths: [usize; 3],
        activation: Activation,
    ) -> Result<Self> {
        let first = Linear::load(source, first, (widths[1], widths[0]), true)?;
        let second = Linear::load(source, second, (widths[2], widths[1]), true)?;
        Ok(Self::Plain { first, second, activation })
    }

    /// Reads `module.gate_proj`, `module.up_proj` and `module.down_proj`. `widths` are input (and output) and inner width.
    pub fn gated<S: Source<Tensor = T>>(
        source: &S,
        module: &str,
        (width, inner): (usize, usize),
        activation: Activation,
    ) -> Result<Self> {
        let part = |part: &str, shape| Linear::load(source, &format!("{module}.{part}"), shape, true);
        Ok(Self::Gated {
            gate: part("gate_proj", (inner, width))?,
            up: part("up_proj", (inner, width))?,
            down: part("down_proj", (width, inner))?,
            activation,
        })
    }

    /// Applies the layers to every row. What is not needed any more is given back at once: an image's patches are many.
    pub fn apply<D: ModelOps<Tensor = T>>(&self, device: &D, x: T) -> Result<T> {
        match self {
            Self::Plain { first, second, activation } => {
                let inner = first.apply(device, &x)?;
                drop(x);
                let active = device.activate(&inner, *activation)?;
                drop(inner);
                second.apply(device, &active)
            }
            Self::Gated { gate, up, down, activation } => {
                let (gate, up) = (gate.apply(device, &x)?, up.apply(device, &x)?);
                drop(x);
                let inner = device.gated(&gate, &up, *activation)?;
                drop((gate, up));
                down.apply(device, &inner)
            }
        }
    }
}

/// Bidirectional attention.
pub struct Attention<T> {
    qkv: [Linear<T>; 3],
    output: Linear<T>,
    shape: AttentionShape,
}

impl<T> Attention<T> {
    /// Reads `module.qkv` (`[3 · width, width]`, queries first, then keys, then values) and `module.proj`.
    pub fn fused<S: Source<Tensor = T>>(source: &S, module: &str, width: usize, heads: usize) -> Result<Self> {
        let weight = source.linear(&format!("{module}.qkv"), (3 * width, width))?;
        let part = |i: usize| -> Result<Linear<T>> {
            let rows = i * width..(i + 1) * width;
            let bias = source.part_of_vector(&format!("{module}.qkv.bias"), 3 * width, rows.clone())?;
            Ok(Linear { weight: source.rows(&weight, rows)?, bias: Some(bias) })
        };
        let qkv = [part(0)?, part(1)?, part(2)?];
        let output = Linear::load(source, &format!("{module}.proj"), (width, width), true)?;
        Ok(Self { qkv, output, shape: bidirectional(width, heads) })
    }

    /// Reads `module.q_proj`, `module.k_proj`, `module.v_proj` and `module.out_proj`, all `[width, width]`.
    pub fn separate<S: Source<Tensor = T>>(source: &S, module: &str, width: usize, heads: usize) -> Result<Self> {
        let part = |part: &str| Linear::load(source, &format!("{module}.{part}"), (width, width), true);
        let qkv = [part("q_proj")?, part("k_proj")?, part("v_proj")?];
        Ok(Self { qkv, output: part("out_proj")?, shape: bidirectional(width, heads) })
    }

    /// Attention inside each span, with rotary positions where the tower has them.
    pub fn apply<D: ModelOps<Tensor = T>>(
        &self,
        device: &D,
        x: T,
        rotary: Option<&Rotary<T>>,
        spans: &[Span],
    ) -> Result<T> {
        let mut q = self.qkv[0].apply(device, &x)?;
        let mut k = self.qkv[1].apply(device, &x)?;
        let v = self.qkv[2].apply(device, &x)?;
        drop(x);
        if let Some(rotary) = rotary {
            device.rotate(&mut q, rotary, false)?;
            device.rotate(&mut k, rotary, false)?;
        }
        let mixed = device.attention(&AttentionOperands { q: &q, k: &k, v: &v, spans, shape: self.shape })?;
        drop((q, k, v));
        self.output.apply(device, &mixed)
    }
}

fn bidirectional(width: usize, heads: usize) -> AttentionShape {
    AttentionShape { heads, kv_heads: heads, head_dim: width / heads, causal: false }
}

/// A pre-norm transformer block.
pub struct TowerBlock<T> {
    /// Norm before the attention.
    pub attention_norm: Norm<T>,
    /// Attention, which mixes tokens.
    pub attention: Attention<T>,
    /// Norm before the MLP.
    pub mlp_norm: Norm<T>,
    /// MLP, which mixes channels.
    pub mlp: Mlp<T>,
}

impl<T> TowerBlock<T> {
    /// Adds the attention's output to `x`, then the MLP's.
    pub fn apply<D: ModelOps<Tensor = T>>(
        &self,
        device: &D,
        x: &mut T,
        rotary: Option<&Rotary<T>>,
        spans: &[Span],
    ) -> Result<()> {
        let normed = self.attention_norm.apply(device, x)?;
        device.add_assign(x, &self.attention.apply(device, normed, rotary, spans)?)?;
        let normed = self.mlp_norm.apply(device, x)?;
        device.add_assign(x, &self.mlp.apply(device, normed)?)
    }
}
