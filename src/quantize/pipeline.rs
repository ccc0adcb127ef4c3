//! From a checkpoint and conversations to a quantized checkpoint.

use super::block::{BlockQuantizer, Chunk, SolvedLayer, needs_float_path, round_to_nearest};
use super::report::{CalibrationCounts, LayerReport, RunObserver, RunReport, peak_memory_bytes};
use super::settings::{Importance, Solver, SolverSettings};
use crate::calibration::dataset;
use crate::calibration::sequence::{Collected, Sequence, SequenceBuilder, collect};
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

/// Tokens that go through a block together: enough to keep matrix products busy, few enough that the MLP's inner
/// activations stay small beside the block. A longer sample is a chunk of its own.
const CHUNK_TOKENS: usize = 2048;

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
        ensure!(
            self.calib.is_some() || self.solver.solver == Solver::Rtn,
            "the solvers gptq and gptaq need calibration data: give a file with --calib"
        );
        ensure!(model.is_dir(), "{}: no such folder; give the folder of a Hugging Face checkpoint", model.display());
        check_target(out)
    }
}

/// Quantizes a checkpoint. Everything that can be refused is refused before anything is written; a run that fails later
/// leaves no output folder behind.
pub fn run<D: ModelOps + SolveOps>(
    device: &D,
    settings: &PipelineSettings,
    observer: &mut dyn RunObserver,
) -> Result<RunReport> {
    let start = Instant::now();
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

    let mut stages = Vec::new();
    let (mut chunks, calibration) = match solver.solver {
        Solver::Rtn => (Vec::new(), CalibrationCounts::default()),
        Solver::Gptq | Solver::Gptaq => calibrate(device, settings, &checkpoint, &config, &mut stages, observer)?,
    };

    let sizes = Sizes::new(&checkpoint, &linears, settings.format, &solver)?;
    let clock = StageClock::start(Stage::Write, (sizes.before - sizes.float_layers).div_ceil(1_000_000), observer);
    let mut writer = Writer::create(&settings.out, &checkpoint, &linears, settings.format, &solver)?;
    stages.push(clock.finish(observer));
    let mut layers = Vec::with_capacity(linears.len());
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
                BlockQuantizer { device, config, settings: &solver, importance, index, float, quantized }.run(
                    &mut chunks,
                    &mut |step| shared.borrow_mut().stage_advanced(Stage::Blocks, index as u64, step),
                    &mut finished,
                )?;
            }
        }
        observer.stage_advanced(Stage::Blocks, index as u64 + 1, "");
    }
    stages.push(clock.finish(observer));
    drop(chunks);

    let loaders = settings.format.loaders(&solver, &settings.out);
    let report = RunReport {
        vlmq_version: env!("VLMQ_VERSION"),
        model: settings.model.display().to_string(),
        family: family.model_type().into(),
        format: settings.format.name().into(),
        device: device.name(),
        settings: serde_json::to_value(PipelineSettings { solver, importance, ..settings.clone() })?,
        calibration,
        layers,
        stages,
        seconds: start.elapsed().as_secs_f64(),
        peak_memory_bytes: peak_memory_bytes(),
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

/// Reads the calibration data and embeds it: images are decoded, encoded and dropped a few samples at a time.
fn calibrate<D: ModelOps>(
    device: &D,
    settings: &PipelineSettings,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    stages: &mut Vec<StageTime>,
    observer: &mut dyn Observer,
) -> Result<(Vec<Chunk<D::Tensor>>, CalibrationCounts)> {
    let Some(calib) = &settings.calib else {
        bail!("--solver gptq and gptaq need calibration data: give a file with --calib");
    };
    let conversations = dataset::read(calib, settings.image_root.as_deref())?;
    let conversations = dataset::select(conversations, Some(settings.samples), settings.seed);
    let vision = families::of::<D>(checkpoint)?.vision_input(checkpoint, settings.image_options)?;
    let builder = SequenceBuilder::with_template(checkpoint.folder(), vision, &settings.chat_template)?;
    let clock = StageClock::start(Stage::Data, conversations.len() as u64, observer);
    let Collected { sequences, too_long, .. } = collect(&builder, &conversations, settings.max_tokens)?;
    stages.push(clock.finish(observer));

    let text_only = sequences.iter().all(|sequence| sequence.images.is_empty());
    let embedder = Embedder::load(device, checkpoint, config, text_only)?;
    let mut counts = CalibrationCounts { used: sequences.len(), too_long, ..Default::default() };
    let clock = StageClock::start(Stage::Vision, sequences.len() as u64, observer);
    let mut chunks = Vec::new();
    let mut done = 0;
    for packed in pack(&sequences) {
        let chunk = embed(device, &embedder, &packed, config.image_token, settings)?;
        counts.vision_tokens += chunk.is_vision.iter().filter(|&&is_vision| is_vision).count();
        counts.text_tokens += chunk.is_vision.iter().filter(|&&is_vision| !is_vision).count();
        done += packed.len() as u64;
        chunks.push(chunk);
        observer.stage_advanced(Stage::Vision, done, "");
    }
    stages.push(clock.finish(observer));
    Ok((chunks, counts))
}

/// Cuts the samples, in order, into chunks of at most [`CHUNK_TOKENS`].
fn pack(sequences: &[Sequence]) -> Vec<Vec<&Sequence>> {
    let mut chunks: Vec<Vec<&Sequence>> = Vec::new();
    let mut tokens = usize::MAX;
    for sequence in sequences {
        let length = sequence.tokens.len();
        match chunks.last_mut() {
            Some(chunk) if tokens.saturating_add(length) <= CHUNK_TOKENS => {
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
