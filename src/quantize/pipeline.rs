//! From a checkpoint and conversations to a quantized checkpoint.

use super::block::{BlockQuantizer, Chunk, SolvedLayer, needs_float_path, round_to_nearest};
use super::inspect::{DecoderShape, embedder_size};
use super::plan::{Activations, ChunkSize, Costs, Job, MemoryPlan};
use super::report::{CalibrationCounts, LayerReport, RunObserver, RunReport, peak_memory_bytes};
use super::settings::{Importance, Solver, SolverSettings};
use crate::calibration::dataset;
use crate::calibration::sequence::{Collected, Sequence, SequenceBuilder, VisionInput, collect};
use crate::calibration::template::TemplateChoice;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::formats::{Format, LinearSpec};
use crate::checkpoint::write::{Writer, check_target};
use crate::device::{ModelOps, SolveOps};
use crate::model::decoder::{Block, Projection, module_name};
use crate::model::families::{self, ImageOptions, ModelConfig};
use crate::model::language_model::Embedder;
use crate::progress::{Observer, Stage, StageClock, StageTime};
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

/// Usual number of tokens that go through a block together: enough to keep matrix products busy, few enough that the MLP's
/// inner activations stay small beside the block.
pub const CHUNK_TOKENS: usize = 2048;

/// What a run reads, does and writes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PipelineSettings {
    /// Folder of the float checkpoint.
    pub model: PathBuf,
    /// Calibration data: JSONL of conversations, or ShareGPT4V/LLaVA JSON. Only round-to-nearest can do without.
    pub calib: Option<PathBuf>,
    /// Folder to write; it must not exist.
    pub out: PathBuf,
    /// How the file is stored.
    pub format: Format,
    /// How layers are solved. The run itself chooses `scale_type` and `smallest_zero` after checkpoint and format.
    pub solver: SolverSettings,
    /// How tokens are weighted.
    pub importance: Importance,
    /// Samples to draw from the calibration data; all, when it has fewer.
    pub samples: usize,
    /// Seed of the draw.
    pub seed: u64,
    /// Samples of more tokens are left out.
    pub max_tokens: usize,
    /// Most tokens that go through a block together, usually [`CHUNK_TOKENS`]; a longer sample goes alone.
    pub chunk_tokens: usize,
    /// Folder that image paths are relative to; `None`: the calibration file's.
    pub image_root: Option<PathBuf>,
    /// Overrides of the checkpoint's image sizes.
    #[serde(flatten)]
    pub image_options: ImageOptions,
    /// What turns conversations into text.
    pub chat_template: TemplateChoice,
}

impl PipelineSettings {
    /// Refuses what can be refused without reading a file: wrong values, a missing checkpoint, an output that exists or
    /// could not be created.
    pub fn check(&self) -> Result<()> {
        let (model, out) = (&self.model, &self.out);
        self.solver.validate()?;
        ensure!(self.samples > 0, "0 calibration samples leave nothing to calibrate with");
        ensure!(self.chunk_tokens > 0, "chunks of 0 tokens hold no sample");
        ensure!(
            self.calib.is_some() || self.solver.solver == Solver::Rtn,
            "the solvers gptq and gptaq need calibration data: give a file with --calib"
        );
        ensure!(model.is_dir(), "{}: no such folder; give the folder of a Hugging Face checkpoint", model.display());
        check_target(out)
    }
}

/// A checkpoint and calibration data, read and checked. Nothing is on a device yet.
struct Input {
    checkpoint: Checkpoint,
    family: &'static str,
    config: ModelConfig,
    solver: SolverSettings,
    importance: Importance,
    linears: Vec<LinearSpec>,
    data: Collected,
}

