//! From a checkpoint and conversations to a quantized checkpoint: the `input` is read and checked, `encode`d into the decoder's
//! input, and walks through the `blocks`. What is done is kept on the way, to `resume` from.

mod blocks;
mod dry_run;
mod encode;
mod findings;
mod input;
mod resume;
mod start;

pub use dry_run::{DryRun, dry_run};
pub use input::linear_specs;
pub use resume::{StateBytes, Unfinished};

use super::block::NotFinite;
use super::card::Card;
use super::check;
use super::inspect::DecoderShape;
use super::plan::MemoryPlan;
use super::provenance::{self, Provenance};
use super::report::importance::bin_edges;
use super::report::{RunObserver, RunReport};
use super::settings::{Importance, ImportancePower, Refit, Solver, SolverSettings};
use super::split::largest_split;
use crate::calibration::template::TemplateChoice;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::formats::{Format, LinearSpec};
use crate::checkpoint::own::Foreign;
use crate::checkpoint::sums::{SUMS, Sums};
use crate::checkpoint::target;
use crate::checkpoint::work::{WorkFolder, check_target};
use crate::device::{ModelOps, SolveOps};
use crate::model::families::ImageOptions;
use crate::progress::{Interrupted, Stage, StageClock};
use anyhow::{Result, ensure};
use input::Input;
use resume::{Spent, Unusable};
use serde::Serialize;
use start::{Start, Started};
use std::path::PathBuf;
use std::time::{Duration, Instant};

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
    /// Folder to write; it must not exist. Taken as [`target::plain`] has it.
    pub out: PathBuf,
    /// How the file is stored.
    pub format: Format,
    /// How layers are solved. The run itself chooses `scale_type` and `smallest_zero` after checkpoint and format.
    pub solver: SolverSettings,
    /// How tokens are weighted.
    pub importance: Importance,
    /// The power of their factors; the run takes 1 where all weigh alike.
    pub importance_power: ImportancePower,
    /// Whether scales are refitted; `None`: as is usual at the width ([`Refit::usual`]). The run takes [`Refit::None`] where no sample
    /// is run.
    pub refit: Option<Refit>,
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
    /// Leave samples out whose images cannot be read, instead of ending the run.
    pub skip_bad_images: bool,
    /// Stop at the first [`Finding`](super::Finding) instead of going on with what was done about it.
    pub strict: bool,
    /// Discard what an earlier run of the same output left behind instead of going on from there.
    #[serde(skip)]
    pub restart: bool,
    /// Seconds that must have passed since the last save before the state behind a finished block is saved; 0: behind every
    /// block. A run that ended early does again what it did since.
    #[serde(skip)]
    pub save_every: u64,
}

impl PipelineSettings {
    /// The command's defaults: compressed-tensors, [`SolverSettings::default`], 512 samples of at most 2048 tokens by seed 0,
    /// weighted by VLMQ; the checkpoint's own image sizes and template; saved behind every block.
    pub fn new(model: PathBuf, calib: Option<PathBuf>, out: PathBuf) -> Self {
        let out = target::plain(&out);
        Self {
            model,
            calib,
            out,
            format: Format::CompressedTensors,
            solver: SolverSettings::default(),
            importance: Importance::Vlmq,
            importance_power: ImportancePower::default(),
            refit: None,
            samples: 512,
            seed: 0,
            max_tokens: 2048,
            chunk_tokens: CHUNK_TOKENS,
            image_root: None,
            image_options: ImageOptions::default(),
            chat_template: TemplateChoice::default(),
            skip_bad_images: false,
            strict: false,
            restart: false,
            save_every: 0,
        }
    }

