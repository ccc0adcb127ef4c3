//! The whole way from a float checkpoint to a quantized one.

use crate::quantize::report::{Observer, RunReport};
use crate::quantize::settings::{Importance, SolverSettings};
use anyhow::{Result, bail, ensure};
use serde::Serialize;
use std::path::PathBuf;

/// What a run reads, does and writes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PipelineSettings {
    /// Folder of the float checkpoint.
    pub model: PathBuf,
    /// Calibration data: JSONL of conversations, or ShareGPT4V/LLaVA JSON.
    pub calib: PathBuf,
    /// Folder to write; it must not exist.
    pub out: PathBuf,
    /// Format to write: `compressed-tensors`, `gptq` or `dequantized`.
    pub format: String,
    /// How layers are solved. The pipeline itself chooses `scale_type` and `smallest_zero` after checkpoint and format.
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
    /// Smallest area to which an image is enlarged, in pixels; `None`: the checkpoint's.
    pub min_pixels: Option<usize>,
    /// Largest area to which an image is reduced, in pixels; `None`: the checkpoint's.
    pub max_pixels: Option<usize>,
}

impl PipelineSettings {
    /// Refuses what can be refused without reading a file: wrong values, a missing checkpoint, an output that exists.
    pub fn check(&self) -> Result<()> {
        let (model, out) = (&self.model, &self.out);
        self.solver.validate()?;
        ensure!(model.is_dir(), "{}: no such folder; give the folder of a Hugging Face checkpoint", model.display());
        ensure!(!out.exists(), "{}: already exists; remove it or choose another --out", out.display());
        Ok(())
    }
}

/// Quantizes `settings.model` into `settings.out`.
pub fn run(settings: &PipelineSettings, _observer: &mut dyn Observer) -> Result<RunReport> {
    settings.check()?;
    bail!("{}: this build cannot quantize", settings.model.display())
}