impl Input {
    fn read<D: ModelOps>(
        settings: &PipelineSettings,
        stages: &mut Vec<StageTime>,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        settings.check()?;
        let checkpoint = Checkpoint::open(&settings.model)?;
        checkpoint.refuse_quantized()?;
        let family = families::of::<D>(&checkpoint)?;
        let config = family.config(&checkpoint)?;
        let mut solver = settings.solver.clone();
        let first_layer = format!("{}.weight", module_name(&config.names, 0, Projection::Q));
        solver.scale_type = settings.format.scale_type(checkpoint.float_type(&first_layer)?);
        solver.smallest_zero = settings.format.smallest_zero();
        // Rounding to nearest weighs nothing, and the report should not say so.
        let importance = if solver.solver == Solver::Rtn { Importance::None } else { settings.importance };
        let linears = linear_specs(&config);
        Writer::check(&checkpoint, &linears, settings.format, &solver)?;
        let data = match solver.solver {
            Solver::Rtn => Collected { sequences: Vec::new(), too_long: 0 },
            Solver::Gptq | Solver::Gptaq => {
                let vision = family.vision_input(&checkpoint, settings.image_options)?;
                read_data(settings, &checkpoint, vision, stages, observer)?
            }
        };
        Ok(Self { checkpoint, family: family.model_type(), config, solver, importance, linears, data })
    }

    /// Counts what a run will take on the device, and refuses what cannot fit.
    fn plan<D: ModelOps + SolveOps>(&self, device: &D, chunk_tokens: usize) -> Result<MemoryPlan> {
        let load = families::of::<D>(&self.checkpoint)?.vision_load(&self.checkpoint)?;
        let size = |sequences: &Vec<&Sequence>| {
            let crops = || {
                let images = sequences.iter().flat_map(|s| &s.images);
                images.flat_map(|image| image.crops().iter().map(|_| image.grid_height * image.grid_width))
            };
            let together = load.crops.unwrap_or(usize::MAX);
            ChunkSize {
                tokens: sequences.iter().map(|s| s.tokens.len()).sum(),
                image_tokens: sequences
                    .iter()
                    .flat_map(|s| &s.tokens)
                    .filter(|&&token| token == self.config.image_token)
                    .count(),
                patches: crops().take(together).sum(),
            }
        };
        let chunks: Vec<ChunkSize> = pack(&self.data.sequences, chunk_tokens).iter().map(size).collect();
        let size = || embedder_size(&self.checkpoint, &self.config, self.is_text_only());
        let embedder = (!chunks.is_empty()).then(size).transpose()?;
        let shape = DecoderShape::of(&self.config.decoder);
        let deepstack = if self.is_text_only() { 0 } else { load.deepstack };
        let job = Job { shape, solver: &self.solver, importance: self.importance, chunks, deepstack, embedder };
        MemoryPlan::fit(&job, &Costs::of(device), device.memory_limit())
    }

    fn is_text_only(&self) -> bool {
        self.data.sequences.iter().all(|sequence| sequence.images.is_empty())
    }
}

/// What a run with these settings would take on the device, without running it. Errors as [`run`] does before it loads
/// anything there.
pub fn plan<D: ModelOps + SolveOps>(device: &D, settings: &PipelineSettings) -> Result<MemoryPlan> {
    let input = Input::read::<D>(settings, &mut Vec::new(), &mut ())?;
    input.plan(device, settings.chunk_tokens)
}

