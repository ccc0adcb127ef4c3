//! The decoder, block by block: pre-norm attention with rotary positions, then a gated MLP.
//!
//! The steps of a block are separate functions because calibration stops between them: the inputs of {q, k, v}, {o},
//! {gate, up} and {down} are what the statistics are made of.

use super::config::{DecoderConfig, DecoderNames};
use super::source::Source;
use crate::device::{AttentionOperands, ModelOps, Rotary, Span};
use anyhow::Result;

/// The linear layers of a decoder block, in the order in which they are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Projection {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Output of the attention module.
    O,
    /// Gate of the MLP.
    Gate,
    /// The MLP's other input projection.
    Up,
    /// Output of the MLP.
    Down,
}

impl Projection {
    /// All seven projections.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Name of the module inside its block.
    pub fn module(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// `(out, in)` features.
    pub fn shape(self, config: &DecoderConfig) -> (usize, usize) {
        let queries = config.attention.heads * config.attention.head_dim;
        let keys = config.attention.kv_heads * config.attention.head_dim;
        match self {
            Self::Q => (queries, config.hidden),
            Self::K | Self::V => (keys, config.hidden),
            Self::O => (config.hidden, queries),
            Self::Gate | Self::Up => (config.intermediate, config.hidden),
            Self::Down => (config.hidden, config.intermediate),
        }
    }

    fn has_bias(self, config: &DecoderConfig) -> bool {
        matches!(self, Self::Q | Self::K | Self::V) && config.qkv_bias
    }
}

/// On-disk name of a linear layer's module, without `.weight`.
pub fn module_name(names: &DecoderNames, block: usize, projection: Projection) -> String {
    format!("{}layers.{block}.{}", names.prefix, projection.module())
}

/// A linear layer: weight `[out, in]`, bias `[1, out]`.
pub struct Linear<T> {
    /// The weight, `[out, in]`.
    pub weight: T,
    /// The bias, `[1, out]`.
    pub bias: Option<T>,
}

impl<T> Linear<T> {
    /// Reads `module.weight` (plain or quantized) and, if asked for, `module.bias`.
    pub fn load<S: Source<Tensor = T>>(source: &S, module: &str, shape: (usize, usize), bias: bool) -> Result<Self> {
        let weight = source.linear(module, shape)?;
        let bias = bias.then(|| source.vector(&format!("{module}.bias"), shape.0)).transpose()?;
        Ok(Self { weight, bias })
    }

    /// `x · weightᵀ + bias`.
    pub fn apply<D: ModelOps<Tensor = T>>(&self, device: &D, x: &T) -> Result<T> {
        device.linear(x, &self.weight, self.bias.as_ref())
    }
}

/// What goes with some packed tokens through the decoder: rotary tables, sequence bounds, image features for later blocks.
pub struct Layout<T> {
    /// One row a token.
    pub rotary: Rotary<T>,
    /// One span a sequence.
    pub spans: Vec<Span>,
    /// For families that have it, where there are images.
    pub deepstack: Option<DeepStack<T>>,
}

/// Image features that are added behind the first blocks (arXiv 2406.04334).
pub struct DeepStack<T> {
    /// Rows of the image tokens, in the order of their features.
    pub rows: Vec<u32>,
    /// Features for block 0, 1, …: `[image tokens, hidden]` each.
    pub levels: Vec<T>,
}

impl<T> Layout<T> {
    /// Adds what belongs behind block `index` to the residual stream, on whichever path it is.
    pub fn add_deepstack<D: ModelOps<Tensor = T>>(&self, device: &D, x: &mut T, index: usize) -> Result<()> {
        let Some(DeepStack { rows, levels }) = &self.deepstack else { return Ok(()) };
        let Some(level) = levels.get(index) else { return Ok(()) };
        let mut sum = device.gather_rows(x, rows)?;
        device.add_assign(&mut sum, level)?;
        device.scatter_rows(x, rows, &sum)
    }
}

/// Queries, keys (both rotated) and values of some tokens.
pub struct Attended<T> {
    /// `[tokens, heads · head_dim]`.
    pub q: T,
    /// `[tokens, kv_heads · head_dim]`.
    pub k: T,
    /// `[tokens, kv_heads · head_dim]`.
    pub v: T,
}

/// RMS norm of every head's queries or keys.
struct HeadNorm<T> {
    /// The weight, `[1, head_dim]`.
    weight: T,
    eps: f32,
}

impl<T> HeadNorm<T> {
    /// `[tokens, heads · head_dim]` with one head a row.
    fn split<D: ModelOps<Tensor = T>>(&self, device: &D, x: T) -> Result<T> {
        let (_, head_dim) = device.shape(&self.weight);
        let (tokens, width) = device.shape(&x);
        device.reshape(x, tokens * width / head_dim, head_dim)
    }

