//! What evaluating a model takes: where its weights are, which samples it answers together, memory, and work.

mod size;

pub(crate) use size::ModelSize;

use crate::data::chunks::{chunks, chunks_of_tokens};
use crate::data::sequence::Sequence;
use crate::device::{ModelOps, Work};
use crate::model::language_model::{HEAD_ROWS, Residency};
use crate::plan::{
    ChunkSize, Costs, Entry, F32, HostPlan, Load, Process, StagePlan, Step, bytes_of, encoding, entry, told,
};
use crate::progress::{Stage, human_bytes};
use anyhow::{Result, ensure};
use serde::Serialize;
use std::ops::Range;

/// Bytes of weights up to which models are held where the device's memory is the host's. Larger ones are read from their files for
/// every pass.
const HELD_BYTES: u64 = 1 << 30;

/// What evaluating a larger one may take beyond the size of its file. As many of its blocks are held as that leaves room for.
const BESIDE_FILE: u64 = 1_500_000_000;

/// Most bytes of caches, residual streams, image features and logits of samples that are answered together; what takes more is
/// answered alone.
const RUN_BYTES: u64 = 512 << 20;

/// What a model keeps beside its weights: gaps that loading leaves between them, and what its tokenizer makes as it meets text (2 to
/// 4 MB were measured on small models).
const KEPT_BYTES: u64 = 3 << 20;

/// Most tokens that go through a block together; a longer sample goes alone.
pub(crate) const CHUNK_TOKENS: u64 = 2048;

/// A cache that grows has room for more.
const CACHE_ROOM: f64 = 1.125;

/// Samples that are answered together.
#[derive(Clone, Debug, Default)]
struct Run {
    chunks: Vec<ChunkSize>,
    /// Samples.
    samples: u64,
    /// Tokens of right answers.
    answers: u64,
    /// Tokens that may be decoded, of all samples.
    decoded: u64,
    /// Passes that decoding is expected to take.
    steps: u64,
    /// Bytes of images and tokens on the host.
    data: u64,
}

/// What an evaluation takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvaluationPlan {
    /// Samples that were counted.
    pub samples: usize,
    /// Where the model's weights are between passes; a reference, which decodes nothing, holds no block where they are streamed.
    pub weights: Residency,
    /// Memory of the process on the host.
    pub host: HostPlan,
    /// Memory of a device that has its own, at the worst step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<StagePlan>,
    /// The work.
    pub load: Load,
}

impl EvaluationPlan {
    /// The plan in lines.
    pub fn lines(&self) -> Vec<String> {
        let device = self
            .device
            .iter()
            .flat_map(|stage| [format!("GPU memory: {}", human_bytes(stage.bytes))].into_iter().chain(stage.lines()));
        device.chain(self.host.lines()).collect()
    }
}

/// Counts an evaluation while its samples become known.
pub(crate) struct Planner<'a> {
    costs: Costs<'a>,
    limit: Option<u64>,
    model: ModelSize,
    reference: Option<ModelSize>,
    decode: bool,
    residency: Residency,
    process: Process,
    /// The worst step so far: on a device of its own, and on the host.
    steps: [Step; 2],
    load: Load,
    samples: usize,
}

impl<'a> Planner<'a> {
    /// Planner of a model without samples yet. Errors, with the numbers, where there is not enough memory for it.
    pub(crate) fn new<D: ModelOps>(
        device: &'a D,
        model: ModelSize,
        reference: Option<ModelSize>,
        decode: bool,
    ) -> Result<Self> {
        Self::counting(Costs::of(device), device.memory_limit(), model, reference, decode)
    }

