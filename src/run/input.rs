//! What a run reads, all of it checked before anything is on a device or written.

use super::places::{self, Chunked, HELD_OUT, Places};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::QuantizedCopy;
use crate::checkpoint::formats::{FamilySupport, Format, LinearSpec};
use crate::checkpoint::planned::Planned;
use crate::checkpoint::write::Writer;
use crate::codes::CodeLayout;
use crate::data::TakesTooLong;
use crate::data::chunks::chunks_of_tokens;
use crate::data::dataset;
use crate::data::sequence::{Collected, Sequence, SequenceBuilder, VisionInput, collect};
use crate::device::ModelOps;
use crate::device::counting::Counting;
use crate::model::decoder::{Projection, module_name};
use crate::model::families::{self, Head, ModelConfig};
use crate::model::language_model::check_headers;
use crate::parallel::try_map;
use crate::plan::{Counted, DiskPlan, MemoryPlan, Process, StateBytes, Subject, SubjectChunk};
use crate::progress::{Observer, Stage, StageClock, StageTime};
use crate::quantize::settings::{Importance, ImportancePower, Refit, Solver, SolverSettings};
use crate::report::samples::{self, ReportSample};
use crate::report::settings::RunSettings;
use anyhow::{Result, bail};
use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// The samples of a run.
#[derive(Default)]
pub(super) struct Data {
    /// Samples that the model is calibrated with, and how many were too long for it.
    pub(super) calibration: Collected,
    /// Samples that tell what came of it.
    pub(super) held_out: Vec<Sequence>,
    /// Samples of each kind that go through a block together.
    chunks: [Vec<Range<usize>>; 2],
}

impl Data {
    /// All samples, in order.
    pub(super) fn all(&self) -> impl Iterator<Item = &Sequence> {
        self.calibration.sequences.iter().chain(&self.held_out)
    }

    /// Samples, those that are held out among them, in chunks of at most so many tokens.
    fn new(calibration: Collected, held_out: Vec<Sequence>, chunk_tokens: usize) -> Self {
        let chunks = [&calibration.sequences, &held_out].map(|samples| chunks_of_tokens(samples, chunk_tokens as u64));
        Self { calibration, held_out, chunks }
    }

    /// Both kinds in chunks, in order.
    pub(super) fn packed(&self) -> Chunked<'_> {
        let [calibrated, held_out] = &self.chunks;
        let calibration = calibrated.iter().map(|chunk| &self.calibration.sequences[chunk.clone()]);
        let chunks = calibration.chain(held_out.iter().map(|chunk| &self.held_out[chunk.clone()]));
        Chunked { chunks: chunks.map(|samples| samples.iter().collect()).collect(), calibrated: calibrated.len() }
    }
}

/// A checkpoint and what is to be done with it, read and checked.
pub(super) struct Input {
    pub(super) checkpoint: Arc<Checkpoint>,
    pub(super) family: &'static str,
    /// See [`Family::support`](families::Family::support).
    pub(super) support: FamilySupport,
    pub(super) config: ModelConfig,
    pub(super) solver: SolverSettings,
    pub(super) importance: Importance,
    pub(super) importance_power: ImportancePower,
    pub(super) refit: Refit,
    pub(super) format: Format,
    pub(super) linears: Vec<LinearSpec>,
    pub(super) sizes: Sizes,
    /// Whether no sample has an image, so that the vision tower is not needed.
    pub(super) text_only: bool,
    /// Whether the first finding ends the run.
    pub(super) strict: bool,
    /// What the report shows of the data.
    pub(super) samples: Vec<ReportSample>,
}

impl Input {
    pub(super) fn read<D: ModelOps>(
        settings: &RunSettings,
        stages: &mut Vec<StageTime>,
        observer: &mut dyn Observer,
    ) -> Result<(Self, Data)> {
        let checkpoint = Arc::new(Checkpoint::open(&settings.model)?);
        checkpoint.refuse_quantized()?;
        let family = families::of::<D>(&checkpoint)?;
        let config = family.config(&checkpoint)?;
        config.remarks(&checkpoint).iter().for_each(|remark| log::warn!("{remark}"));
        let mut solver = settings.solver.clone();
        solver.scale_type = settings.format.scale_type(families::float_type(&checkpoint)?);
        solver.smallest_zero = settings.format.smallest_zero();
        // Rounding to nearest weighs nothing, and the report should not say so.
        let importance = if solver.solver == Solver::Rtn { Importance::None } else { settings.importance };
        let importance_power = match importance {
            Importance::None => ImportancePower::PAPER,
            Importance::Vlmq => settings.importance_power,
        };
        let refit = match solver.solver {
            Solver::Rtn => Refit::None,
            Solver::Gptq | Solver::Gptaq => settings.refit.unwrap_or_else(|| Refit::usual(&solver)),
        };
        let linears = linear_specs(&config);
        let layout = solver.layout();
        Planned::of(&QuantizedCopy {
            checkpoint: &checkpoint,
            linears: &linears,
            format: settings.format,
            layout: &layout,
        })?;
        let (data, samples) = match solver.solver {
            Solver::Rtn => (Data::default(), Vec::new()),
            Solver::Gptq | Solver::Gptaq => {
                let vision = family.vision_input(&checkpoint, settings.image_options)?;
                read_data(settings, &checkpoint, vision, stages, observer)?
            }
        };
        let text_only = data.all().all(|sequence| sequence.images.is_empty());
        check_headers::<D>(&checkpoint, &config, !text_only)?;
        let sizes = Sizes::new(&checkpoint, &linears, settings.format, &layout)?;
        let input = Self {
            checkpoint,
            family: family.model_type(),
            support: family.support(),
            config,
            solver,
            importance,
            importance_power,
            refit,
            format: settings.format,
            linears,
            sizes,
            text_only,
            strict: settings.strict,
            samples,
        };
        Ok((input, data))
    }

