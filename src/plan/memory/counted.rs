//! Counting by running: the real embedder, the real block quantizer and the real comparison on a device that only counts.

use super::beside;
use crate::device::counting::{CountedTensor, Counting, Peak};
use crate::device::{ByKind, Device};
use crate::evaluate::paths::{self, Paths};
use crate::heap;
use crate::model::config::DecoderConfig;
use crate::model::decoder::{Block, Projection};
use crate::model::families::ModelConfig;
use crate::model::language_model::{Embedder, HEAD_ROWS};
use crate::model::source::Weights;
use crate::plan::{Entry, F32, StagePlan, Step, Subject, SubjectChunk, entry, worst};
use crate::progress::{Stage, Stop};
use crate::quantize::block::{Activations, BlockQuantizer, Chunk, embedded, labels, rows_of_paths};
use crate::quantize::settings::{ImportancePower, Solver};
use crate::quantize::solve::rounding_bytes;
use crate::tensor::Float;
use anyhow::Result;

/// A step of a run at its worst moment.
#[derive(Clone, Debug)]
pub struct CountedStep {
    /// The stage that it belongs to.
    pub stage: Stage,
    /// The step's name, and what the device holds.
    pub device: Step,
    /// What the host has at most beside the device's tensors.
    pub on_host: Vec<Entry>,
}

/// What a run came to on a counting device.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    /// Steps, in their order.
    pub steps: Vec<CountedStep>,
    /// Page-locked host memory.
    pub parked_bytes: u64,
    /// Work on the images.
    pub vision: ByKind,
    /// Work on all blocks, and on what is asked behind the last.
    pub blocks: ByKind,
}

impl Counted {
    /// Stages that take memory on the device, in their order, each at its worst step.
    pub fn stages(&self) -> Vec<StagePlan> {
        let of = |stage: Stage| self.steps.iter().filter(move |step| step.stage == stage);
        let there = [Stage::Vision, Stage::Blocks].into_iter().filter(|&stage| of(stage).next().is_some());
        there.map(|stage| StagePlan::new(stage, worst(of(stage).map(|step| step.device.clone())))).collect()
    }
}

/// A run as it is counted.
struct Course<'a> {
    subject: &'a Subject<'a>,
    device: Counting,
    /// Type of the weights in their files.
    stored: Float,
    activations: Activations,
    chunks: Vec<Chunk<CountedTensor>>,
    steps: Vec<CountedStep>,
}

/// What is asked of the output head is asked of so many rows of it in the plan: parts of a head are alike.
fn with_part_of_head(config: &ModelConfig) -> ModelConfig {
    let vocab = config.decoder.vocab.min(HEAD_ROWS);
    ModelConfig { decoder: DecoderConfig { vocab, ..config.decoder.clone() }, ..config.clone() }
}

impl Subject<'_> {
    /// Goes through the run in the place of `device`. Errors as the run does of shapes that do not go together.
    pub fn count(&self, device: &Counting, activations: Activations) -> Result<Counted> {
        let stored = self.checkpoint.float_type(&self.config.table_name())?;
        let device = device.afresh().reading(stored);
        let mut course = Course { subject: self, device, stored, activations, chunks: Vec::new(), steps: Vec::new() };
        let vision = course.encode()?;
        let layers = self.config.decoder.layers;
        let mut blocks = ByKind::default();
        // All blocks but the first are alike.
        for (index, times) in [(0, 1), (1, layers.saturating_sub(1))].into_iter().take(layers) {
            blocks = blocks + course.block(index)? * times as f64;
        }
        blocks = blocks + course.compare()?;
        Ok(Counted { parked_bytes: course.device.parked_bytes(), steps: course.steps, vision, blocks })
    }
}

