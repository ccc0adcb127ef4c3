//! What a plan is for: a checkpoint, what is done with it, and the samples.

use crate::checkpoint::{Checkpoint, Format};
use crate::data::sequence::Sequence;
use crate::model::families::ModelConfig;
use crate::quantize::block::needs_float_path;
use crate::quantize::settings::{Importance, Refit, SolverSettings};
use std::sync::Arc;

/// What is done with a checkpoint, as a plan goes through it: all but weights and pixels is real.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    /// The checkpoint, of which only headers are read.
    pub checkpoint: &'a Arc<Checkpoint>,
    /// What its config.json says.
    pub config: &'a ModelConfig,
    /// The solver's settings.
    pub solver: &'a SolverSettings,
    /// How layers are stored.
    pub format: Format,
    /// How tokens are weighted.
    pub importance: Importance,
    /// Whether scales are refitted.
    pub refit: Refit,
    /// Samples that go through a block together, those that are held out behind all others.
    pub chunks: Vec<SubjectChunk<'a>>,
    /// Rows of chunks at which both paths predict what comes next, behind the last block.
    pub places: Vec<(usize, Vec<u32>)>,
    /// Whether samples have images.
    pub images: bool,
}

/// Samples that go through a block together.
#[derive(Clone, Debug)]
pub struct SubjectChunk<'a> {
    /// The samples.
    pub sequences: Vec<&'a Sequence>,
    /// Whether their tokens go into no statistics.
    pub held_out: bool,
    /// Whether both paths predict what comes next there, behind the last block.
    pub checked: bool,
}

impl Subject<'_> {
    /// Whether a chunk has a float path beside the quantized one.
    pub fn with_float(&self, chunk: &SubjectChunk<'_>) -> bool {
        chunk.checked || needs_float_path(self.solver, self.importance, self.refit)
    }
}

impl SubjectChunk<'_> {
    /// Tokens of all samples.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.tokens.len()).sum()
    }
}
