//! Samples to the decoder's input: embedding, vision tower, positions, packed into chunks.

use super::input::{Data, Input};
use crate::data::sequence::{Collected, Sequence};
use crate::device::ModelOps;
use crate::heap;
use crate::model::language_model::{Embedder, image_rows};
use crate::plan::MemoryPlan;
use crate::progress::{Stage, StageClock, StageTime};
use crate::quantize::block::Activations;
use crate::quantize::block::{Chunk, embedded, needs_float_path};
use crate::report::settings::RunSettings;
use crate::report::{CalibrationCounts, RunObserver};
use anyhow::Result;

/// Encodes all samples; the chunks are parked where the plan streams activations.
pub(super) fn encode<D: ModelOps>(
    device: &D,
    input: &Input,
    data: &Data,
    settings: &RunSettings,
    plan: &MemoryPlan,
    stages: &mut Vec<StageTime>,
    observer: &mut dyn RunObserver,
) -> Result<Vec<Chunk<D::Tensor>>> {
    let packed = data.packed(settings.chunk_tokens);
    let mut chunks = Vec::with_capacity(packed.chunks.len());
    if packed.chunks.is_empty() {
        return Ok(chunks);
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
        if plan.activations == Activations::Streamed {
            chunk.park(device)?;
        }
        chunks.push(chunk);
        heap::trim();
        done += sequences.len() as u64;
        observer.stage_advanced(Stage::Vision, done, "");
    }
    stages.push(clock.finish(observer));
    Ok(chunks)
}

/// What became of the data.
pub(super) fn counts(data: &Collected, image_token: u32) -> CalibrationCounts {
    let sequences: Vec<&Sequence> = data.sequences.iter().collect();
    let vision_tokens = image_rows(&sequences, image_token).len();
    let text_tokens = sequences.iter().map(|s| s.tokens.len()).sum::<usize>() - vision_tokens;
    let &Collected { too_long, bad_images, .. } = data;
    CalibrationCounts { used: sequences.len(), too_long, bad_images, vision_tokens, text_tokens }
}