    /// Names of the weights that are quantized.
    pub(super) fn replaced(&self) -> HashSet<String> {
        self.linears.iter().map(|linear| format!("{}.weight", linear.module)).collect()
    }

    /// Levels of image features that the first blocks add.
    pub(super) fn levels(&self) -> usize {
        self.config.levels(!self.text_only)
    }

    /// The tokens that both paths are to predict behind the last block: none without a head.
    pub(super) fn places(&self, packed: &Chunked<'_>) -> Vec<Places> {
        match self.config.head {
            Head::Missing => Vec::new(),
            Head::Embedding | Head::Stored => places::places(packed, self.config.image_token),
        }
    }

    /// What is to be done, for a plan that goes through it.
    pub(super) fn subject<'a>(&'a self, packed: &Chunked<'a>) -> Subject<'a> {
        let chunk = |(i, sequences): (usize, &Vec<&'a Sequence>)| SubjectChunk {
            sequences: sequences.clone(),
            held_out: packed.is_held_out(i),
            checked: packed.is_checked(i),
        };
        Subject {
            checkpoint: &self.checkpoint,
            config: &self.config,
            solver: &self.solver,
            format: self.format,
            importance: self.importance,
            refit: self.refit,
            chunks: packed.chunks.iter().enumerate().map(chunk).collect(),
            places: self.places(packed).into_iter().map(|places| (places.chunk, places.rows)).collect(),
            images: !self.text_only,
        }
    }

    /// Counts what a run will take on a device, and refuses what cannot fit into its memory or the host's.
    pub(super) fn plan(&self, device: &Counting, data: &Data, subject: &Subject<'_>) -> Result<(MemoryPlan, Counted)> {
        let (plan, counted) = MemoryPlan::fit(subject, device)?;
        let replaced = self.replaced();
        let process = Process::now(&self.checkpoint, &data.all().collect::<Vec<_>>(), |name| !replaced.contains(name))?;
        Ok((plan.with_host(&counted, &process)?, counted))
    }

    /// What is to be written, where codes are laid out so.
    pub(super) fn copy<'a>(&'a self, layout: &'a CodeLayout) -> QuantizedCopy<'a> {
        QuantizedCopy { checkpoint: &self.checkpoint, linears: &self.linears, format: self.format, layout }
    }

    /// Counts what room a run that keeps such states will take on disk, and refuses what cannot fit.
    pub(super) fn disk(&self, state: StateBytes, out: &Path) -> Result<DiskPlan> {
        let output = Writer::planned_bytes(&self.copy(&self.solver.layout()))?;
        let plan = DiskPlan::new(out, output, state.total());
        plan.check(out)?;
        Ok(plan)
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

/// Bytes of tensors.
pub(super) struct Sizes {
    pub(super) before: u64,
    pub(super) float_layers: u64,
    pub(super) quantized_layers: u64,
}

impl Sizes {
    fn new(checkpoint: &Checkpoint, linears: &[LinearSpec], format: Format, layout: &CodeLayout) -> Result<Self> {
        let bytes = |name: &str| Ok(checkpoint.tensor(name)?.bytes.len() as u64);
        Ok(Self {
            before: checkpoint.names().map(bytes).sum::<Result<u64>>()?,
            float_layers: linears.iter().map(|l| bytes(&format!("{}.weight", l.module))).sum::<Result<u64>>()?,
            quantized_layers: linears.iter().flat_map(|l| format.specs(l, layout)).map(|s| s.bytes() as u64).sum(),
        })
    }
}

/// Reads the calibration data, images included, and what the report shows of it. Samples to hold out are those that would be
/// drawn next; what is wrong with one costs nothing but the sample, unless it takes too long: then it goes on taking time.
fn read_data(
    settings: &RunSettings,
    checkpoint: &Checkpoint,
    vision: Box<dyn VisionInput>,
    stages: &mut Vec<StageTime>,
    observer: &mut dyn Observer,
) -> Result<(Data, Vec<ReportSample>)> {
    let Some(calib) = &settings.calib else {
        bail!("--solver gptq and gptaq need calibration data: give a file with --calib");
    };
    let conversations = dataset::read(calib, settings.image_root.as_deref())?;
    let mut conversations =
        dataset::select(conversations, Some(settings.samples.saturating_add(HELD_OUT)), settings.seed);
    let others = conversations.split_off(settings.samples.min(conversations.len()));
    let builder = SequenceBuilder::with_template(checkpoint.folder(), vision, &settings.chat_template)?;
    let clock = StageClock::start(Stage::Data, conversations.len() as u64, observer);
    let stop = observer.stop();
    let collected =
        collect(&builder, &conversations, settings.max_tokens, settings.skip_bad_images, || Ok(stop.check()?))?;
    let samples = samples::choose(&builder, &collected.sequences)?;
    let built = try_map(others.len(), |i| match builder.build(&others[i]) {
        Ok(sequence) => Ok((sequence.tokens.len() <= settings.max_tokens).then_some(sequence)),
        Err(error) if error.is::<TakesTooLong>() => Err(error),
        Err(_) => Ok(None),
    })?;
    let held_out = built.into_iter().flatten().collect();
    stages.push(clock.finish(observer));
    Ok((Data::new(collected, held_out, settings.chunk_tokens), samples))
}
