//! Runs that end early, and what they leave.

use crate::support::program::{lasting_files_of, names_in, text};
use crate::support::{data, golden};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use vlmq::progress::{Observer, Stage, Stop};
use vlmq::quantize::settings::SolverSettings;
use vlmq::report::{LayerReport, RunObserver, RunReport};
use vlmq::run::{self, RunSettings, Runs};

/// Three blocks, images of several sizes.
pub(crate) const PLAIN: &str = "rope-parameters-f32";
/// Three blocks, of which the first ones add image features (DeepStack).
pub(crate) const DEEPSTACK: &str = "qwen3_vl-f16-sharded";

/// A small checkpoint, its data, and a folder for the output.
pub(crate) struct Place {
    folder: tempfile::TempDir,
    pub(crate) model: PathBuf,
    pub(crate) data: PathBuf,
    /// Where its images are.
    pub(crate) images: PathBuf,
}

impl Place {
    /// With a checkpoint of tests/golden/model.
    pub(crate) fn new(checkpoint: &str) -> Self {
        let model = golden("model").join(checkpoint);
        let data = golden(&format!("model/{checkpoint}.jsonl"));
        Self { folder: tempfile::tempdir().unwrap(), data, model, images: golden("model") }
    }

    /// The trained checkpoint, four blocks of some tenths of a second.
    pub(crate) fn slow() -> Self {
        let (model, data) = (data("tiny-qwen2-vl-narrow"), data("vqa/calib.jsonl"));
        Self { folder: tempfile::tempdir().unwrap(), model, images: data.parent().unwrap().to_owned(), data }
    }

    /// The same in another folder.
    pub(crate) fn beside(&self, folder: tempfile::TempDir) -> Self {
        let Self { model, data, images, .. } = self;
        Self { folder, model: model.clone(), data: data.clone(), images: images.clone() }
    }

    /// The folder in which output and work folder lie.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The output.
    pub(crate) fn out(&self) -> PathBuf {
        self.folder().join("out")
    }

    /// The work folder.
    pub(crate) fn work(&self) -> PathBuf {
        self.folder().join(".out.vlmq")
    }

    /// What lies in the folder.
    pub(crate) fn left(&self) -> Vec<String> {
        names_in(self.folder())
    }

    /// The command, with further flags.
    pub(crate) fn arguments(&self, extra: &[&str]) -> Vec<String> {
        let (model, data, out) = (text(&self.model), text(&self.data), text(self.out()));
        let images = text(&self.images);
        let fixed = ["quantize", &model, "--calib", &data, "--image-root", &images, "--out", &out];
        let group: &[&str] = if extra.contains(&"--group-size") { &[] } else { &["--group-size", "32"] };
        let saved: &[&str] = if extra.contains(&"--save-every") { &[] } else { &["--save-every", "0"] };
        fixed.iter().chain(group).chain(saved).chain(extra).map(|&argument| argument.to_owned()).collect()
    }

    /// Runs the program.
    pub(crate) fn run(&self, extra: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_vlmq-run")).args(self.arguments(extra)).output().unwrap()
    }

    /// Settings that equal those of [`arguments`](Self::arguments) without further flags.
    pub(crate) fn settings(&self) -> RunSettings {
        RunSettings {
            image_root: Some(self.images.clone()),
            solver: SolverSettings { group_size: Some(32), ..SolverSettings::default() },
            save_every: 0,
            ..RunSettings::new(self.model.clone(), Some(self.data.clone()), self.out())
        }
    }

    /// Runs the same in this process, until `at`.
    pub(crate) fn run_until<D: Runs>(&self, device: &D, at: Moment) -> anyhow::Result<RunReport> {
        run::run(device, &self.settings(), &mut Stopper::new(at))
    }

    /// Asserts that the output is there, and nothing else, and returns it.
    pub(crate) fn finished(&self) -> Vec<(String, Vec<u8>)> {
        assert_eq!(self.left(), ["out"]);
        lasting_files_of(&self.out())
    }
}

/// Names of the files in which two outputs differ.
pub(crate) fn differing(a: &[(String, Vec<u8>)], b: &[(String, Vec<u8>)]) -> Vec<String> {
    let only = |a: &[(String, Vec<u8>)], b: &[(String, Vec<u8>)]| -> Vec<String> {
        a.iter().filter(|file| !b.contains(file)).map(|(name, _)| name.clone()).collect()
    };
    let mut names = [only(a, b), only(b, a)].concat();
    names.sort();
    names.dedup();
    names
}

/// `report.json` without what depends on the clock, on what else the process holds, and on where the output lies.
pub(crate) fn facts(report: &Value) -> Value {
    match report {
        Value::Object(fields) => {
            let varies = |name: &str| {
                name.contains("seconds")
                    || name.starts_with("peak_")
                    || ["out", "loaders", "memory_plan"].contains(&name)
            };
            let kept = fields.iter().filter(|(name, _)| !varies(name));
            kept.map(|(name, value)| (name.clone(), facts(value))).collect()
        }
        Value::Array(values) => values.iter().map(facts).collect(),
        other => other.clone(),
    }
}

/// When to ask a run to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// When a stage begins.
    Begins(Stage),
    /// When so many layers have their codes.
    Layers(usize),
    /// When the first block so numbered begins.
    Block(u64),
}

/// Stops a run, and remembers from where it went on.
pub(crate) struct Stopper {
    at: Moment,
    layers: usize,
    stop: Stop,
    pub(crate) resumed: Option<usize>,
}

impl Stopper {
    pub(crate) fn new(at: Moment) -> Self {
        Self { at, layers: 0, stop: Stop::default(), resumed: None }
    }

    fn reached(&self, moment: Moment) {
        if self.at == moment {
            self.stop.request();
        }
    }
}

impl Observer for Stopper {
    fn stage_started(&mut self, stage: Stage, _total: u64) {
        self.reached(Moment::Begins(stage));
    }

    fn stage_advanced(&mut self, stage: Stage, done: u64, _step: &str) {
        if stage == Stage::Blocks {
            self.reached(Moment::Block(done));
        }
    }

    fn stop(&self) -> Stop {
        self.stop.clone()
    }
}

impl RunObserver for Stopper {
    fn layer_finished(&mut self, _layer: &LayerReport) {
        self.layers += 1;
        self.reached(Moment::Layers(self.layers));
    }

    fn resumed(&mut self, finished: usize, _blocks: usize, _folder: &Path) {
        self.resumed = Some(finished);
    }
}