/// Quantizes a checkpoint. Everything that can be refused is refused before anything is written; a run that fails later
/// leaves no output folder behind.
pub fn run<D: ModelOps + SolveOps>(
    device: &D,
    settings: &PipelineSettings,
    observer: &mut dyn RunObserver,
) -> Result<RunReport> {
    let start = Instant::now();
    let mut stages = Vec::new();
    let input = Input::read::<D>(settings, &mut stages, observer)?;
    let mut plan = input.plan(device, settings.chunk_tokens)?;
    plan.lines().iter().for_each(|line| log::info!("{line}"));
    let text_only = input.is_text_only();
    let Input { checkpoint, family, config, solver, importance, linears, data } = input;
    let packed = pack(&data.sequences, settings.chunk_tokens);
    let mut calibration =
        CalibrationCounts { used: data.sequences.len(), too_long: data.too_long, ..Default::default() };
    let mut chunks = Vec::with_capacity(packed.len());
    if !packed.is_empty() {
        device.reset_peak();
        let embedder = Embedder::load(device, &checkpoint, &config, text_only)?;
        let clock = StageClock::start(Stage::Vision, data.sequences.len() as u64, observer);
        let mut done = 0;
        for sequences in &packed {
            let mut chunk = embed(device, &embedder, sequences, config.image_token, settings)?;
            let vision_tokens = chunk.is_vision.iter().filter(|&&is_vision| is_vision).count();
            calibration.vision_tokens += vision_tokens;
            calibration.text_tokens += chunk.is_vision.len() - vision_tokens;
            if plan.activations == Activations::Streamed {
                chunk.park(device)?;
            }
            chunks.push(chunk);
            done += sequences.len() as u64;
            observer.stage_advanced(Stage::Vision, done, "");
        }
        stages.push(clock.finish(observer));
        plan.measured(Stage::Vision, device.peak_bytes());
    }
    drop(packed);
    drop(data);

    let sizes = Sizes::new(&checkpoint, &linears, settings.format, &solver)?;
    let clock = StageClock::start(Stage::Write, (sizes.before - sizes.float_layers).div_ceil(1_000_000), observer);
    let mut writer = Writer::create(&settings.out, &checkpoint, &linears, settings.format, &solver)?;
    stages.push(clock.finish(observer));
    let mut layers = Vec::with_capacity(linears.len());
    device.reset_peak();
    let clock = StageClock::start(Stage::Blocks, config.decoder.layers as u64, observer);
    for index in 0..config.decoder.layers {
        let float = Block::load(device, &checkpoint, &config.decoder, &config.names, index)?;
        let shared = std::cell::RefCell::new(&mut *observer);
        let mut finished = |layer: SolvedLayer| {
            let name = module_name(&config.names, index, layer.projection);
            writer.write(&name, &layer.linear).with_context(|| format!("cannot write {name}"))?;
            let report = layer_report(name, index, layer);
            shared.borrow_mut().layer_finished(&report);
            layers.push(report);
            Ok(())
        };
        match solver.solver {
            Solver::Rtn => round_to_nearest(device, &solver, index, &float, &mut finished)?,
            Solver::Gptq | Solver::Gptaq => {
                let (config, quantized) = (&config.decoder, float.duplicate(device)?);
                let activations = plan.activations;
                BlockQuantizer { device, config, settings: &solver, importance, activations, index, float, quantized }
                    .run(
                        &mut chunks,
                        &mut |step| shared.borrow_mut().stage_advanced(Stage::Blocks, index as u64, step),
                        &mut finished,
                    )?;
            }
        }
        observer.stage_advanced(Stage::Blocks, index as u64 + 1, "");
    }
    stages.push(clock.finish(observer));
    plan.measured(Stage::Blocks, device.peak_bytes());
    drop(chunks);

    let loaders = settings.format.loaders(&solver, &settings.out);
    let report = RunReport {
        vlmq_version: env!("VLMQ_VERSION"),
        model: settings.model.display().to_string(),
        family: family.into(),
        format: settings.format.name().into(),
        device: device.name(),
        settings: serde_json::to_value(PipelineSettings { solver, importance, ..settings.clone() })?,
        calibration,
        layers,
        stages,
        seconds: start.elapsed().as_secs_f64(),
        peak_memory_bytes: peak_memory_bytes(),
        peak_device_bytes: plan.measured_bytes(),
        memory_plan: plan,
        bytes_before: sizes.before,
        bytes_after: sizes.before - sizes.float_layers + sizes.quantized_layers,
        quantized_bytes: sizes.quantized_layers,
        loaders,
    };
    writer.add_file("report.json", &serde_json::to_vec_pretty(&report)?)?;
    writer.finish()?;
    Ok(report)
}

/// Bytes of tensors.
struct Sizes {
    before: u64,
    float_layers: u64,
    quantized_layers: u64,
}