    /// The same with the output's name in its shortest form, in which all else is told.
    fn plain(&self) -> Self {
        Self { out: target::plain(&self.out), ..self.clone() }
    }

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

/// What a run with these settings would take on the device, without running it. Errors as [`run`] does before it loads
/// anything there.
pub fn plan<D: ModelOps + SolveOps>(device: &D, settings: &PipelineSettings) -> Result<MemoryPlan> {
    settings.check()?;
    let (input, data) = Input::read::<D>(settings, &mut Vec::new(), &mut ())?;
    input.plan(device, &data, settings.chunk_tokens)
}

/// Quantizes a checkpoint. Everything that can be refused is refused before anything is computed.
///
/// The output grows in the folder `.NAME.vlmq` beside it. A run that ends early, in whatever way, leaves that folder if a block
/// was done, or if it was [`Interrupted`] or could not write once the images were encoded: then a run of the same settings goes
/// on behind the last finished block, and the error has the context [`Unfinished`]. Otherwise it leaves nothing; nor does one that ends at
/// activations which are not finite: no run could go on from there.
pub fn run<D: ModelOps + SolveOps>(
    device: &D,
    settings: &PipelineSettings,
    observer: &mut dyn RunObserver,
) -> Result<RunReport> {
    settings.check()?;
    let settings = &settings.plain();
    let mut work = WorkFolder::open(&settings.out)?;
    if settings.restart {
        work.restart()?;
    }
    let mut saved = None;
    let report = quantize(device, settings, &mut work, &mut saved, observer);
    let error = match report.and_then(|report| work.finish().map(|()| report)) {
        Ok(report) => return Ok(report),
        Err(error) => error,
    };
    let Some(unfinished) = saved.filter(|_| !error.is::<Unusable>()) else { return Err(error) };
    if error.is::<NotFinite>() {
        work.keep(false);
        return Err(if unfinished.finished > 0 { error.context(unfinished.lost()) } else { error });
    }
    // What comes of the input comes again, and is told again, in no time.
    let not_of_the_input = || error.is::<Interrupted>() || error.chain().any(|cause| cause.is::<std::io::Error>());
    work.keep(unfinished.finished > 0 || error.is::<Foreign>() || not_of_the_input());
    Err(if work.is_kept() { error.context(unfinished) } else { error })
}

/// All of a run but giving the output its name. `saved` is the last state on the disk that this process has found or made.
fn quantize<D: ModelOps + SolveOps>(
    device: &D,
    settings: &PipelineSettings,
    work: &mut WorkFolder,
    saved: &mut Option<Unfinished>,
    observer: &mut dyn RunObserver,
) -> Result<RunReport> {
    let time = Instant::now();
    let stop = observer.stop();
    let mut stages = Vec::new();
    let (input, data) = Input::read::<D>(settings, &mut stages, observer)?;
    let job = input.job::<D>(&data, settings.chunk_tokens)?;
    let mut plan = input.plan(device, &data, settings.chunk_tokens)?;
    plan.lines().iter().for_each(|line| log::info!("{line}"));
    let used = PipelineSettings {
        solver: input.solver.clone(),
        importance: input.importance,
        importance_power: input.importance_power,
        refit: Some(input.refit),
        ..settings.clone()
    };
    let clock = StageClock::start(Stage::Checksums, 1, observer);
    let provenance =
        Provenance::of(&used, &input.checkpoint, &data.calibration, &data.held_out, &|| Ok(stop.check()?))?;
    stages.push(clock.finish(observer));
    let identity = resume::identity(&provenance, &device.name(), device.libraries())?;
    let calibration = encode::counts(&data.calibration, input.config.image_token);
    let sizes = Sizes::new(&input.checkpoint, &input.linears, settings.format, &input.solver)?;

    let blocks = input.config.decoder.layers;
    let unfinished = |work: &WorkFolder, finished| Some(Unfinished { folder: work.path().into(), finished, blocks });
    let start = Start { device, input: &input, settings: &used, data: &data, job: &job, stop: &stop, time };
    let (started, before) = match resume::find(work, &identity)? {
        None => (start.afresh(work, &identity, &mut plan, &mut stages, observer)?, Spent::default()),
        Some(found) => {
            *saved = unfinished(work, found.state.finished());
            observer.resumed(found.state.finished(), blocks, work.path());
            let before = found.state.spent.clone();
            (start.again(work, found, &mut plan)?, before)
        }
    };
    let Started { mut state, mut writer, mut chunks } = started;
    let packed = data.packed(settings.chunk_tokens);
    let (places, held_out) = (input.places(&packed), packed.held_out());
    *saved = unfinished(work, state.finished());
    let session = start.session(work, &plan);
    let grown = Checkpoint::open(&work.checkpoint())?;
    drop(data);

    device.reset_peak();
    let clock = StageClock::start(Stage::Blocks, blocks as u64, observer);
    let (between_saves, mut last_save) = (Duration::from_secs(settings.save_every), Instant::now());
    observer.stage_advanced(Stage::Blocks, state.finished() as u64, "");
    for index in state.finished()..blocks {
        state.done.quantize(device, &input, session.activations, &stop, index, &mut chunks, &mut writer, observer)?;
        writer.sync()?;
        state.add_checksums(index, &writer, &grown)?;
        if index + 1 == blocks {
            observer.stage_advanced(Stage::Blocks, blocks as u64, "comparing the paths");
            let (from, config) = (&input.checkpoint, &input.config);
            state.check =
                check::compare(device, from, config, &mut chunks, (&places, held_out), session.activations, &stop)?;
        }
        plan.measured(Stage::Blocks, device.peak_bytes());
        state.measured = plan.measurements();
        state.spent = before.and(time, stages.iter().cloned().chain([clock.time()]));
        let finished = index + 1;
        if finished == blocks || last_save.elapsed() >= between_saves {
            // Behind the last block nothing is left to go through another.
            session.save(&state, if finished < blocks { &mut chunks } else { &mut [] })?;
            *saved = unfinished(work, finished);
            last_save = Instant::now();
        }
    }
    stages.push(clock.finish(observer));
    drop(chunks);
    // Behind the last save: without --strict the same command writes what is there.
    state.check.iter().try_for_each(|check| findings::tell_of_model(check, settings.strict))?;

    let spent = before.and(time, stages);
    plan.host.measured_bytes = spent.peak_memory_bytes;
    let report = RunReport {
        provenance,
        family: input.family.into(),
        format: settings.format.name().into(),
        device: device.name(),
        calibration,
        layers: state.done.layers,
        blocks: state.done.blocks,
        check: state.check,
        importance_edges: bin_edges(),
        samples: input.samples,
        stages: spent.stages,
        seconds: spent.seconds,
        peak_memory_bytes: spent.peak_memory_bytes,
        peak_device_bytes: plan.measured_bytes(),
        device_pool: device.pool_peak()?,
        memory_plan: plan,
        bytes_before: sizes.before,
        bytes_after: sizes.before - sizes.float_layers + sizes.quantized_layers,
        quantized_bytes: sizes.quantized_layers,
        loaders: settings.format.loaders(&input.solver, input.support, &settings.out),
        shut_out: settings.format.shut_out(&input.solver, input.support),
        largest_split: largest_split(&DecoderShape::of(&input.config.decoder), settings.format, &input.solver),
        evaluation: None,
    };
    writer.add_to_config(provenance::KEY, &report.provenance.summary())?;
    let card = Card {
        report: &report,
        solver: &input.solver,
        importance: input.importance,
        importance_power: input.importance_power,
        refit: input.refit,
        format: settings.format,
        support: input.support,
    };
    for (name, bytes) in card.files(&settings.out, input.checkpoint.folder())? {
        writer.add_file(&name, &bytes)?;
    }
    for (name, bytes) in report.files()? {
        writer.add_file(name, &bytes)?;
    }
    // Checksums of all files are no place for one that is not ours.
    writer.check_contents()?;
    let clock = StageClock::start(Stage::Checksums, 1, observer);
    writer.add_file(SUMS, Sums::of(writer.folder())?.text().as_bytes())?;
    clock.finish(observer);
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
