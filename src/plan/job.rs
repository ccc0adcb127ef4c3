//! What a plan is made for, in sizes.

use super::{ChunkSize, DecoderShape};
use crate::model::families::VisionLoad;
use crate::quantize::settings::{Importance, Refit, SolverSettings};

/// What embeds samples. Counts are of values, not of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EmbedderSize {
    /// Values of the vision tower and its projector; 0 where no sample has an image.
    pub tower: usize,
    /// Sizes of the tower.
    pub load: VisionLoad,
}

/// What is asked of the model behind its last block, see [`compare`](crate::evaluate::paths::compare).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckSize {
    /// Tokens that are predicted; 0 where nothing is asked.
    pub tokens: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
}

/// What the plan is for.
#[derive(Clone, Debug)]
pub struct Job<'a> {
    /// Sizes of the decoder.
    pub shape: DecoderShape,
    /// The solver's settings.
    pub solver: &'a SolverSettings,
    /// How tokens are weighted.
    pub importance: Importance,
    /// Whether scales are refitted.
    pub refit: Refit,
    /// The calibration data, in order.
    pub chunks: Vec<ChunkSize>,
    /// Levels of image features that are added behind the first blocks; see [`DeepStack`](crate::model::decoder::DeepStack).
    pub deepstack: usize,
    /// `None` where the vision stage is left out.
    pub embedder: Option<EmbedderSize>,
    /// What follows the last block.
    pub check: CheckSize,
}
