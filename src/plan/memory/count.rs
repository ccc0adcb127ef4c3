//! Counting: [`BlockQuantizer`](crate::quantize::block), [`solve`](crate::quantize::solve) and
//! [`importance`](crate::quantize::importance), allocation by allocation.

use crate::device::{AttentionShape, BLOCK, LOSS_SHRINKS, LOSS_STRETCHES, Work};
use crate::model::decoder::Projection;
use crate::model::language_model::HEAD_ROWS;
use crate::plan::{ChunkSize, Costs, Entry, F32, Step, encoding, entry, tables, worst};
use crate::plan::{EmbedderSize, Job};
use crate::quantize::block::Activations;
use crate::quantize::block::needs_float_path;
use crate::quantize::order::{ColumnSpan, spans};
use crate::quantize::settings::{CrossTerm, Grid, Importance, Refit, Solver};

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
    attention: AttentionShape,
}

impl<'a> Counter<'a> {
    pub(super) fn new(job: &'a Job<'a>, costs: &'a Costs<'a>, activations: Activations) -> Self {
        let shape = &job.shape;
        Self {
            job,
            costs,
            streamed: activations == Activations::Streamed,
            cross: job.solver.solver == Solver::Gptaq,
            both_paths: needs_float_path(job.solver, job.importance, job.refit),
            hidden: shape.hidden as u64,
            inner: shape.intermediate as u64,
            query: (shape.heads * shape.head_dim) as u64,
            key: (shape.kv_heads * shape.head_dim) as u64,
            attention: AttentionShape {
                heads: shape.heads,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                causal: true,
            },
        }
    }

    fn workspace(&self, work: Work) -> u64 {
        self.costs.workspace(work)
    }

    /// Bytes of weights or activations.
    fn stored(&self, values: u64) -> u64 {
        self.costs.stored(values)
    }

