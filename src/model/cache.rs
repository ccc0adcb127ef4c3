//! Keys and values of the tokens that a model has seen.

use super::config::DecoderConfig;
use super::decoder::{Attended, Block, Layout};
use super::labels;
use crate::device::{AttentionOperands, ModelOps, Span};
use anyhow::Result;

/// Keys and values of one sequence, per block: `[tokens, kv_heads · head_dim]`.
pub struct Cache<T> {
    pub(super) blocks: Vec<(T, T)>,
}

/// A block, by its number from 0, whose keys and values are kept.
pub(super) struct CachedBlock<'a, T> {
    pub(super) block: &'a Block<T>,
    pub(super) index: usize,
    pub(super) decoder: &'a DecoderConfig,
}

/// Input of o of sequences that attend to their caches, which grow by their keys and values.
pub(super) fn attend_cached<D: ModelOps>(
    device: &D,
    &CachedBlock { block, index, decoder }: &CachedBlock<'_, D::Tensor>,
    x: &D::Tensor,
    layout: &Layout<D::Tensor>,
    caches: &mut [Cache<D::Tensor>],
) -> Result<D::Tensor> {
    let input = block.attention_input(device, decoder, x)?;
    let Attended { mut q, k, v } = block.attended(device, &input, &layout.rotary)?;
    for (cache, span) in caches.iter_mut().zip(&layout.spans) {
        let own = |all: &D::Tensor| device.slice_rows(all, span.k.clone());
        match cache.blocks.get_mut(index) {
            Some((keys, values)) => {
                device.append_rows(keys, &own(&k)?)?;
                device.append_rows(values, &own(&v)?)?;
            }
            None => {
                let _label = device.label(labels::CACHE);
                cache.blocks.push((own(&k)?, own(&v)?));
            }
        }
        let (keys, values) = &cache.blocks[index];
        let own = Span { q: 0..span.q.len(), k: 0..device.shape(keys).0 };
        let queries = device.slice_rows(&q, span.q.clone())?;
        let seen = AttentionOperands { q: &queries, k: keys, v: values, spans: &[own], shape: decoder.attention };
        let rows: Vec<u32> = (span.q.start as u32..span.q.end as u32).collect();
        device.scatter_rows(&mut q, &rows, &device.attention(&seen)?)?;
    }
    Ok(q)
}
