//! Samples to the first block's input.

use super::chunk::Chunk;
use super::labels;
use crate::data::sequence::Sequence;
use crate::device::ModelOps;
use crate::model::decoder::Layout;
use crate::model::language_model::Embedder;
use anyhow::Result;

/// Encodes the images of some samples and packs them into a chunk, with the float path's stream if `with_float`.
pub fn embedded<D: ModelOps>(
    device: &D,
    embedder: &Embedder<D>,
    sequences: &[&Sequence],
    image_token: u32,
    with_float: bool,
) -> Result<Chunk<D::Tensor>> {
    let label = device.label(labels::PASS);
    let features = embedder.image_features(device, sequences)?;
    drop(label);
    let _label = device.label(labels::STREAMS);
    let (x_quantized, layout) = embedder.embed(device, sequences, features.as_ref())?;
    let (tokens, _) = device.shape(&x_quantized);
    let x_float = match with_float {
        true => Some(device.slice_rows(&x_quantized, 0..tokens)?),
        false => None,
    };
    Ok(Chunk::of(sequences, image_token, layout, x_quantized, x_float))
}

impl<T> Chunk<T> {
    /// Packed samples with their residual streams.
    pub fn of(
        sequences: &[&Sequence],
        image_token: u32,
        layout: Layout<T>,
        x_quantized: T,
        x_float: Option<T>,
    ) -> Self {
        let is_vision = sequences.iter().flat_map(|s| &s.tokens).map(|&token| token == image_token).collect();
        let samples = sequences.iter().map(|s| s.id.clone()).collect();
        Self { layout, x_quantized, x_float, held_out: false, is_vision, samples }
    }
}