    fn counting(
        costs: Costs<'a>,
        limit: Option<u64>,
        model: ModelSize,
        reference: Option<ModelSize>,
        decode: bool,
    ) -> Result<Self> {
        let all = costs.stored([Some(&model), reference.as_ref()].into_iter().flatten().map(ModelSize::values).sum());
        let held = match limit {
            None if costs.host => all <= HELD_BYTES,
            None => true,
            // Half as much again for what goes through.
            Some(limit) => all + all / 2 <= limit,
        };
        let mut planner = Self {
            costs,
            limit,
            model,
            reference,
            decode,
            residency: if held { Residency::Resident } else { Residency::Streamed { held: 0 } },
            process: Process::with_data(),
            steps: Default::default(),
            load: Load::default(),
            samples: 0,
        };
        planner.add(&Run::default())?;
        if !held {
            let held = planner.room_for_blocks();
            planner.residency = Residency::Streamed { held };
            planner.add(&Run::default())?;
        }
        Ok(planner)
    }

    /// How many blocks may be held beside what the steps take at most.
    fn room_for_blocks(&self) -> usize {
        let tokens = CHUNK_TOKENS as usize;
        let inside = self.in_a_block(&ChunkSize { tokens, longest: tokens, ..ChunkSize::default() });
        let (most, there) = match self.limit {
            Some(limit) => (limit, &self.steps[0]),
            None => {
                let total = self.host_plan(Step::default()).total_bytes.unwrap_or(u64::MAX);
                ((self.model.file + BESIDE_FILE).min(total), &self.steps[1])
            }
        };
        let room = most.saturating_sub(bytes_of(there) + RUN_BYTES + inside);
        (room / self.costs.stored(self.model.block).max(1)).min(self.model.layers()) as usize
    }

    /// Where the weights of the model, and of the reference, are to be.
    pub(crate) fn residency(&self) -> [Residency; 2] {
        let reference = match self.residency {
            Residency::Resident => Residency::Resident,
            Residency::Streamed { .. } => Residency::Streamed { held: 0 },
        };
        [self.residency, reference]
    }

    /// Takes in some samples, with the most tokens that each may answer, and cuts them into runs that are answered together. Errors
    /// where there is not enough memory for one.
    pub(crate) fn batch(&mut self, sequences: &[Sequence], most_new: &[usize]) -> Result<Vec<Range<usize>>> {
        let image_token = self.model.config.image_token;
        let kept: u64 = sequences.iter().map(Process::data_of).sum();
        let runs = chunks(sequences.iter().zip(most_new).map(|(s, &new)| self.lasting(s, new)), RUN_BYTES);
        for run in &runs {
            let (own, new) = (&sequences[run.clone()], &most_new[run.clone()]);
            let groups = chunks_of_tokens(own, CHUNK_TOKENS);
            let size = |group: Range<usize>| {
                ChunkSize::of(&own[group].iter().collect::<Vec<_>>(), &self.model.load, image_token)
            };
            let expected = own.iter().zip(new).map(|(s, &new)| s.answer.len().min(new)).max().unwrap_or(0);
            let run = Run {
                chunks: groups.into_iter().map(size).collect(),
                samples: own.len() as u64,
                answers: own.iter().map(|s| s.answer.len() as u64).sum(),
                decoded: if self.decode { new.iter().map(|&new| new as u64).sum() } else { 0 },
                steps: if self.decode { expected as u64 } else { 0 },
                // Prompts have their images once more, and so has what the reference is asked.
                data: kept + own.iter().map(Process::data_of).sum::<u64>(),
            };
            self.samples += own.len();
            self.add(&run)?;
        }
        Ok(runs)
    }

    pub(crate) fn plan(self) -> EvaluationPlan {
        let [device, host] = self.steps.clone();
        EvaluationPlan {
            samples: self.samples,
            weights: self.residency,
            host: self.host_plan(host),
            device: (!self.costs.host).then(|| StagePlan::new(Stage::Evaluate, device)),
            load: self.load,
        }
    }

    fn host_plan(&self, step: Step) -> HostPlan {
        let data = entry("program, tokenizer and questions, at most", self.process.peak);
        let data = StagePlan::new(Stage::Data, ("reading data".into(), vec![data]));
        HostPlan::new(vec![data, StagePlan::new(Stage::Evaluate, step)], &self.process)
    }

