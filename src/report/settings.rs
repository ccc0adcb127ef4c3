//! What a run reads, does and writes.

use crate::checkpoint::formats::Format;
use crate::checkpoint::target;
use crate::checkpoint::work::check_target;
use crate::data::template::TemplateChoice;
use crate::model::families::ImageOptions;
use crate::quantize::settings::{Importance, ImportancePower, Refit, Solver, SolverSettings};
use anyhow::{Result, ensure};
use serde::Serialize;
use std::path::PathBuf;

/// Usual number of tokens that go through a block together: enough to keep matrix products busy, few enough that the MLP's
/// inner activations stay small beside the block.
pub const CHUNK_TOKENS: usize = 2048;

/// What a run reads, does and writes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunSettings {
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
    /// Stop at the first [`Finding`](crate::quantize::Finding) instead of going on with what was done about it.
    pub strict: bool,
    /// Discard what an earlier run of the same output left behind instead of going on from there.
    #[serde(skip)]
    pub restart: bool,
    /// Seconds that must have passed since the last save before the state behind a finished block is saved; 0: behind every
    /// block. A run that ended early does again what it did since.
    #[serde(skip)]
    pub save_every: u64,
}

impl RunSettings {
    /// The command's defaults: compressed-tensors, [`SolverSettings::default`], 512 samples of at most 2048 tokens by seed 0,
    /// weighted by VLMQ; the checkpoint's own image sizes and template; saved behind every block.
    pub fn new(model: PathBuf, calib: Option<PathBuf>, out: PathBuf) -> Self {
        let out = target::plain(&out);
        Self {
            model,
            calib,
            out,
            format: Format::COMPRESSED_TENSORS,
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
    pub(crate) fn plain(&self) -> Self {
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
