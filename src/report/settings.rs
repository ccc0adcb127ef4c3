//! What a run reads, does and writes.

use crate::checkpoint::formats::Format;
use crate::checkpoint::target;
use crate::checkpoint::work::check_target;
use crate::data::template::TemplateChoice;
use crate::model::families::ImageOptions;
use crate::quantize::settings::{Importance, ImportancePower, Refit, Solver, SolverSettings};
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Usual number of tokens that go through a block together: enough to keep matrix products busy, few enough that the MLP's
/// inner activations stay small beside the block.
pub const CHUNK_TOKENS: usize = 2048;

/// What a run reads, does and writes. A setting that a later version adds has a default for reports of earlier ones, which are read again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    #[serde(default)]
    pub importance_power: ImportancePower,
    /// Whether scales are refitted; `None`: as is usual at the width ([`Refit::usual`]). Round-to-nearest
    /// runs no sample: it takes [`Refit::None`].
    #[serde(default)]
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
    /// block. A run that was killed does again what it did since; one that was asked to stop first saves the blocks that it has finished.
    #[serde(skip, default = "usual_save_every")]
    pub save_every: u64,
}

/// For [`RunSettings::save_every`]: a state of many tokens takes seconds to write, and what is lost without it is done again in two
/// minutes.
fn usual_save_every() -> u64 {
    120
}

impl Default for RunSettings {
    /// The command's: compressed-tensors, [`SolverSettings::default`], 512 samples of at most 2048 tokens by seed 0, weighted by
    /// VLMQ; the checkpoint's own image sizes and template; saved every two minutes at most. Nothing is read or written yet.
    fn default() -> Self {
        Self {
            model: PathBuf::new(),
            calib: None,
            out: PathBuf::new(),
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
            save_every: usual_save_every(),
        }
    }
}

impl RunSettings {
    /// The defaults, for this checkpoint, these calibration data and this output.
    pub fn new(model: PathBuf, calib: Option<PathBuf>, out: PathBuf) -> Self {
        Self { model, calib, out: target::plain(&out), ..Self::default() }
    }

    /// These settings with the output's name in its shortest form, in which all else is told.
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
        ensure!(
            self.refit != Some(Refit::Residual) || self.solver.solver != Solver::Rtn,
            "--refit residual looks at outputs of calibration samples, of which --solver rtn reads none: leave one of the two out"
        );
        ensure!(model.is_dir(), "{}: no such folder; give the folder of a Hugging Face checkpoint", model.display());
        check_target(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// The written form is that of earlier runs, whose reports and unfinished work are read.
    const WRITTEN: &str = r#"{"model":"m","calib":null,"out":"o","format":"gptq","solver":{"solver":"gptaq","bits":3,"group_size":128,"symmetric":false,"grid":"loss","order":"act-group","damp":0.01,"alpha":0.25,"cross_term":"unquantized","scale_type":"bf16","smallest_zero":0},"importance":"vlmq","importance_power":0.5,"refit":null,"samples":512,"seed":0,"max_tokens":2048,"chunk_tokens":2048,"image_root":null,"min_pixels":null,"max_pixels":null,"image_mode":null,"chat_template":"checkpoint","skip_bad_images":false,"strict":false}"#;

    #[test]
    fn settings_are_read_back_as_they_were_written() {
        let plain = RunSettings { format: Format::gptq(true), ..RunSettings::new("m".into(), None, "./o/".into()) };
        assert_eq!(serde_json::to_string(&plain).unwrap(), WRITTEN);
        let other = RunSettings {
            calib: Some("c".into()),
            importance: Importance::None,
            importance_power: ImportancePower::Auto,
            refit: Some(Refit::Residual),
            image_options: ImageOptions { min_pixels: Some(784), ..ImageOptions::default() },
            chat_template: TemplateChoice::File("t".into()),
            ..plain.clone()
        };
        let power = RunSettings { importance_power: ImportancePower::Fixed(1.0), ..plain.clone() };
        for settings in [plain, other, power] {
            let text = serde_json::to_string(&settings).unwrap();
            assert_eq!(serde_json::from_str::<RunSettings>(&text).unwrap(), settings, "{text}");
        }
    }

    #[test]
    fn nothing_else_is_read() {
        let with = |name: &str, value: Value| {
            let mut written: Value = serde_json::from_str(WRITTEN).unwrap();
            written[name] = value;
            serde_json::from_value::<RunSettings>(written).unwrap_err().to_string()
        };
        for (name, value, says) in [
            ("format", json!("best"), "no format \"best\""),
            ("importance_power", json!("most"), "importance_power must be above 0 and at most 1, or `auto`"),
            ("importance_power", json!(null), "importance_power must be a number or `auto`"),
            ("samples", json!(-1), "invalid value: integer `-1`"),
            ("min_pixels", json!("x"), "invalid type: string \"x\""),
        ] {
            assert!(with(name, value).contains(says), "{name}: {says}");
        }
    }
}
