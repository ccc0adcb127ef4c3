//! Sizes of a decoder.

use crate::model::config::DecoderConfig;
use serde::Serialize;

/// Sizes of a decoder, all blocks alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DecoderShape {
    /// Blocks.
    pub blocks: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl DecoderShape {
    /// Sizes of a config.json.
    pub fn of(decoder: &DecoderConfig) -> Self {
        Self {
            blocks: decoder.layers,
            hidden: decoder.hidden,
            intermediate: decoder.intermediate,
            heads: decoder.attention.heads,
            kv_heads: decoder.attention.kv_heads,
            head_dim: decoder.attention.head_dim,
        }
    }

    /// Weights of a block's linear layers.
    pub fn block_weights(&self) -> usize {
        let query = self.heads * self.head_dim;
        let key = self.kv_heads * self.head_dim;
        self.hidden * (2 * query + 2 * key) + 3 * self.hidden * self.intermediate
    }
}
