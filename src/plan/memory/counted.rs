//! Counting by running: the real embedder, the real block quantizer and the real comparison on a device that only counts.

use crate::checkpoint::Checkpoint;
use crate::data::sequence::Sequence;
use crate::device::counting::{CountedTensor, Counting, Peak};
use crate::device::{ByKind, Device};
use crate::evaluate::paths::{self, Paths};
use crate::model::config::DecoderConfig;
use crate::model::decoder::Block;
use crate::model::families::ModelConfig;
use crate::model::language_model::{Embedder, HEAD_ROWS};
use crate::model::source::Weights;
use crate::plan::{Entry, F32, StagePlan, Step, bytes_of, entry};
use crate::progress::{Stage, Stop};
use crate::quantize::block::{Activations, BlockQuantizer, Chunk, embedded, labels, rows_of_paths};
use crate::quantize::settings::{Importance, ImportancePower, Refit, Solver, SolverSettings};
use anyhow::Result;
use std::sync::Arc;

/// What is done with a checkpoint, as a plan goes through it: all but weights and pixels is real.
pub struct Subject<'a> {
    /// The checkpoint, of which only headers are read.
    pub checkpoint: &'a Arc<Checkpoint>,
    /// What its config.json says.
    pub config: &'a ModelConfig,
    /// The solver's settings.
    pub solver: &'a SolverSettings,
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
pub struct SubjectChunk<'a> {
    /// The samples.
    pub sequences: Vec<&'a Sequence>,
    /// Whether their tokens go into no statistics.
    pub held_out: bool,
    /// Whether there is a float path beside the quantized one.
    pub with_float: bool,
}

/// What a run came to on a counting device.
#[derive(Clone, Debug)]
pub struct Counted {
    /// Stages that take memory on the device, in their order, each at its worst step.
    pub stages: Vec<StagePlan>,
    /// Page-locked host memory.
    pub host_bytes: u64,
    /// Work on the images.
    pub vision: ByKind,
    /// Work on all blocks, and on what is asked behind the last.
    pub blocks: ByKind,
}

/// What is asked of the output head is asked of so many rows of it in the plan: parts of a head are alike.
fn with_part_of_head(config: &ModelConfig) -> ModelConfig {
    let vocab = config.decoder.vocab.min(HEAD_ROWS);
    ModelConfig { decoder: DecoderConfig { vocab, ..config.decoder.clone() }, ..config.clone() }
}

