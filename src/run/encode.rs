//! Samples to the decoder's input: embedding, vision tower, positions, packed into chunks.

use super::input::{Data, Input};
use crate::data::sequence::{Collected, Sequence};
use crate::device::ModelOps;
use crate::heap;
use crate::model::language_model::{Embedder, image_rows};
use crate::progress::{Stage, StageClock, StageTime};
use crate::quantize::block::{Activations, Chunk, embedded, needs_float_path};
use crate::report::{CalibrationCounts, RunObserver};
use anyhow::Result;

/// Encoded samples.
pub(super) struct Encoded<T> {
    pub(super) chunks: Vec<Chunk<T>>,
    /// How long it took; `None` where there was nothing to encode.
    pub(super) time: Option<StageTime>,
}

/// Encodes all samples, and says how long that took; the chunks are parked where activations are streamed.
pub(super) fn encode<D: ModelOps>(
    device: &D,
    input: &Input,
    data: &Data,
    activations: Activations,
    observer: &mut dyn RunObserver,
) -> Result<Encoded<D::Tensor>> {
    let packed = data.packed();
    let mut chunks = Vec::with_capacity(packed.chunks.len());
    if packed.chunks.is_empty() {
        return Ok(Encoded { chunks, time: None });
    }
    let embedder = Embedder::load(device, &input.checkpoint, &input.config, !input.text_only)?;
    let clock = StageClock::start(Stage::Vision, data.all().count() as u64, observer);
    let (mut done, stop) = (0, observer.stop());
    let all = needs_float_path(&input.solver, input.importance, input.refit);
    for (i, sequences) in packed.chunks.iter().enumerate() {
        stop.check()?;
        let with_float = all || packed.is_checked(i);
        let mut chunk = embedded(device, &embedder, sequences, input.config.image_token, with_float)?;
        chunk.held_out = packed.is_held_out(i);
        if activations == Activations::Streamed {
            chunk.park(device)?;
        }
        chunks.push(chunk);
        heap::trim();
        done += sequences.len() as u64;
        observer.stage_advanced(Stage::Vision, done, "");
    }
    Ok(Encoded { chunks, time: Some(clock.finish(observer)) })
}

/// What became of the data.
pub(super) fn counts(data: &Collected, image_token: u32) -> CalibrationCounts {
    let sequences: Vec<&Sequence> = data.sequences.iter().collect();
    let vision_tokens = image_rows(&sequences, image_token).len();
    let text_tokens = sequences.iter().map(|s| s.tokens.len()).sum::<usize>() - vision_tokens;
    let &Collected { too_long, bad_images, .. } = data;
    CalibrationCounts { used: sequences.len(), too_long, bad_images, vision_tokens, text_tokens }
}
