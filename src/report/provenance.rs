//! Where a quantized checkpoint comes from: program, settings, and checksums of all that was read.
//!
//! `report.json` holds all of it, paths as they were given. What goes out into the world with the weights, config.json and the
//! model card, has the [summary](Provenance::summary): names without the folders that they lay in, no times, so that the same
//! run gives the same bytes.

use super::settings::RunSettings;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::checksum::{self, Checksum};
use crate::checkpoint::scan::Scanned;
use crate::checkpoint::side_files::SideFiles;
use crate::data::sequence::{Collected, Sequence};
use crate::data::template::TemplateChoice;
use crate::parallel::map;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The commit that this program was built from: `HASH`, `HASH-modified` where the sources had been changed since,
/// `HASH-unchecked` where nobody could tell, or `unknown`.
pub const COMMIT: &str = env!("VLMQ_COMMIT");

/// The key of config.json that holds the [summary](Provenance::summary).
pub const KEY: &str = "vlmq";

/// Where a quantized checkpoint comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Version of this crate.
    pub vlmq_version: String,
    /// The commit it was built from, see [`COMMIT`].
    pub commit: String,
    /// The float checkpoint's folder, as it was given.
    pub model: String,
    /// Every setting of the run under its command-line name, as they took effect.
    pub settings: RunSettings,
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
    /// The samples held out of them, see [`check`](super::check), likewise; they decide no weight, and `None` is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out: Option<String>,
}

impl Provenance {
    /// Provenance of a run with `settings` as they take effect, of these samples. Files are [added](Self::with_files) when their checksums
    /// are known.
    pub fn of(settings: &RunSettings, data: &Collected, held_out: &[Sequence]) -> Self {
        let some = |samples: &[Sequence]| (!samples.is_empty()).then(|| of_samples(samples));
        Self {
            vlmq_version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: COMMIT.to_owned(),
            model: settings.model.display().to_string(),
            settings: settings.clone(),
            inputs: Inputs { samples: some(&data.sequences), held_out: some(held_out), ..Inputs::default() },
        }
    }

    /// This provenance with the checksums of files.
    pub fn with_files(mut self, files: &FileSums) -> Self {
        let FileSums { model, calibration, .. } = files;
        (self.inputs.model, self.inputs.calibration) = (model.clone(), calibration.clone());
        self
    }

    /// What to call the float checkpoint: its repository's name where it lies in the Hub's cache, else its folder's.
    pub fn base_model(&self) -> String {
        let parts = || self.model.split(['/', '\\']).filter(|part| !["", ".", ".."].contains(part));
        let cached = parts().find_map(|part| part.strip_prefix("models--")).map(|name| name.replacen("--", "/", 1));
        cached.or_else(|| parts().next_back().map(str::to_owned)).unwrap_or_else(|| "model".into())
    }

    /// One checksum for all files of the float checkpoint: that of their lines as `sha256sum` prints them, in order of name.
    pub fn base_model_sha256(&self) -> String {
        let lines: String = self.inputs.model.iter().map(|(name, sum)| format!("{sum}  {name}\n")).collect();
        checksum::of_bytes(lines.as_bytes())
    }

    /// What config.json says under [`KEY`].
    pub fn summary(&self) -> Result<Value> {
        let Self { settings, .. } = self;
        let mut shown = settings.clone();
        if let TemplateChoice::File(path) = &mut shown.chat_template {
            *path = file_name(path).into();
        }
        let mut shown = serde_json::to_value(shown)?;
        // Folders, and what has a place of its own.
        let aside = ["model", "calib", "out", "image_root", "format", "seed"];
        shown.as_object_mut().into_iter().for_each(|all| all.retain(|name, _| !aside.contains(&name.as_str())));
        let calibration = self.inputs.calibration.as_ref().map(|sum| {
            let file = self.calibration_file();
            json!({"file": file, "sha256": sum, "samples_sha256": self.inputs.samples})
        });
        Ok(json!({
            "version": self.vlmq_version,
            "commit": self.commit,
            "base_model": self.base_model(),
            "base_model_sha256": self.base_model_sha256(),
            "format": settings.format,
            "settings": shown,
            "seed": settings.seed,
            "calibration": calibration,
        }))
    }

    /// Name of the calibration file, without its folder.
    pub fn calibration_file(&self) -> Option<String> {
        self.settings.calib.as_deref().map(file_name)
    }
}

/// The last part of a path, of either system's.
fn file_name(path: &Path) -> String {
    let path = path.display().to_string();
    path.rsplit(['/', '\\']).find(|part| !part.is_empty()).unwrap_or(&path).to_owned()
}

/// Checksums of the files that a run reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileSums {
    /// See [`Inputs::model`].
    pub model: BTreeMap<String, String>,
    /// SHA-256 of the bytes of the tensors that keep their precision, by name.
    pub tensors: BTreeMap<String, String>,
    /// See [`Inputs::calibration`].
    pub calibration: Option<String>,
}