    /// Bytes of a sample that last from pass to pass.
    fn lasting(&self, sequence: &Sequence, new: usize) -> u64 {
        let tokens = sequence.tokens.len() as u64;
        let new = if self.decode { new as u64 } else { 0 };
        let features = (1 + self.model.load.deepstack as u64) * tokens;
        let logits = sequence.answer.len() as u64 * self.model.config.decoder.vocab as u64 * F32;
        self.caches(tokens + new)
            + self.streams(tokens)
            + self.costs.stored(features * self.model.hidden())
            + logits * if self.reference.is_some() { 2 } else { 1 }
    }

    fn caches(&self, tokens: u64) -> u64 {
        let (_, key) = self.model.widths();
        let bytes = self.costs.stored(tokens * self.model.layers() * 2 * key);
        if self.decode { (bytes as f64 * CACHE_ROOM) as u64 } else { 0 }
    }

    fn streams(&self, tokens: u64) -> u64 {
        tokens * (self.costs.stored(self.model.hidden()) + F32 * self.model.config.decoder.attention.head_dim as u64)
    }

    /// What one chunk takes in a block beside what lasts.
    fn in_a_block(&self, chunk: &ChunkSize) -> u64 {
        let decoder = &self.model.config.decoder;
        let (hidden, inner) = (self.model.hidden(), decoder.intermediate as u64);
        let (query, key) = self.model.widths();
        let (tokens, longest) = (chunk.tokens, chunk.longest);
        let rows = |values: u64| self.costs.stored(tokens as u64 * values);
        let attention = Work::Attention { tokens, longest, shape: decoder.attention };
        // Of a sample that attends to its cache: its queries, and what comes of them.
        let own = if self.decode { self.costs.stored(longest as u64 * 2 * query) } else { rows(query) };
        let attending = rows(hidden + query + 2 * key) + own + self.costs.workspace(attention);
        let gated = rows(hidden + 3 * inner)
            + self.costs.workspace(Work::Linear { inner: hidden as usize, outputs: inner as usize });
        let down = rows(inner + hidden)
            + self.costs.workspace(Work::Linear { inner: inner as usize, outputs: hidden as usize });
        attending.max(gated).max(down)
    }

    /// Counts a run, on the model and on the reference.
    fn add(&mut self, run: &Run) -> Result<()> {
        let models = [Some(&self.model), self.reference.as_ref()];
        let mut found = self.steps.clone();
        let mut load = Load::default();
        for (i, model) in models.into_iter().enumerate() {
            let Some(model) = model else { continue };
            for (name, device, host) in self.steps_of(model, run, i == 1) {
                let (device, host) = match self.costs.host {
                    true => (Vec::new(), [host, device].concat()),
                    false => (device, host),
                };
                for (worst, entries) in found.iter_mut().zip([device, host]) {
                    let step = (name.to_owned(), entries);
                    if bytes_of(&step) > bytes_of(worst) {
                        *worst = step;
                    }
                }
            }
            load = load + self.load_of(model, run, i == 1);
        }
        let larger = bytes_of(&found[1]) > bytes_of(&self.steps[1]);
        self.steps = found;
        self.load = self.load + load;
        if let Some(limit) = self.limit {
            let (step, entries) = &self.steps[0];
            ensure!(
                bytes_of(&self.steps[0]) <= limit,
                "the evaluation does not fit into {} of GPU memory: {step} takes {} ({}); allow more with --max-gpu-memory where the \
                 GPU has it, or evaluate on the CPU",
                human_bytes(limit),
                human_bytes(bytes_of(&self.steps[0])),
                told(entries)
            );
        }
        if larger {
            let remedy = "smaller images (--max-pixels) or shorter samples take less";
            self.host_plan(self.steps[1].clone()).check("the evaluation", remedy)?;
        }
        Ok(())
    }