    fn apply<D: ModelOps<Tensor = T>>(&self, device: &D, x: T) -> Result<T> {
        let (tokens, width) = device.shape(&x);
        let normed = device.rms_norm(&self.split(device, x)?, &self.weight, self.eps)?;
        device.reshape(normed, tokens, width)
    }

    /// Gradient for the input `x` from the output's.
    fn backward<D: ModelOps<Tensor = T>>(&self, device: &D, x: T, d_out: T) -> Result<T> {
        let (tokens, width) = device.shape(&x);
        let (x, d_out) = (self.split(device, x)?, self.split(device, d_out)?);
        let d_x = device.rms_norm_backward(&x, &self.weight, &d_out, self.eps)?;
        device.reshape(d_x, tokens, width)
    }
}

/// The weights of one decoder block.
pub struct Block<T> {
    input_norm: T,
    /// Norms of queries and of keys, where the family has them.
    head_norms: Option<[HeadNorm<T>; 2]>,
    post_norm: T,
    linears: Vec<Linear<T>>,
}

impl<T> Block<T> {
    /// Reads block `index`.
    pub fn load<S: Source<Tensor = T>>(
        source: &S,
        config: &DecoderConfig,
        names: &DecoderNames,
        index: usize,
    ) -> Result<Self> {
        let norm =
            |name: &str, width: usize| source.vector(&format!("{}layers.{index}.{name}.weight", names.prefix), width);
        let head_norm = |name: &str| -> Result<HeadNorm<T>> {
            Ok(HeadNorm { weight: norm(name, config.attention.head_dim)?, eps: config.norm_eps })
        };
        let head_norms = match config.qk_norm {
            true => Some([head_norm("self_attn.q_norm")?, head_norm("self_attn.k_norm")?]),
            false => None,
        };
        let linears = Projection::ALL
            .iter()
            .map(|&projection| {
                let module = module_name(names, index, projection);
                let bias = projection.has_bias(config);
                Linear::load(source, &module, projection.shape(config), bias)
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            input_norm: norm("input_layernorm", config.hidden)?,
            head_norms,
            post_norm: norm("post_attention_layernorm", config.hidden)?,
            linears,
        })
    }

    /// A copy on the device.
    pub fn duplicate<D: ModelOps<Tensor = T>>(&self, device: &D) -> Result<Self> {
        let copy = |tensor: &T| device.slice_rows(tensor, 0..device.shape(tensor).0);
        let linear = |linear: &Linear<T>| -> Result<Linear<T>> {
            Ok(Linear { weight: copy(&linear.weight)?, bias: linear.bias.as_ref().map(copy).transpose()? })
        };
        let head_norm =
            |norm: &HeadNorm<T>| -> Result<HeadNorm<T>> { Ok(HeadNorm { weight: copy(&norm.weight)?, eps: norm.eps }) };
        let head_norms = match &self.head_norms {
            Some([q, k]) => Some([head_norm(q)?, head_norm(k)?]),
            None => None,
        };
        Ok(Self {
            input_norm: copy(&self.input_norm)?,
            head_norms,
            post_norm: copy(&self.post_norm)?,
            linears: self.linears.iter().map(linear).collect::<Result<_>>()?,
        })
    }