impl Course<'_> {
    /// The embedder, all samples through it; its work.
    fn encode(&mut self) -> Result<ByKind> {
        let Self { subject, device, .. } = &*self;
        if subject.chunks.is_empty() {
            return Ok(ByKind::default());
        }
        let device = device.clone();
        let label = device.label(labels::TOWER);
        let embedder = Embedder::load(&device, subject.checkpoint, subject.config, subject.images)?;
        drop(label);
        self.note(Stage::Vision, |_| "loading".into(), "the largest tensor on its way");
        for own in &self.subject.chunks {
            let SubjectChunk { sequences, held_out, .. } = own;
            let with_float = self.subject.with_float(own);
            let images = sequences.iter().any(|sequence| !sequence.images.is_empty());
            device.step(if images { "encoding images" } else { "embedding" });
            let mut chunk = embedded(&device, &embedder, sequences, self.subject.config.image_token, with_float)?;
            chunk.held_out = *held_out;
            if self.activations == Activations::Streamed {
                chunk.park(&device)?;
            }
            self.chunks.push(chunk);
        }
        self.note(Stage::Vision, |peak| peak.step.clone(), "numbers of a chunk on their way");
        drop(embedder);
        device.reset_peak();
        Ok(device.work())
    }

    /// One block; its work.
    fn block(&mut self, index: usize) -> Result<ByKind> {
        let (subject, device) = (self.subject, self.device.clone());
        let config = &subject.config.decoder;
        let weights = Weights::new(&device, subject.checkpoint);
        let load = |index| Block::load(&weights, config, &subject.config.names, index);
        let label = device.label(labels::AHEAD);
        let is_ahead = device.works_beside_host() && index + 1 < config.layers;
        let next = is_ahead.then(|| load(index + 1)).transpose()?;
        drop(label);
        // Its work is its own block's.
        let before = device.work();
        let label = device.label(labels::WEIGHTS);
        let float = load(index)?;
        if subject.solver.solver == Solver::Rtn {
            drop(label);
            self.note(Stage::Blocks, |_| "loading a block".into(), "the largest weight on its way");
            self.round();
            return Ok(since(&device, before));
        }
        let quantized = float.duplicate(&device)?;
        drop(label);
        self.note(Stage::Blocks, |_| "loading a block".into(), "the largest weight on its way");
        let stop = Stop::default();
        let mut quantizer = BlockQuantizer {
            device: &device,
            config,
            settings: subject.solver,
            importance: subject.importance,
            // All made-up factors are alike: no power changes them.
            importance_power: ImportancePower::PAPER,
            refit: subject.refit,
            activations: self.activations,
            stop: &stop,
            index,
            float,
            quantized,
        };
        // "block 1: mlp.down_proj".
        let mut name = |at: &str| device.step(at.rsplit(": ").next().unwrap_or(at));
        quantizer.run(&mut self.chunks, &mut name, &mut |_| Ok(()))?;
        self.note(Stage::Blocks, in_a_block, "numbers of a layer on their way");
        drop((quantizer, next));
        device.reset_peak();
        Ok(since(&device, before))
    }

    /// Rounding to nearest, which is done on the host, layer by layer.
    fn round(&mut self) {
        let device = self.device.clone();
        device.step("rounding");
        let _label = device.label(labels::ROUNDING);
        for (rows, cols) in Projection::ALL.map(|projection| projection.shape(&self.subject.config.decoder)) {
            let values = rows as f64 * cols as f64;
            device.add_work(ByKind { codes: values, values: 2.0 * values, ..ByKind::default() });
            drop(device.hold_on_host(rounding_bytes(rows, cols)));
        }
        self.note(Stage::Blocks, |peak| peak.step.clone(), "a layer and its codes");
    }

    /// Both paths' predictions by one part of the output head; the work of all parts.
    fn compare(&mut self) -> Result<ByKind> {
        let (subject, device, stop) = (self.subject, self.device.clone(), Stop::default());
        let before = device.work();
        device.step("comparing the paths");
        let places = subject.places.iter().map(|(chunk, rows)| (*chunk, rows.as_slice()));
        let rows = rows_of_paths(&device, &mut self.chunks, places, self.activations, &stop)?;
        let Some([float, quantized]) = rows else { return Ok(ByKind::default()) };
        let next: Vec<u32> = subject.places.iter().flat_map(|(_, rows)| rows.iter().map(|_| 0)).collect();
        let config = with_part_of_head(subject.config);
        let logits = next.len() as u64 * config.decoder.vocab as u64 * F32;
        // One path's are there while the other's come, which on the host are there twice themselves.
        let held = device.hold_on_host(if device.is_host() { 2 * logits } else { logits });
        let compared = paths::compare(&device, subject.checkpoint, &config, Paths { float, quantized, next }, &stop);
        drop(held);
        compared?;
        self.note(Stage::Blocks, |peak| peak.step.clone(), "rows of the output head on their way, logits");
        let parts = subject.config.decoder.vocab as f64 / config.decoder.vocab.max(1) as f64;
        Ok(since(&device, before) * parts)
    }

    /// Adds the step since the last one, at its peak.
    fn note(&mut self, stage: Stage, name: impl Fn(&Peak) -> String, on_host: &str) {
        let peak = self.device.peak();
        let on_host = match self.device.is_host() {
            true => "the file's pages of a tensor",
            false => on_host,
        };
        let sizes = if self.device.is_host() { self.device.sizes() } else { Vec::new() };
        let kept = entry("what the heap keeps between tensors", heap::between_arrays(sizes.into_iter()));
        let mut on_host = vec![entry(on_host, self.device.most_on_host()), kept];
        if stage == Stage::Blocks && self.device.works_beside_host() {
            on_host.extend(beside::entries(self.subject, &self.device, self.stored));
        }
        self.steps.push(CountedStep { stage, device: self.step(stage, &peak, name), on_host });
        self.device.reset_peak();
    }

    /// A peak as a step of a plan.
    fn step(&self, stage: Stage, peak: &Peak, name: impl Fn(&Peak) -> String) -> Step {
        let (solver, streamed) = (self.subject.solver.solver, self.activations == Activations::Streamed);
        let cross = solver == Solver::Gptaq;
        let told = |label: &str| match label {
            labels::WEIGHTS if solver == Solver::Rtn => "weights of a block",
            labels::WEIGHTS => "weights of a block, float and quantized",
            labels::AHEAD => "weights of the next block",
            labels::STREAMS if streamed => "residual streams of two chunks",
            labels::STREAMS if stage == Stage::Vision => "residual streams so far",
            labels::STREAMS => "residual streams of all samples",
            labels::STATISTICS if cross => "H and C",
            labels::STATISTICS => "H",
            labels::FACTORS if cross => "their copies in processing order, factored",
            labels::FACTORS => "its factor",
            labels::SOLVER => "the solver's state",
            labels::PASS => "intermediate results of a chunk",
            labels::REFIT => "H and C of the outputs",
            labels::TOWER => "vision tower",
            labels::ROUNDING => "a layer and its codes",
            _ => "what operations take for themselves",
        };
        let mut entries: Vec<Entry> = Vec::new();
        for holding in &peak.held {
            let name = told(holding.label);
            match entries.iter_mut().find(|entry| entry.name == name) {
                Some(there) => there.bytes += holding.bytes,
                None => entries.push(entry(name, holding.bytes)),
            }
        }
        (name(peak), entries)
    }
}

/// The name of the step of a block that takes most: by the layer at which it is and what is made there.
fn in_a_block(peak: &Peak) -> String {
    let at = &peak.step;
    match peak.during {
        labels::FACTORS => format!("factoring {at}"),
        labels::SOLVER => format!("solving {at}"),
        _ if peak.bytes_of(labels::REFIT) > 0 => format!("refitting {at}"),
        labels::PASS | labels::STATISTICS if at.contains('.') => format!("statistics of {at}"),
        _ => at.clone(),
    }
}

/// Work since a moment.
fn since(device: &Counting, before: ByKind) -> ByKind {
    device.work() + before * -1.0
}