    /// Steps with what they hold on the device, and on the host.
    fn steps_of(&self, model: &ModelSize, run: &Run, second: bool) -> Vec<(&'static str, Vec<Entry>, Vec<Entry>)> {
        let costs = &self.costs;
        let (streamed, hidden) = (self.residency != Residency::Resident, model.hidden());
        let all = [Some(&self.model), self.reference.as_ref()].into_iter().flatten();
        let held = match self.residency {
            Residency::Resident => all.map(ModelSize::values).sum(),
            Residency::Streamed { held } => all.map(ModelSize::hidden).sum::<u64>() + held as u64 * self.model.block,
        };
        let weights = entry("weights", costs.stored(held));
        let models = if self.reference.is_some() { 2 } else { 1 };
        let process = entry("program, tokenizer and questions", self.process.held + models * KEPT_BYTES);
        let images = entry("images of some samples", run.data);
        let vocab = model.config.decoder.vocab as u64;
        let before = if second { F32 * run.answers * vocab } else { 0 };
        let host = |more: Vec<Entry>| [vec![process.clone(), images.clone()], more].concat();
        let [of_tower, of_block, of_head] = model.mapped;
        let way = |name: &str, values: u64, mapped: u64| {
            // On the host the float32 is what is held.
            entry(name, if costs.host { mapped } else { costs.loading(values, mapped) })
        };

        let mut steps = Vec::new();
        if !streamed {
            let mapped = way("the largest tensor on its way", model.head(), of_head);
            steps.push(("loading", vec![weights.clone()], vec![process.clone(), mapped]));
        }
        let features =
            |chunk: &ChunkSize| costs.stored((1 + model.load.deepstack as u64) * chunk.image_tokens as u64 * hidden);
        let all_features = run.chunks.iter().map(features).sum::<u64>();
        let tower = entry("vision tower", if streamed { costs.stored(model.tower) } else { 0 });
        if all_features > 0 {
            let most = run.chunks.iter().map(|chunk| encoding(costs, chunk, &model.load, features(chunk))).max();
            let own = entry("features of images on their way", all_features + most.unwrap_or(0));
            let pixels = run.chunks.iter().map(|chunk| chunk.patches * model.load.patch).max().unwrap_or(0) as u64;
            let pixels = if costs.host { 0 } else { pixels * (F32 + costs.element_bytes) };
            let more = vec![entry("logits", before), entry("patches of a chunk", pixels)];
            steps.push(("encoding images", vec![weights.clone(), tower, own], host(more)));
        } else if streamed && model.load.width > 0 && run.samples == 0 {
            let mapped = way("a tensor on its way", 0, of_tower);
            steps.push(("loading the vision tower", vec![weights.clone(), tower], vec![process.clone(), mapped]));
        }
        let tokens: u64 = run.chunks.iter().map(|chunk| chunk.tokens as u64).sum();
        let caches = if second { 0 } else { self.caches(tokens + run.decoded) };
        let lasting = |with_caches: u64| {
            entry("samples that are answered together", all_features + self.streams(tokens) + with_caches)
        };
        let loaded =
            streamed && (second || self.residency != Residency::Streamed { held: model.config.decoder.layers });
        let block = entry("weights of a block", if loaded { costs.stored(model.block) } else { 0 });
        let inside = run.chunks.iter().map(|chunk| self.in_a_block(chunk)).max().unwrap_or(0);
        let loading = |name: &str, values: u64, mapped: u64| match streamed {
            true => way(name, values, mapped + (values as f64 * model.unpacking) as u64),
            false => entry(name, 0),
        };
        let on_way = loading("a layer on its way", model.layer, of_block);
        let own = vec![weights.clone(), block, lasting(caches), entry("intermediate results", inside)];
        steps.push(("a block", own, host(vec![entry("logits", before), on_way])));

        let part = (HEAD_ROWS as u64 * hidden).min(model.head());
        let head = entry("rows of the output head", if streamed { costs.stored(part) } else { 0 });
        // Of a chunk, as they come from the device and cut into samples.
        let most = run.chunks.iter().map(|chunk| chunk.tokens as u64).max().unwrap_or(0).min(run.answers);
        let logits = F32 * vocab * (run.answers + 2 * most.max(run.samples));
        let own = vec![weights, head, lasting(0)];
        let on_way = loading("rows on their way", part, part * F32 / 2);
        steps.push(("logits", own, host(vec![entry("logits", before + logits), on_way])));
        steps
    }

