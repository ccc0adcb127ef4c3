//! Counting: [`BlockQuantizer`](crate::quantize::block), [`solve`](crate::quantize::solve) and
//! [`importance`](crate::quantize::importance), allocation by allocation.

use super::{Activations, ChunkSize, Costs, EmbedderSize, Entry, Job};
use crate::device::BLOCK;
use crate::model::decoder::Projection;
use crate::quantize::block::needs_float_path;
use crate::quantize::order::{Span, spans};
use crate::quantize::settings::{CrossTerm, Importance, Solver};

/// A step and what it holds.
pub(super) type Step = (String, Vec<Entry>);

/// Counts one job. Sizes are in values unless they say bytes.
pub(super) struct Counter<'a> {
    job: &'a Job<'a>,
    costs: &'a Costs<'a>,
    streamed: bool,
    cross: bool,
    both_paths: bool,
    hidden: u64,
    inner: u64,
    query: u64,
    key: u64,
}

/// Bytes of a float32 value, in which statistics and the solver are kept.
const F32: u64 = 4;

impl<'a> Counter<'a> {
    pub(super) fn new(job: &'a Job<'a>, costs: &'a Costs<'a>, activations: Activations) -> Self {
        let shape = &job.shape;
        Self {
            job,
            costs,
            streamed: activations == Activations::Streamed,
            cross: job.solver.solver == Solver::Gptaq,
            both_paths: needs_float_path(job.solver, job.importance),
            hidden: shape.hidden as u64,
            inner: shape.intermediate as u64,
            query: (shape.heads * shape.head_dim) as u64,
            key: (shape.kv_heads * shape.head_dim) as u64,
        }
    }

    /// Bytes of weights or activations.
    fn stored(&self, values: u64) -> u64 {
        values * self.costs.element_bytes
    }

    /// Bytes of a chunk's residual streams and rotary tables.
    fn streams(&self, chunk: &ChunkSize) -> u64 {
        let paths = if self.both_paths { 2 } else { 1 };
        chunk.tokens as u64 * (self.stored(paths * self.hidden) + F32 * self.job.shape.head_dim as u64)
    }

    /// Bytes of as many levels of a chunk's image features.
    fn features(&self, chunk: &ChunkSize, levels: usize) -> u64 {
        self.stored(levels as u64 * chunk.image_tokens as u64 * self.hidden)
    }

    /// All that lasts of a chunk from pass to pass.
    fn chunk(&self, chunk: &ChunkSize) -> u64 {
        self.streams(chunk) + self.features(chunk, self.job.deepstack)
    }

    pub(super) fn all_chunks(&self) -> u64 {
        self.job.chunks.iter().map(|chunk| self.chunk(chunk)).sum()
    }

    /// Bytes of small tables for kernels: importance factors, row numbers, bounds of samples and images.
    fn tables(rows: u64) -> u64 {
        4096 + 16 * rows
    }

    /// A pass over all chunks at its worst: what is held of them, and what `temporary` says of the chunk at work, by tokens.
    /// A pass that leaves the block brings a level of image features.
    fn pass(&self, leaves: bool, temporary: impl Fn(u64) -> u64) -> [Entry; 2] {
        let chunks = &self.job.chunks;
        let levels = self.job.deepstack.min(usize::from(leaves));
        let brought = |chunk: &ChunkSize| self.streams(chunk) + self.features(chunk, levels);
        let at = |i: usize| {
            let held = match self.streamed {
                true => chunks[i..].iter().take(2).map(brought).sum(),
                false => self.all_chunks(),
            };
            let tokens = chunks[i].tokens as u64;
            (held, temporary(tokens) + Self::tables(tokens))
        };
        let (held, temporary) =
            (0..chunks.len()).map(at).max_by_key(|(held, temporary)| held + temporary).unwrap_or_default();
        [self.held(held), entry("intermediate results of a chunk", temporary)]
    }

    fn held(&self, bytes: u64) -> Entry {
        entry(if self.streamed { "residual streams of two chunks" } else { "residual streams of all samples" }, bytes)
    }

    /// What is held outside of passes.
    fn between_passes(&self) -> Entry {
        self.held(if self.streamed { 0 } else { self.all_chunks() })
    }

    pub(super) fn blocks(&self) -> Step {
        let norms_and_biases = 2 * self.hidden + self.query + 2 * self.key;
        let block = self.stored(self.job.shape.block_weights() as u64 + norms_and_biases);
        if self.job.solver.solver == Solver::Rtn {
            return ("rounding".into(), vec![entry("weights of a block", block)]);
        }
        let weights = entry("weights of a block, float and quantized", 2 * block);
        let (hidden, inner, query, key) = (self.hidden, self.inner, self.query, self.key);
        // Inputs of a set, outputs of its widest layer, and what computing the inputs holds at once, per token.
        let attended = hidden + query + 2 * key + query;
        let sets = [
            (Projection::Q, hidden, query.max(key), hidden, false),
            (Projection::O, query, hidden, attended, true),
            (Projection::Gate, hidden, inner, hidden, false),
            (Projection::Down, inner, hidden, hidden + 3 * inner, true),
        ];
        let mut steps = Vec::new();
        if self.job.importance == Importance::Vlmq && self.job.shape.blocks > 1 {
            steps.push(("importance".to_owned(), self.pass(false, |tokens| self.importance(tokens)).to_vec()));
        }
        for (projection, inputs, outputs, computed, advances) in sets {
            let module = projection.module();
            let statistics = entry(if self.cross { "H and C" } else { "H" }, self.squares(inputs));
            let float = self.both_paths && (self.cross || advances);
            let temporary = |tokens| self.accumulation(tokens, inputs, computed, float, advances);
            let [held, temporaries] = self.pass(projection == Projection::Down, temporary);
            steps.push((format!("statistics of {module}"), vec![held, statistics.clone(), temporaries]));
            let factors = entry(
                if self.cross { "their copies in processing order, factored" } else { "its factor" },
                self.factors(inputs),
            );
            steps.push((format!("factoring {module}"), vec![self.between_passes(), statistics, factors.clone()]));
            let hessian = entry("H", F32 * inputs * inputs);
            let state = entry("the solver's state", self.solver_state(inputs, outputs));
            steps.push((format!("solving {module}"), vec![self.between_passes(), hessian, factors, state]));
        }
        let worst = steps.into_iter().max_by_key(|(_, entries)| entries.iter().map(|e| e.bytes).sum::<u64>());
        let (step, entries) = worst.unwrap_or_default();
        (step, [weights].into_iter().chain(entries).collect())
    }

