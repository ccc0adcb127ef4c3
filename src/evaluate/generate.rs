//! Greedy decoding with a key/value cache, several sequences at a time.

use crate::data::sequence::Sequence;
use crate::device::ModelOps;
use crate::model::language_model::{Cache, LanguageModel, Stream};
use crate::tensor::Matrix;
use anyhow::Result;

/// Where answers end.
#[derive(Clone, Copy, Debug)]
pub struct Endings<'a> {
    /// Most new tokens of each answer.
    pub limits: &'a [usize],
    /// Tokens that end an answer.
    pub tokens: &'a [u32],
}

/// Continues every prompt by the likeliest token again and again, until it ends.
/// Returns the new tokens without the end token. `streams` are the prompts, embedded in their order.
pub fn greedy<D: ModelOps>(
    device: &D,
    model: &LanguageModel<D>,
    prompts: &[Sequence],
    mut streams: Vec<Stream<D::Tensor>>,
    endings: Endings<'_>,
) -> Result<Vec<Vec<u32>>> {
    let Endings { limits, tokens: end_tokens } = endings;
    let mut caches: Vec<Cache<D::Tensor>> = prompts.iter().map(|_| model.cache()).collect();
    model.forward_all(device, &mut streams, Some(&mut caches))?;
    let mut next = Vec::with_capacity(prompts.len());
    for Stream { x, layout } in streams {
        let last_rows: Vec<u32> = layout.spans.iter().map(|span| span.q.end as u32 - 1).collect();
        next.extend(argmax_rows(&model.logits(device, &x, &last_rows)?));
    }

    let mut answers: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
    // Where the text goes on: behind an image, positions continue from its largest one.
    let mut positions: Vec<u32> =
        prompts.iter().map(|p| p.positions.iter().flatten().max().map_or(0, |last| last + 1)).collect();
    let mut running: Vec<usize> = (0..prompts.len()).collect();
    loop {
        let mut still_running = Vec::with_capacity(running.len());
        let mut kept_caches = Vec::with_capacity(running.len());
        let mut tokens = Vec::with_capacity(running.len());
        for ((&sequence, cache), token) in running.iter().zip(caches).zip(next) {
            if end_tokens.contains(&token) || answers[sequence].len() >= limits[sequence] {
                continue;
            }
            answers[sequence].push(token);
            if answers[sequence].len() < limits[sequence] {
                still_running.push(sequence);
                kept_caches.push(cache);
                tokens.push(token);
            }
        }
        if still_running.is_empty() {
            return Ok(answers);
        }
        (running, caches) = (still_running, kept_caches);
        let at: Vec<u32> = running.iter().map(|&sequence| positions[sequence]).collect();
        for &sequence in &running {
            positions[sequence] += 1;
        }
        let mut stream = [model.embed_next(device, &tokens, &at)?];
        model.forward_all(device, &mut stream, Some(&mut caches))?;
        let rows: Vec<u32> = (0..running.len() as u32).collect();
        next = argmax_rows(&model.logits(device, &stream[0].x, &rows)?);
    }
}

/// [`argmax`] of each row.
fn argmax_rows(logits: &Matrix) -> Vec<u32> {
    (0..logits.rows()).map(|row| argmax(logits.row(row))).collect()
}

/// Index of the largest value, the first one among equals.
pub(super) fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (token, logit);
        }
    }
    best.0 as u32
}
