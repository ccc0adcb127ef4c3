//! Room that the state of an unfinished run takes.

use super::Subject;
use crate::checkpoint::sealed;
use crate::model::language_model::image_rows;

/// Bytes taken on the disk for the reports of a block: those of seven layers are some 5 kB, the rest is for importance.
const REPORT_BYTES: u64 = 64 << 10;

/// Bytes of the state that a run keeps on disk between two blocks: the residual streams of all samples as the device holds
/// them, `tokens` of `hidden` values of `element_bytes` each, of one path or `with_float` of both. Another state is there
/// while it takes the place of the one before.
pub fn state_bytes(tokens: u64, hidden: usize, element_bytes: usize, with_float: bool) -> u64 {
    tokens * (hidden * element_bytes) as u64 * if with_float { 2 } else { 1 }
}

/// Bytes that a run takes on the disk beside its growing output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// A state: the residual streams of all samples, and reports.
    pub state: u64,
    /// Image features for later blocks; 0 where there are none.
    pub levels: u64,
}

impl StateBytes {
    /// Bytes of a run on a device whose activations have so many bytes a value.
    pub fn of(subject: &Subject<'_>, element_bytes: usize) -> Self {
        let Subject { config, chunks, .. } = subject;
        let tokens: u64 = chunks.iter().map(|chunk| chunk.tokens() as u64).sum();
        let float_tokens: u64 =
            chunks.iter().filter(|chunk| subject.with_float(chunk)).map(|chunk| chunk.tokens() as u64).sum();
        let image_tokens =
            chunks.iter().map(|chunk| image_rows(&chunk.sequences, config.image_token).len() as u64).sum();
        let (hidden, chunks, levels) =
            (config.decoder.hidden, chunks.len() as u64, config.levels(subject.images) as u64);
        let streams = state_bytes(tokens + float_tokens, hidden, element_bytes, false);
        let reports = REPORT_BYTES * (config.decoder.layers as u64 + 1);
        Self {
            state: sealed::length(2 * chunks + 1, streams) + reports,
            levels: match levels {
                0 => 0,
                _ => sealed::length(levels * chunks, levels * state_bytes(image_tokens, hidden, element_bytes, false)),
            },
        }
    }

    /// At any moment there are a state and the space for the next.
    pub fn total(&self) -> u64 {
        2 * self.state + self.levels
    }
}