impl Sizes {
    fn new(checkpoint: &Checkpoint, linears: &[LinearSpec], format: Format, solver: &SolverSettings) -> Result<Self> {
        let bytes = |name: &str| Ok(checkpoint.tensor(name)?.bytes.len() as u64);
        Ok(Self {
            before: checkpoint.names().map(bytes).sum::<Result<u64>>()?,
            float_layers: linears.iter().map(|l| bytes(&format!("{}.weight", l.module))).sum::<Result<u64>>()?,
            quantized_layers: linears.iter().flat_map(|l| format.specs(l, solver)).map(|s| s.bytes() as u64).sum(),
        })
    }
}

/// Every linear layer of the decoder, under its on-disk name.
pub fn linear_specs(config: &ModelConfig) -> Vec<LinearSpec> {
    (0..config.decoder.layers)
        .flat_map(|block| Projection::ALL.map(|projection| (block, projection)))
        .map(|(block, projection)| {
            let (out_features, in_features) = projection.shape(&config.decoder);
            LinearSpec { module: module_name(&config.names, block, projection), out_features, in_features }
        })
        .collect()
}

fn layer_report(name: String, block: usize, layer: SolvedLayer) -> LayerReport {
    LayerReport {
        name,
        block,
        rows: layer.linear.out_features,
        cols: layer.linear.in_features,
        bits: layer.linear.bits,
        group_columns: layer.linear.group_columns,
        solve: layer.report,
        importance: layer.importance,
    }
}

/// Reads the calibration data, images included.
fn read_data(
    settings: &PipelineSettings,
    checkpoint: &Checkpoint,
    vision: Box<dyn VisionInput>,
    stages: &mut Vec<StageTime>,
    observer: &mut dyn Observer,
) -> Result<Collected> {
    let Some(calib) = &settings.calib else {
        bail!("--solver gptq and gptaq need calibration data: give a file with --calib");
    };
    let conversations = dataset::read(calib, settings.image_root.as_deref())?;
    let conversations = dataset::select(conversations, Some(settings.samples), settings.seed);
    let builder = SequenceBuilder::with_template(checkpoint.folder(), vision, &settings.chat_template)?;
    let clock = StageClock::start(Stage::Data, conversations.len() as u64, observer);
    let collected = collect(&builder, &conversations, settings.max_tokens)?;
    stages.push(clock.finish(observer));
    Ok(collected)
}

/// Cuts the samples, in order, into chunks of at most `most` tokens.
fn pack(sequences: &[Sequence], most: usize) -> Vec<Vec<&Sequence>> {
    let mut chunks: Vec<Vec<&Sequence>> = Vec::new();
    let mut tokens = usize::MAX;
    for sequence in sequences {
        let length = sequence.tokens.len();
        match chunks.last_mut() {
            Some(chunk) if tokens.saturating_add(length) <= most => {
                chunk.push(sequence);
                tokens += length;
            }
            _ => {
                chunks.push(vec![sequence]);
                tokens = length;
            }
        }
    }
    chunks
}

fn embed<D: ModelOps>(
    device: &D,
    embedder: &Embedder<D>,
    sequences: &[&Sequence],
    image_token: u32,
    settings: &PipelineSettings,
) -> Result<Chunk<D::Tensor>> {
    let features = embedder.image_features(device, sequences)?;
    let (x_quantized, layout) = embedder.embed(device, sequences, features.as_ref())?;
    let (tokens, _) = device.shape(&x_quantized);
    let x_float = match needs_float_path(&settings.solver, settings.importance) {
        true => Some(device.slice_rows(&x_quantized, 0..tokens)?),
        false => None,
    };
    let is_vision = sequences.iter().flat_map(|s| &s.tokens).map(|&token| token == image_token).collect();
    let samples = sequences.iter().map(|s| s.id.clone()).collect();
    Ok(Chunk { layout, x_quantized, x_float, is_vision, samples })
}