    /// Work of a run on a model; the reference decodes nothing.
    fn load_of(&self, model: &ModelSize, run: &Run, second: bool) -> Load {
        let decodes = self.decode && !second;
        let decoder = &model.config.decoder;
        let ((query, key), hidden) = (model.widths(), model.hidden() as f64);
        let sum = |of: fn(&ChunkSize) -> usize| run.chunks.iter().map(of).sum::<usize>() as f64;
        let (tokens, pairs, layers) = (sum(|chunk| chunk.tokens), sum(|chunk| chunk.pairs), decoder.layers as f64);
        // Prompts are whole conversations but for their answers.
        let times = if decodes { 2.0 } else { 1.0 };
        let (steps, samples) = if decodes { (run.steps as f64, run.samples as f64) } else { (0.0, 0.0) };
        let through = times * tokens + steps * samples;
        let computed = 3.0 * hidden + 2.0 * (query + key) as f64 + 5.0 * decoder.intermediate as f64;
        let asked = run.answers as f64 + samples * (1.0 + steps);
        let passes = if run.chunks.is_empty() { 0.0 } else { times + steps };
        let read = match self.residency {
            Residency::Streamed { held } => {
                let held = if second { 0.0 } else { held as f64 };
                passes * ((layers - held) * model.block as f64 + model.head() as f64)
            }
            Residency::Resident => 0.0,
        };
        // With few rows the weights are what is read.
        let few = passes * layers * model.block as f64;
        let logits = Load {
            products: 2.0 * through * layers * model.block as f64 + 2.0 * asked * model.head() as f64,
            attention: layers * 2.0 * query as f64 * (times * pairs + steps * tokens),
            values: layers * through * computed + 8.0 * run.answers as f64 * decoder.vocab as f64 + read + few,
            ..Load::default()
        };
        let images = run.chunks.iter().any(|chunk| chunk.all_patches > 0);
        match images {
            true => Load::of_vision(&model.load, model.tower as usize, &run.chunks) + logits,
            false => logits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::device::cpu::Cpu;
    use crate::model::families;
    use std::path::Path;

    /// A small model, its vision tower as large as is asked for.
    fn model(tower: u64) -> ModelSize {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/model/flat-tied-bf16");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let config = families::of::<Cpu>(&checkpoint).unwrap().config(&checkpoint).unwrap();
        ModelSize { tower, ..ModelSize::of::<Cpu>(&checkpoint, &config, None).unwrap() }
    }

    fn message(planner: Result<Planner<'_>>) -> String {
        planner.err().map_or_else(|| "no error".into(), |error| format!("{error:#}"))
    }

    #[test]
    fn what_cannot_fit_is_refused_with_the_numbers() {
        // 4 TB: no machine that runs this has them.
        let said = message(Planner::counting(Costs::of(&Cpu), None, model(1 << 40), None, true));
        for part in ["the evaluation does not fit into the ", "loading the vision tower takes 4.00 TiB", "--max-pixels"]
        {
            assert!(said.contains(part), "{part:?} is not in {said}");
        }
        let said = message(Planner::counting(Costs::plain(2), Some(1 << 20), model(1 << 20), None, true));
        for part in ["does not fit into 1.00 MiB of GPU memory", "vision tower 2.00 MiB"] {
            assert!(said.contains(part), "{part:?} is not in {said}");
        }
    }

    #[test]
    fn weights_are_held_while_they_leave_room() {
        let residency =
            |limit, tower| Planner::counting(Costs::plain(2), Some(limit), model(tower), None, true).unwrap();
        assert_eq!(residency(1 << 30, 1 << 20).residency(), [Residency::Resident; 2]);
        // Half as much again must be free, or else room for what is answered together.
        let streamed = |held| [Residency::Streamed { held }, Residency::Streamed { held: 0 }];
        assert_eq!(residency(7 << 20, 3 << 20).residency(), streamed(0));
        assert_eq!(residency(11 << 28, 1 << 30).residency(), streamed(2));
    }
}