    /// One of the block's linear layers.
    pub fn linear(&self, projection: Projection) -> &Linear<T> {
        &self.linears[projection as usize]
    }

    /// Replaces the weight of one linear layer, as the quantized path does.
    pub fn set_weight(&mut self, projection: Projection, weight: T) {
        self.linears[projection as usize].weight = weight;
    }

    /// Input of q, k and v: the normalised residual stream.
    pub fn attention_input<D: ModelOps<Tensor = T>>(&self, device: &D, config: &DecoderConfig, x: &T) -> Result<T> {
        device.rms_norm(x, &self.input_norm, config.norm_eps)
    }

    /// Rotated queries and keys, normalised by head before it where the family does so, and values, of normalised inputs.
    pub fn attended<D: ModelOps<Tensor = T>>(&self, device: &D, input: &T, rotary: &Rotary<T>) -> Result<Attended<T>> {
        let mut q = self.linear(Projection::Q).apply(device, input)?;
        let mut k = self.linear(Projection::K).apply(device, input)?;
        if let Some([q_norm, k_norm]) = &self.head_norms {
            (q, k) = (q_norm.apply(device, q)?, k_norm.apply(device, k)?);
        }
        device.rotate(&mut q, rotary, false)?;
        device.rotate(&mut k, rotary, false)?;
        Ok(Attended { q, k, v: self.linear(Projection::V).apply(device, input)? })
    }

    /// Gradients for the outputs of q and k from those for the rotated queries and keys of [`attended`](Self::attended).
    pub fn projection_gradients<D: ModelOps<Tensor = T>>(
        &self,
        device: &D,
        input: &T,
        rotary: &Rotary<T>,
        (mut d_q, mut d_k): (T, T),
    ) -> Result<(T, T)> {
        device.rotate(&mut d_q, rotary, true)?;
        device.rotate(&mut d_k, rotary, true)?;
        let Some([q_norm, k_norm]) = &self.head_norms else { return Ok((d_q, d_k)) };
        // Kept from the forward pass the norms' inputs would cost as much memory as queries and keys do.
        let q = self.linear(Projection::Q).apply(device, input)?;
        let d_q = q_norm.backward(device, q, d_q)?;
        let k = self.linear(Projection::K).apply(device, input)?;
        Ok((d_q, k_norm.backward(device, k, d_k)?))
    }

    /// Input of o: from the residual stream through normalisation, projections and attention.
    pub fn output_input<D: ModelOps<Tensor = T>>(
        &self,
        device: &D,
        config: &DecoderConfig,
        x: &T,
        layout: &Layout<T>,
    ) -> Result<T> {
        let input = self.attention_input(device, config, x)?;
        let Attended { q, k, v } = self.attended(device, &input, &layout.rotary)?;
        device.attention(&AttentionOperands { q: &q, k: &k, v: &v, spans: &layout.spans, shape: config.attention })
    }

    /// Input of gate and up: the normalised residual stream behind the attention module.
    pub fn mlp_input<D: ModelOps<Tensor = T>>(&self, device: &D, config: &DecoderConfig, x: &T) -> Result<T> {
        device.rms_norm(x, &self.post_norm, config.norm_eps)
    }

    /// Input of down.
    pub fn down_input<D: ModelOps<Tensor = T>>(&self, device: &D, config: &DecoderConfig, x: &T) -> Result<T> {
        let input = self.mlp_input(device, config, x)?;
        let gate = self.linear(Projection::Gate).apply(device, &input)?;
        let up = self.linear(Projection::Up).apply(device, &input)?;
        device.gated(&gate, &up, config.activation)
    }

    /// Adds an output projection of `inner` to the residual stream.
    pub fn add_output<D: ModelOps<Tensor = T>>(
        &self,
        device: &D,
        x: &mut T,
        projection: Projection,
        inner: &T,
    ) -> Result<()> {
        device.add_assign(x, &self.linear(projection).apply(device, inner)?)
    }
}