impl Subject<'_> {
    /// Goes through the run on `device`, new books open. Errors as the run does of shapes that do not go together.
    pub fn count(&self, device: &Counting, activations: Activations) -> Result<Counted> {
        let streamed = activations == Activations::Streamed;
        let mut stages = Vec::new();
        let mut chunks = Vec::with_capacity(self.chunks.len());
        if !self.chunks.is_empty() {
            self.encode(device, streamed, &mut chunks)?;
            let at = |peak: &Peak| peak.step.clone();
            stages.push(StagePlan::new(Stage::Vision, self.step(&device.peak(), at, streamed)));
        }
        let vision = device.work();
        device.reset_peak();
        let first = self.block(device, activations, 0, &mut chunks)?;
        let layers = self.config.decoder.layers;
        let mut blocks = first;
        if layers > 1 {
            // All blocks but the first are alike.
            blocks = blocks + self.block(device, activations, 1, &mut chunks)? * (layers - 1) as f64;
        }
        let worst_block = device.peak();
        let before = device.work();
        device.reset_peak();
        self.compare(device, activations, &mut chunks)?;
        let parts = self.config.decoder.vocab.div_ceil(HEAD_ROWS).max(1) as f64;
        blocks = blocks + since(device, before) * parts;
        let comparison = self.step(&device.peak(), |_| "comparing the paths".into(), streamed);
        let worst_block = self.step(&worst_block, in_a_block, streamed);
        let worst = if bytes_of(&comparison) > bytes_of(&worst_block) { comparison } else { worst_block };
        stages.push(StagePlan::new(Stage::Blocks, worst));
        Ok(Counted { stages, host_bytes: device.parked_bytes(), vision, blocks })
    }

    fn encode(&self, device: &Counting, streamed: bool, chunks: &mut Vec<Chunk<CountedTensor>>) -> Result<()> {
        device.step("loading");
        let label = device.label(labels::TOWER);
        let embedder = Embedder::load(device, self.checkpoint, self.config, self.images)?;
        drop(label);
        for SubjectChunk { sequences, held_out, with_float } in &self.chunks {
            device.step("encoding images");
            let mut chunk = embedded(device, &embedder, sequences, self.config.image_token, *with_float)?;
            chunk.held_out = *held_out;
            if streamed {
                chunk.park(device)?;
            }
            chunks.push(chunk);
        }
        Ok(())
    }

    /// One block; its work.
    fn block(
        &self,
        device: &Counting,
        activations: Activations,
        index: usize,
        chunks: &mut [Chunk<CountedTensor>],
    ) -> Result<ByKind> {
        let before = device.work();
        let config = &self.config.decoder;
        device.step("loading a block");
        let label = device.label(labels::WEIGHTS);
        let float = Block::load(&Weights::new(device, self.checkpoint), config, &self.config.names, index)?;
        if self.solver.solver == Solver::Rtn {
            device.step("rounding");
            return Ok(since(device, before));
        }
        let quantized = float.duplicate(device)?;
        drop(label);
        let stop = Stop::default();
        let mut quantizer = BlockQuantizer {
            device,
            config,
            settings: self.solver,
            importance: self.importance,
            // All made-up factors are alike: no power changes them.
            importance_power: ImportancePower::PAPER,
            refit: self.refit,
            activations,
            stop: &stop,
            index,
            float,
            quantized,
        };
        // "block 1: mlp.down_proj".
        let mut name = |at: &str| device.step(at.rsplit(": ").next().unwrap_or(at));
        quantizer.run(chunks, &mut name, &mut |_| Ok(()))?;
        Ok(since(device, before))
    }

    /// Both paths' predictions by one part of the output head.
    fn compare(&self, device: &Counting, activations: Activations, chunks: &mut [Chunk<CountedTensor>]) -> Result<()> {
        let stop = Stop::default();
        let places = self.places.iter().map(|(chunk, rows)| (*chunk, rows.as_slice()));
        let Some([float, quantized]) = rows_of_paths(device, chunks, places, activations, &stop)? else {
            return Ok(());
        };
        let next: Vec<u32> = self.places.iter().flat_map(|(_, rows)| rows.iter().map(|_| 0)).collect();
        let config = with_part_of_head(self.config);
        // On the host two paths' logits are there beside those that are computed.
        let logits = next.len() as u64 * config.decoder.vocab as u64 * F32;
        let _held = device.hold_on_host(2 * logits);
        paths::compare(device, self.checkpoint, &config, Paths { float, quantized, next }, &stop).map(drop)
    }

    /// A peak as a step of a plan.
    fn step(&self, peak: &Peak, name: impl Fn(&Peak) -> String, streamed: bool) -> Step {
        let cross = self.solver.solver == Solver::Gptaq;
        let told = |label: &str| match label {
            labels::WEIGHTS if self.solver.solver == Solver::Rtn => "weights of a block",
            labels::WEIGHTS => "weights of a block, float and quantized",
            labels::STREAMS if streamed => "residual streams of two chunks",
            labels::STREAMS => "residual streams of all samples",
            labels::STATISTICS if cross => "H and C",
            labels::STATISTICS => "H",
            labels::FACTORS if cross => "their copies in processing order, factored",
            labels::FACTORS => "its factor",
            labels::SOLVER => "the solver's state",
            labels::PASS => "intermediate results of a chunk",
            labels::REFIT => "H and C of the outputs",
            labels::TOWER => "vision tower",
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