    /// Bytes of a chunk's residual streams and rotary tables.
    fn streams(&self, chunk: &ChunkSize) -> u64 {
        let paths = if self.both_paths || chunk.checked { 2 } else { 1 };
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

    /// A pass over all chunks at its worst: what is held of them, and what `temporary` says of the chunk at work, by tokens.
    /// A pass that leaves the block brings a level of image features.
    fn pass(&self, leaves: bool, temporary: impl Fn(&ChunkSize) -> u64) -> [Entry; 2] {
        let chunks = &self.job.chunks;
        let levels = self.job.deepstack.min(usize::from(leaves));
        let brought = |chunk: &ChunkSize| self.streams(chunk) + self.features(chunk, levels);
        let at = |i: usize| {
            let held = match self.streamed {
                true => chunks[i..].iter().take(2).map(brought).sum(),
                false => self.all_chunks(),
            };
            (held, temporary(&chunks[i]) + tables(chunks[i].tokens as u64))
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
            let (inputs, outputs) = (self.hidden, self.inner);
            let host = if self.costs.host { Self::rounding(inputs, outputs) } else { 0 };
            return ("rounding".into(), vec![entry("weights of a block", block), entry("a layer and its codes", host)]);
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
            steps.push(("importance".to_owned(), self.pass(false, |chunk| self.importance(chunk)).to_vec()));
        }
        for (projection, inputs, _, computed, advances) in sets {
            let temporary = |chunk: &ChunkSize| {
                let float = (self.both_paths || chunk.checked) && (self.cross || advances);
                self.accumulation(chunk, inputs, computed, float, advances)
            };
            let [held, temporaries] = self.pass(projection == Projection::Down, temporary);
            let (statistics, _) = self.statistics(inputs);
            steps.push((format!("statistics of {}", projection.module()), vec![held, temporaries, statistics]));
        }
        for (projection, inputs, outputs, ..) in sets {
            let module = projection.module();
            let (statistics, hessian) = self.statistics(inputs);
            let name = if self.cross { "their copies in processing order, factored" } else { "its factor" };
            let factors = entry(name, self.factors(inputs));
            let entries = vec![self.between_passes(), statistics, factors.clone()];
            steps.push((format!("factoring {module}"), entries));
            let others = match (self.costs.host, projection) {
                // The codes of the layer that was solved with the same statistics are still there.
                (true, Projection::Gate) => inputs * outputs,
                _ => 0,
            };
            let state = entry("the solver's state", self.solver_state(inputs, outputs) + others);
            let entries = vec![self.between_passes(), hessian, factors, state];
            steps.push((format!("solving {module}"), entries));
        }
        if self.job.refit == Refit::Residual {
            let hessian = (self.costs.triangle)(hidden as usize);
            let sums = entry("H and C of the outputs", hessian + F32 * hidden * hidden);
            for (projection, inputs, _, computed, _) in sets.into_iter().filter(|(.., advances)| *advances) {
                let [held, temporaries] = self.pass(false, |chunk| self.refitting(chunk, inputs, computed));
                steps.push((format!("refitting {}", projection.module()), vec![held, temporaries, sums.clone()]));
            }
        }
        let (step, entries) = worst(steps);
        let in_a_block = (step, [weights].into_iter().chain(entries).collect());
        worst([in_a_block, self.comparison()])
    }

    /// [`compare`](crate::quantize::check::compare), behind the last block: what is left of it is in the residual streams.
    fn comparison(&self) -> Step {
        let tokens = self.job.check.tokens as u64;
        let rows = |copies: u64| {
            let bytes = copies * self.stored(tokens * self.hidden);
            entry("tokens that are predicted, on both paths", bytes + tables(tokens))
        };
        // While a path's rows grow or are normalised, they are there once more.
        let one = self.job.chunks.iter().map(|chunk| self.streams(chunk)).max().unwrap_or(0);
        let gathering = vec![self.held(if self.streamed { one } else { self.all_chunks() }), rows(3)];
        let part = self.head_part();
        let head = entry("rows of the output head", self.stored(part * self.hidden));
        let logits = tokens * part * if self.costs.host { 3 * F32 } else { self.costs.element_bytes };
        let workspace = if tokens > 0 { self.workspace(Work::Linear { inner: self.job.shape.hidden }) } else { 0 };
        let predicting = vec![self.between_passes(), rows(2), head, entry("their logits", logits + workspace)];
        worst([gathering, predicting].map(|entries| ("comparing the paths".into(), entries)))
    }

    /// Rows of the output head that are looked at together.
    pub(super) fn head_part(&self) -> u64 {
        match self.job.check.tokens {
            0 => 0,
            _ => self.job.check.vocab.min(HEAD_ROWS) as u64,
        }
    }

    /// H with C, where there is one, and H alone.
    fn statistics(&self, inputs: u64) -> (Entry, Entry) {
        let hessian = (self.costs.triangle)(inputs as usize);
        let cross = if self.cross { F32 * inputs * inputs } else { 0 };
        (entry(if self.cross { "H and C" } else { "H" }, hessian + cross), entry("H", hessian))
    }

    /// What round-to-nearest keeps of the widest layer on the host: its weights brought over and their residuals, the codes by
    /// groups and as they are written.
    pub(super) fn rounding(inputs: u64, outputs: u64) -> u64 {
        inputs * outputs * (2 * F32 + 2)
    }

    /// H and, for GPTAQ, C in processing order.
    fn squares(&self, inputs: u64) -> u64 {
        F32 * inputs * inputs * if self.cross { 2 } else { 1 }
    }

    /// The factor and the cross term with their diagonal blocks, the diagonal, and the order.
    fn factors(&self, inputs: u64) -> u64 {
        let blocks = F32 * inputs * BLOCK as u64 * if self.cross { 2 } else { 1 };
        let workspace = self.workspace(Work::Factor { features: inputs as usize });
        self.squares(inputs) + blocks + 2 * F32 * inputs + F32 * (BLOCK * BLOCK) as u64 + workspace
    }

    /// `SolveState` and the codes of all blocks; a span's last, narrower part is made while the one before is there.
    fn solver_state(&self, inputs: u64, outputs: u64) -> u64 {
        let solver = self.job.solver;
        // A group that does not divide the inputs is refused by the solver, with better words than here.
        let group = solver.group_columns(inputs as usize).max(1);
        let spans = spans(inputs as usize, group, BLOCK);
        let width = |span: Option<&ColumnSpan>| span.map_or(0, |span| (span.end - span.start) as u64);
        let (first, last) = (width(spans.first()), width(spans.last()));
        let narrower = if last < first { last } else { 0 };
        let shift = self.cross && solver.cross_term == CrossTerm::Quantized;
        let whole = 1 + u64::from(self.cross) + u64::from(shift);
        let of_span = first * (1 + u64::from(self.cross)) + narrower;
        // A group wider than a block is brought up to date once more, for its grid, where it is a span; the search for the
        // least loss keeps a range, a grid and its candidates' losses a row.
        let losses = (LOSS_SHRINKS + 2 * LOSS_STRETCHES.len()) as u64;
        let search = if solver.grid == Grid::Loss { 2 + 2 + losses } else { 0 };
        let grid = match group > BLOCK {
            true if (group as u64) < inputs => first + search,
            true => search,
            false => 0,
        };
        // A row's codes, a scale and a zero a group, an error a block, each beginning at a multiple of 256 bytes.
        let blocks: usize = spans.iter().map(|span| span.blocks.len()).sum();
        let groups = blocks.max(inputs as usize / group) as u64;
        let codes = outputs * (inputs + 5 * groups + 8 * blocks as u64) + 4 * 256 * blocks as u64;
        let carrying = self.workspace(Work::Carry { features: inputs as usize, columns: first as usize });
        let solving = F32 * outputs * (inputs * whole + of_span + grid) + codes + carrying;
        // On the host the codes are put together from their blocks.
        let assembling = if self.costs.host { outputs * (F32 * inputs + inputs) + codes } else { 0 };
        solving.max(assembling)
    }

    /// [`attention_importance`](crate::quantize::importance::attention_importance) in its backward pass; while projections get
    /// their bias it holds less.
    fn importance(&self, chunk: &ChunkSize) -> u64 {
        let values = 4 * self.hidden + 5 * self.query + 4 * self.key;
        let (tokens, longest, shape) = (chunk.tokens, chunk.longest, self.attention);
        tokens as u64 * self.stored(values) + self.workspace(Work::AttentionBackward { tokens, longest, shape })
    }

    /// A chunk on its way into the statistics: the second input is computed while the first is there, then both are added,
    /// then the float path goes on.
    fn accumulation(&self, chunk: &ChunkSize, inputs: u64, computed: u64, float: bool, advances: bool) -> u64 {
        let tokens = chunk.tokens as u64;
        let first = if float { inputs } else { 0 };
        let computing = self.computing(chunk, inputs, first, computed, advances);
        let features = inputs as usize;
        let workspace = self.workspace(Work::Statistics { tokens: chunk.tokens, features, cross: self.cross });
        let adding = tokens * self.stored(first + inputs) + workspace;
        let advancing = match float && advances {
            true => tokens * self.stored(2 * inputs + self.hidden) + self.workspace(Work::Linear { inner: features }),
            false => 0,
        };
        computing.max(adding).max(advancing)
    }

    /// A chunk's inputs of a set of layers while they are computed, `first` of another path being there.
    fn computing(&self, chunk: &ChunkSize, inputs: u64, first: u64, computed: u64, advances: bool) -> u64 {
        let tokens = chunk.tokens as u64;
        let (shape, longest) = (self.attention, chunk.longest);
        let own = match advances {
            true if inputs == self.inner => self.workspace(Work::Linear { inner: self.hidden as usize }),
            true => self.workspace(Work::Attention { tokens: chunk.tokens, longest, shape }),
            false => 0,
        };
        let computing = tokens * self.stored(first + computed) + own;
        if advances && inputs != self.inner {
            // Queries, keys and values get their bias before anything is attended.
            let projecting = tokens * self.stored(first + computed - self.query);
            return computing.max(projecting + self.bias(chunk.tokens, self.query.max(self.key)));
        }
        computing
    }

    /// A chunk's outputs of a layer that writes to the residual stream, and what is lacking there, on their way into sums.
    fn refitting(&self, chunk: &ChunkSize, inputs: u64, computed: u64) -> u64 {
        let tokens = chunk.tokens as u64;
        let putting_out =
            tokens * self.stored(inputs + self.hidden) + self.workspace(Work::Linear { inner: inputs as usize });
        let sums = Work::Statistics { tokens: chunk.tokens, features: self.hidden as usize, cross: true };
        let adding = tokens * self.stored(2 * self.hidden) + self.workspace(sums);
        // The outputs, how far the paths are apart, and what both make.
        let differing = tokens * self.stored(3 * self.hidden);
        self.computing(chunk, inputs, 0, computed, true).max(putting_out).max(differing).max(adding)
    }

    fn bias(&self, rows: usize, outputs: u64) -> u64 {
        self.workspace(Work::Bias { rows, outputs: outputs as usize })
    }

    /// The tower throughout; chunk by chunk its activations, then the features and their stream.
    pub(super) fn vision(&self, embedder: &EmbedderSize) -> Step {
        let mut before = 0;
        let mut worst = ("embedding", [0, 0]);
        for chunk in &self.job.chunks {
            let features = self.features(chunk, 1 + self.job.deepstack);
            let encoding = encoding(self.costs, chunk, &embedder.load, features);
            let features = features + tables(chunk.tokens as u64);
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
            entry("vision tower", self.stored(embedder.tower as u64)),
            entry("residual streams so far", held),
            entry("intermediate results of a chunk", temporary),
        ];
        (step.into(), entries)
    }
}
