//! Sequences whose images a model has looked at.

use crate::data::chunks::chunks_of_tokens;
use crate::data::sequence::Sequence;
use crate::device::ModelOps;
use crate::model::families::Features;
use crate::model::labels;
use crate::model::language_model::{Embedder, Stream};
use anyhow::Result;
use std::ops::Range;

/// Most tokens that go through a block together; a longer sample goes alone.
pub const CHUNK_TOKENS: u64 = 2048;

/// Some sequences as they go through a model: in chunks, with the features of each chunk's images.
pub struct Seen<T> {
    chunks: Vec<Range<usize>>,
    features: Vec<Option<Features<T>>>,
}

impl<T> Seen<T> {
    /// Looks at the images of some sequences.
    pub fn of<D: ModelOps<Tensor = T>>(device: &D, embedder: &Embedder<D>, sequences: &[Sequence]) -> Result<Self> {
        let chunks = chunks_of_tokens(sequences, CHUNK_TOKENS);
        let groups: Vec<Vec<&Sequence>> =
            chunks.iter().map(|chunk| sequences[chunk.clone()].iter().collect()).collect();
        let _label = device.label(labels::FEATURES);
        Ok(Self { features: embedder.features_of_each(device, &groups)?, chunks })
    }

    /// The decoder's input of sequences that have these images.
    pub fn embed<D: ModelOps<Tensor = T>>(
        &self,
        device: &D,
        embedder: &Embedder<D>,
        sequences: &[Sequence],
    ) -> Result<Vec<Stream<T>>> {
        let _label = device.label(labels::STREAMS);
        let chunks = self.chunks.iter().zip(&self.features);
        chunks
            .map(|(chunk, features)| {
                let sequences: Vec<&Sequence> = sequences[chunk.clone()].iter().collect();
                let (x, layout) = embedder.embed(device, &sequences, features.as_ref())?;
                Ok(Stream { x, layout })
            })
            .collect()
    }

    /// Numbers of the sequences that go through a block together.
    pub fn chunks(&self) -> &[Range<usize>] {
        &self.chunks
    }

    /// Most blocks behind which image features are added.
    pub fn levels(&self) -> usize {
        self.features.iter().flatten().map(|features| features.deepstack.len()).max().unwrap_or(0)
    }
}