impl FileSums {
    /// Reads the calibration file, if there is one, and every file of the checkpoint, of whose tensors those that `keep` their
    /// precision are looked at by themselves; goes on as long as `check` lets it.
    ///
    /// Errors as [`Checkpoint::scan`] does.
    pub(crate) fn of(
        checkpoint: &Checkpoint,
        keep: impl Fn(&str) -> bool + Sync,
        calibration: Option<&Path>,
        check: checksum::Check<'_>,
    ) -> Result<Self> {
        let folder = checkpoint.folder();
        let side_files = SideFiles::of(folder)?.kept.into_iter().chain([CONFIG.into()]);
        let side_files: Vec<PathBuf> = side_files.map(|name| folder.join(name)).collect();
        let mut model = checksum::of_files_until(folder, &side_files, check)?;
        let calibration = calibration.map(checksum::of_file).transpose()?;
        let Scanned { files, tensors } = checkpoint.scan(keep, check)?;
        model.extend(files.into_iter().map(|(path, sum)| (checksum::name_in(folder, &path), sum)));
        Ok(Self { model, tensors, calibration })
    }
}

/// The checkpoint's file that is read for itself and not copied.
const CONFIG: &str = "config.json";

/// The checksum of the samples' own checksums, which are taken side by side.
fn of_samples(samples: &[Sequence]) -> String {
    let mut all = Checksum::default();
    map(samples.len(), |i| of_sample(&samples[i])).iter().for_each(|sum| all.field(sum.as_bytes()));
    all.finish()
}

fn of_sample(sample: &Sequence) -> String {
    let mut checksum = Checksum::default();
    checksum.field(sample.id.as_bytes());
    checksum.field(bytemuck::cast_slice(&sample.tokens));
    checksum.field(bytemuck::cast_slice(&sample.positions));
    for image in &sample.images {
        let (rows, columns) = image.tiles.as_ref().map_or((0, 0), |tiles| (tiles.rows, tiles.columns));
        let shape = [image.original.0, image.original.1, rows, columns, image.crops().len()];
        checksum.field(bytemuck::cast_slice(&shape.map(|n| n as u64)));
        for crop in image.crops() {
            checksum.field(bytemuck::cast_slice(&[crop.width(), crop.height()]));
            checksum.field(crop.as_raw());
        }
    }
    checksum.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::formats::Format;

    fn provenance(model: &str) -> Provenance {
        let model_sums = [("b", "2".repeat(64)), ("a", "1".repeat(64))].map(|(name, sum)| (name.to_owned(), sum));
        Provenance {
            vlmq_version: "1.2.3".into(),
            commit: "unknown".into(),
            model: model.into(),
            settings: RunSettings {
                format: Format::gptq(true),
                seed: 7,
                image_root: Some("/x/secret".into()),
                chat_template: TemplateChoice::File("/x/secret/t.jinja".into()),
                ..RunSettings::new(model.into(), Some("/x/secret/c.jsonl".into()), "/x/secret/o".into())
            },
            inputs: Inputs {
                model: model_sums.into_iter().collect(),
                calibration: Some("3".repeat(64)),
                samples: Some("4".repeat(64)),
                held_out: None,
            },
        }
    }

    #[test]
    fn models_have_names_without_folders() {
        for (path, name) in [
            ("/x/models/Some-VL-2B", "Some-VL-2B"),
            ("../Some-VL-2B/", "Some-VL-2B"),
            ("/x/hub/models--Org--Some-VL--2B/snapshots/0123abcd", "Org/Some-VL--2B"),
            ("M:\\models\\a b", "a b"),
            (".", "model"),
        ] {
            assert_eq!(provenance(path).base_model(), name, "{path}");
        }
    }

    #[test]
    fn summaries_tell_no_folder() {
        let summary = provenance("/x/secret/m").summary().unwrap();
        assert!(!summary.to_string().contains("secret"), "{summary}");
        let settings = &summary["settings"];
        assert_eq!((&settings["chat_template"], &settings["solver"]["bits"]), (&"t.jinja".into(), &3.into()));
        let names: Vec<&String> = settings.as_object().unwrap().keys().collect();
        let first = ["solver", "importance", "importance_power", "refit", "samples", "max_tokens", "chunk_tokens"];
        let last = ["min_pixels", "max_pixels", "image_mode", "chat_template", "skip_bad_images", "strict"];
        assert_eq!(names, [&first[..], &last].concat());
        assert_eq!(
            (&summary["format"], &summary["seed"], &summary["base_model"]),
            (&"gptq".into(), &7.into(), &"m".into())
        );
        assert_eq!(summary["calibration"]["file"], "c.jsonl");
        // `sha256sum a b | sha256sum`.
        let lines = format!("{}  a\n{}  b\n", "1".repeat(64), "2".repeat(64));
        assert_eq!(summary["base_model_sha256"], checksum::of_bytes(lines.as_bytes()));
    }
}