    /// H and, for GPTAQ, C, or as much in processing order.
    fn squares(&self, inputs: u64) -> u64 {
        F32 * inputs * inputs * if self.cross { 2 } else { 1 }
    }

    /// The factor and the cross term with their diagonal blocks, the diagonal, and the order.
    fn factors(&self, inputs: u64) -> u64 {
        let blocks = F32 * inputs * BLOCK as u64 * if self.cross { 2 } else { 1 };
        self.squares(inputs) + blocks + 2 * F32 * inputs + F32 * (BLOCK * BLOCK) as u64
    }

    /// `SolveState` and the codes of all blocks; a span's last, narrower part is made while the one before is there.
    fn solver_state(&self, inputs: u64, outputs: u64) -> u64 {
        let solver = self.job.solver;
        // A group that does not divide the inputs is refused by the solver, with better words than here.
        let group = solver.group_columns(inputs as usize).max(1);
        let spans = spans(inputs as usize, group, BLOCK);
        let width = |span: Option<&Span>| span.map_or(0, |span| (span.end - span.start) as u64);
        let (first, last) = (width(spans.first()), width(spans.last()));
        let narrower = if last < first { last } else { 0 };
        let shift = self.cross && solver.cross_term == CrossTerm::Quantized;
        let whole = 1 + u64::from(self.cross) + u64::from(shift);
        let of_span = first * (1 + u64::from(self.cross)) + narrower;
        // A group of its own span is brought up to date once more, for its grid.
        let grid = if group > BLOCK && (group as u64) < inputs { first } else { 0 };
        // A row's codes, a scale and a zero a group, an error a block, each beginning at a multiple of 256 bytes.
        let blocks: usize = spans.iter().map(|span| span.blocks.len()).sum();
        let groups = blocks.max(inputs as usize / group) as u64;
        let codes = outputs * (inputs + 5 * groups + 8 * blocks as u64) + 4 * 256 * blocks as u64;
        F32 * outputs * (inputs * whole + of_span + grid) + codes
    }

    /// [`attention_importance`](crate::quantize::importance::attention_importance) in its backward pass.
    fn importance(&self, tokens: u64) -> u64 {
        let values = 4 * self.hidden + 6 * self.query + 4 * self.key;
        // Log-sums of the forward pass, and as much work space.
        tokens * (self.stored(values) + 2 * F32 * self.job.shape.heads as u64)
    }

    /// A chunk on its way into the statistics: the second input is computed while the first is there, then both are added,
    /// then the float path goes on.
    fn accumulation(&self, tokens: u64, inputs: u64, computed: u64, float: bool, advances: bool) -> u64 {
        let first = if float { inputs } else { 0 };
        let computing = tokens * self.stored(first + computed);
        let workspace = (self.costs.statistics_workspace)(tokens as usize, inputs as usize, self.cross) as u64;
        let adding = tokens * self.stored(first + inputs) + workspace;
        let advancing = if float && advances { tokens * self.stored(2 * inputs + self.hidden) } else { 0 };
        computing.max(adding).max(advancing)
    }

    /// Embedding table and tower throughout; chunk by chunk the tower's activations, then the features and their stream.
    pub(super) fn vision(&self, embedder: &EmbedderSize) -> Step {
        let mut before = 0;
        let mut worst = ("embedding", [0, 0]);
        for chunk in &self.job.chunks {
            let (tokens, patches) = (chunk.tokens as u64, chunk.patches as u64);
            let per_patch = embedder.patch_values + 4 * embedder.width + embedder.inner;
            // The stream, both norms and the MLP as results; the rotary tables of heads up to 80 wide.
            let encoding = patches * (self.stored(per_patch as u64) + F32 * 80) + Self::tables(patches);
            let features = self.features(chunk, 1 + self.job.deepstack);
            // What was encoded before, where not all is encoded together.
            let encoding = encoding + features;
            let features = features + Self::tables(tokens);
            let own = self.chunk(chunk);
            for (step, at) in [("encoding images", [before, encoding]), ("embedding", [before + own, features])] {
                if at[0] + at[1] > worst.1[0] + worst.1[1] {
                    worst = (step, at);
                }
            }
            if !self.streamed {
                before += own;
            }
        }
        let (step, [held, temporary]) = worst;
        let entries = vec![
            entry("embedding table", self.stored(embedder.table as u64)),
            entry("vision tower", self.stored(embedder.tower as u64)),
            entry("residual streams so far", held),
            entry("intermediate results of a chunk", temporary),
        ];
        (step.into(), entries)
    }
}

fn entry(name: &str, bytes: u64) -> Entry {
    Entry { name: name.into(), bytes }
}
