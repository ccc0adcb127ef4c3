//! Parts of a checkpoint, by the names of their tensors.

use super::families::ModelConfig;
use crate::checkpoint::{Checkpoint, StoredTensor};
use std::fmt;

/// A part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// What is none of the others: the vision tower and its projector.
    VisionTower,
    /// The token embedding.
    Embedding,
    /// The decoder's blocks.
    Blocks,
    /// The norm behind them.
    LastNorm,
    /// The output head, where it is not the embedding.
    Head,
}

impl Part {
    /// All parts, in the order in which data passes them.
    pub const ALL: [Self; 5] = [Self::VisionTower, Self::Embedding, Self::Blocks, Self::LastNorm, Self::Head];
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VisionTower => "vision tower",
            Self::Embedding => "embedding",
            Self::Blocks => "decoder blocks",
            Self::LastNorm => "last norm",
            Self::Head => "output head",
        })
    }
}

/// The part that a tensor belongs to.
pub fn part_of(name: &str, config: &ModelConfig) -> Part {
    match name.strip_prefix(&config.names.prefix) {
        _ if name == config.names.head => Part::Head,
        Some(rest) if rest.starts_with("layers.") => Part::Blocks,
        Some(rest) if rest.starts_with("embed_tokens.") => Part::Embedding,
        Some(rest) if rest.starts_with("norm.") => Part::LastNorm,
        _ => Part::VisionTower,
    }
}

/// The tensors of a part, as the headers have them.
pub fn tensors_of<'a>(
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    part: Part,
) -> impl Iterator<Item = StoredTensor<'a>> {
    let names = checkpoint.names().filter(move |name| part_of(name, config) == part);
    names.filter_map(|name| checkpoint.tensor(name).ok())
}

/// Bytes of the largest tensor of a part in the file; 0 where it has none.
pub fn largest_of(checkpoint: &Checkpoint, config: &ModelConfig, part: Part) -> u64 {
    tensors_of(checkpoint, config, part).map(|tensor| tensor.bytes.len() as u64).max().unwrap_or(0)
}
