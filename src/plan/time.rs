//! How long a run takes: its work counted from the shapes, divided by what this machine does of each kind in a moment.

use super::Job;
use crate::plan::{Load, Rates, StageEstimate};
use crate::progress::Stage;
use crate::quantize::block::needs_float_path;
use crate::quantize::settings::{Importance, Refit, Solver};
use serde::Serialize;

/// An estimate of a run's time. It does not know what else the machine will do, or how fast its disk is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TimePlan {
    /// All stages that take long, in their order.
    pub stages: Vec<StageEstimate>,
    /// Sum of the stages' seconds.
    pub seconds: f64,
    /// What this machine did of each kind of work in a second.
    pub rates: Rates,
}

impl TimePlan {
    /// Time of a job whose checkpoint has `file_bytes` in all files and `kept_bytes` in tensors that are copied.
    pub fn new(job: &Job<'_>, rates: Rates, file_bytes: u64, kept_bytes: u64) -> Self {
        let vision = job.embedder.as_ref().map(|embedder| Load::of_vision(&embedder.load, embedder.tower, &job.chunks));
        let vision = vision.unwrap_or_default();
        let loads = [
            (Stage::Checksums, Load { checked: file_bytes as f64, ..Load::default() }),
            (Stage::Vision, vision),
            // All weights are read once to be checked, those that are kept written once.
            (Stage::Write, Load { values: (file_bytes + kept_bytes) as f64 / 4.0, ..Load::default() }),
            (Stage::Blocks, blocks(job)),
        ];
        let stages: Vec<StageEstimate> = loads
            .into_iter()
            .map(|(stage, load)| StageEstimate { stage, seconds: load.seconds(&rates), load })
            .collect();
        Self { seconds: stages.iter().map(|stage| stage.seconds).sum(), stages, rates }
    }
}

/// All decoder blocks, in the first of which all tokens weigh alike, and what is asked behind the last.
pub(crate) fn blocks(job: &Job<'_>) -> Load {
    let blocks = job.shape.blocks;
    match blocks {
        0 => Load::default(),
        _ => block(job, Importance::None) + block(job, job.importance) * (blocks - 1) as f64 + check(job),
    }
}

/// Two products by the output head, and exponentials.
fn check(job: &Job<'_>) -> Load {
    let (tokens, vocab) = (job.check.tokens as f64, job.check.vocab as f64);
    let hidden = if tokens > 0.0 { job.shape.hidden as f64 } else { 0.0 };
    Load { products: 4.0 * tokens * vocab * hidden, values: 8.0 * tokens * vocab + vocab * hidden, ..Load::default() }
}

/// The passes of [`BlockQuantizer`](crate::quantize::block), the statistics and the solves of one block.
fn block(job: &Job<'_>, importance: Importance) -> Load {
    let shape = &job.shape;
    let (hidden, inner) = (shape.hidden as f64, shape.intermediate as f64);
    let query = (shape.heads * shape.head_dim) as f64;
    let key = (shape.kv_heads * shape.head_dim) as f64;
    let weights = shape.block_weights() as f64;
    if job.solver.solver == Solver::Rtn {
        return Load { codes: weights, values: 3.0 * weights, ..Load::default() };
    }
    let tokens: f64 = job.chunks.iter().map(|chunk| chunk.tokens as f64).sum();
    let pairs: f64 = job.chunks.iter().map(|chunk| chunk.pairs as f64).sum();
    let gptaq = if job.solver.solver == Solver::Gptaq { 1.0 } else { 0.0 };
    let weighted = if importance == Importance::Vlmq { 1.0 } else { 0.0 };
    // Scales of o and down are refitted by what these put out, and by statistics of that.
    let refitted = if job.refit == Refit::Residual { 1.0 } else { 0.0 };
    // Paths: the quantized one, and the float one where something looks at it.
    let all = needs_float_path(job.solver, job.importance, job.refit);
    let float = job.chunks.iter().filter(|chunk| all || chunk.checked).map(|chunk| chunk.tokens as f64);
    let paths = 1.0 + float.sum::<f64>() / tokens.max(1.0);

    // Per token.
    let (projected, output, mlp, down) =
        (hidden * (query + 2.0 * key), query * hidden, 2.0 * hidden * inner, hidden * inner);
    // Inputs of o and down on every path; the float path advances with them, the quantized one once its codes are there.
    let passes = (paths + 1.0 + refitted) * (projected + mlp) + (paths + refitted) * (output + down);
    // Importance looks through the attention module on both paths and once back.
    let importance = weighted * (2.0 * (projected + output) + output);
    let attended = paths + 1.0 + weighted * (2.0 + 2.5) + refitted;

    // H of each distinct input, q, k and v apart where each has its own importance; half of it, being symmetric. C is not.
    let distinct = 1.0 + 2.0 * weighted;
    let squares = (distinct + 1.0) * hidden.powi(2) + query.powi(2) + inner.powi(2);
    let cubes = (distinct + 1.0) * hidden.powi(3) + query.powi(3) + inner.powi(3);
    // Rows times a triangle for the errors, as much again for the cross term and for the reported error.
    let rows_squares =
        hidden.powi(2) * (query + 2.0 * key + 2.0 * inner) + query.powi(2) * hidden + inner.powi(2) * hidden;

    // Norms, results of products, nonlinearities; reading, copying, permuting and dequantizing weights; statistics made,
    // checked and brought into order.
    let computed = (paths + 1.0 + refitted) * (3.0 * hidden + 2.0 * query + 2.0 * key + 5.0 * inner)
        + (distinct + 1.0) * (1.0 + gptaq) * hidden
        + weighted * (6.0 * hidden + 8.0 * query + 6.0 * key);
    let values = tokens * computed + 6.0 * weights + squares * 4.0 * (1.0 + gptaq);

    Load {
        products: 2.0 * tokens * (passes + importance) + rows_squares * (2.0 + gptaq),
        attention: 2.0 * pairs * query * attended,
        statistics: 2.0 * tokens * (squares * (0.5 + gptaq) + refitted * 2.0 * 1.5 * hidden.powi(2)),
        factors: cubes / 3.0 * (1.0 + gptaq),
        codes: weights,
        values,
        ..Load::default()
    }
}
