//! Where a quantized checkpoint comes from: program, settings, and checksums of all that was read.

use super::pipeline::PipelineSettings;
use crate::calibration::sequence::{Collected, Sequence};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::checksum::{self, Checksum};
use crate::checkpoint::write::side_files;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where a quantized checkpoint comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Version of this crate.
    pub vlmq_version: String,
    /// The float checkpoint's folder, as it was given.
    pub model: String,
    /// Every setting of the run under its command-line name, as they took effect.
    pub settings: serde_json::Value,
    /// Checksums of what was read.
    pub inputs: Inputs,
}

/// SHA-256 of what was read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Inputs {
    /// Files of the float checkpoint: config.json, weights, and all that is copied.
    pub model: BTreeMap<String, String>,
    /// The calibration file; `None` for round-to-nearest.
    pub calibration: Option<String>,
    /// The samples drawn from it as the model takes them: token ids, positions, resized images. Whatever of template,
    /// tokenizer, image files or settings changes them changes this.
    pub samples: Option<String>,
}

impl Provenance {
    /// Of a run with `settings` as they take effect. Reads every file of the checkpoint once.
    pub fn of(settings: &PipelineSettings, checkpoint: &Checkpoint, data: &Collected) -> Result<Self> {
        let folder = checkpoint.folder();
        let mut files: Vec<PathBuf> = side_files(folder)?.iter().map(|name| folder.join(name)).collect();
        files.push(folder.join("config.json"));
        files.extend(checkpoint.weight_files().map(Path::to_path_buf));
        let calibrated = !data.sequences.is_empty();
        let calibration = settings.calib.as_deref().filter(|_| calibrated).map(checksum::of_file).transpose()?;
        Ok(Self {
            vlmq_version: env!("VLMQ_VERSION").to_owned(),
            model: settings.model.display().to_string(),
            settings: serde_json::to_value(settings)?,
            inputs: Inputs {
                model: checksum::of_files(folder, &files)?,
                calibration,
                samples: calibrated.then(|| of_samples(&data.sequences)),
            },
        })
    }
}

fn of_samples(sequences: &[Sequence]) -> String {
    let mut checksum = Checksum::default();
    for sequence in sequences {
        checksum.field(sequence.id.as_bytes());
        checksum.field(bytemuck::cast_slice(&sequence.tokens));
        checksum.field(bytemuck::cast_slice(&sequence.positions));
        for image in &sequence.images {
            let (rows, columns) = image.tiles.unwrap_or_default();
            let shape = [image.original.0, image.original.1, rows, columns, image.crops().len()];
            checksum.field(bytemuck::cast_slice(&shape.map(|n| n as u64)));
            for crop in image.crops() {
                checksum.field(bytemuck::cast_slice(&[crop.width(), crop.height()]));
                checksum.field(crop.as_raw());
            }
        }
    }
    checksum.finish()
}
