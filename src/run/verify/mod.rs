//! Reads a finished checkpoint back and compares it with what its run recorded, and with the float checkpoint.
//!
//! Compared are, bit for bit: every file with [`SUMS`]; the float checkpoint's files with the checksums that `report.json`
//! recorded of them; config.json; every tensor's presence, type, shape and checksum; tensors that were copied with their
//! originals; and of every quantized layer that its codes, scales, zeros and groups are such as the format allows and that its
//! [`weight_error`](crate::checkpoint::weight_error) is the recorded one. The relative errors of outputs, which weigh weights by
//! the calibration data, cannot be computed again without that data.

mod layers;

use crate::checkpoint::QuantizedCopy;
use crate::checkpoint::checksum;
use crate::checkpoint::formats::{Format, LinearSpec, TensorSpec};
use crate::checkpoint::planned::Planned;
use crate::checkpoint::side_files::is_replaced;
use crate::checkpoint::sums::{SUMS, Sums, files, of_tensors};
use crate::checkpoint::{Checkpoint, Packing, Quantization};
use crate::device::cpu::Cpu;
use crate::input;
use crate::model::families;
use crate::parallel::map;
use crate::progress::{Observer, Stage, StageClock};
use crate::quantize::settings::SolverSettings;
use crate::report::RunSettings;
use crate::report::provenance::{Inputs, KEY, Provenance};
use crate::run::input::linear_specs;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

/// Files of an output that are not copies, besides those that hold or describe weights.
const MADE: [&str; 4] = ["README.md", "report.json", "report.html", SUMS];

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Verification {
    /// Files whose checksums were compared, those of the float checkpoint included.
    pub files: usize,
    /// Tensors that were compared.
    pub tensors: usize,
    /// Quantized layers, in order.
    pub layers: Vec<LayerCheck>,
    /// Differences from what should be, a sentence each: empty for a sound checkpoint.
    pub differences: Vec<String>,
}

/// A quantized layer's errors against the float weights.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerCheck {
    /// Name of the layer in the checkpoint, without `.weight`.
    pub name: String,
    /// `‖Ŵ − W‖ / ‖W‖` as the files have it; `None` where they cannot be read.
    pub weight_error: Option<f64>,
    /// The error as the run recorded it; `None` where `report.json` does not know the layer.
    pub recorded: Option<f64>,
}

/// What `report.json` has to say. The provenance field by field: flattened, it would cost errors the place in the file.
#[derive(Debug, Deserialize)]
struct Record {
    vlmq_version: String,
    commit: String,
    model: String,
    settings: RunSettings,
    inputs: Inputs,
    layers: Vec<RecordedLayer>,
}

#[derive(Debug, Deserialize)]
struct RecordedLayer {
    name: String,
    weight_error: f64,
}

/// The checkpoint that is verified, as `report.json` says that it was made.
struct Written<'a> {
    copy: Checkpoint,
    /// The layers that are quantized.
    linears: &'a [LinearSpec],
    format: Format,
    solver: &'a SolverSettings,
}

/// A verification under way.
struct Check<'a> {
    out: &'a Path,
    model: Checkpoint,
    found: Verification,
}

/// Verifies the checkpoint `out` against the float checkpoint `model` that it was made from.
///
/// Errors when there is nothing to compare: no checkpoint in `model`, or one that is quantized, no [`SUMS`] in `out`. All else,
/// down to files that cannot be read, is among the [differences](Verification::differences).
pub fn run(out: &Path, model: &Path, observer: &mut dyn Observer) -> Result<Verification> {
    ensure!(out.is_dir(), "{}: no such folder; give one that vlmq-run quantize wrote", out.display());
    let model = Checkpoint::open(model)?;
    model.refuse_quantized()?;
    let sums = Sums::read(out)?;
    let mut check = Check { out, model, found: Verification::default() };
    if let Err(error) = check.all(&sums, observer) {
        check.differ(format!("{error:#}; not checked further"));
    }
    Ok(check.found)
}

/// Whether what is said is what is known, all that is said below it included.
fn agrees(known: &Value, said: &Value) -> bool {
    match (known, said) {
        (Value::Object(known), Value::Object(said)) => {
            said.iter().all(|(name, said)| known.get(name).is_some_and(|known| agrees(known, said)))
        }
        _ => known == said,
    }
}

impl Check<'_> {
    fn differ(&mut self, what: impl Into<String>) {
        self.found.differences.push(what.into());
    }

    fn all(&mut self, sums: &Sums, observer: &mut dyn Observer) -> Result<()> {
        let clock = StageClock::start(Stage::Checksums, 2, observer);
        self.files(sums)?;
        observer.stage_advanced(Stage::Checksums, 1, "");
        let Record { vlmq_version, commit, model, settings, inputs, layers } = self.record()?;
        let provenance = Provenance { vlmq_version, commit, model, settings, inputs };
        self.base_files(&provenance.inputs, sums)?;
        clock.finish(observer);

        let RunSettings { format, ref solver, .. } = provenance.settings;
        let config = families::of::<Cpu>(&self.model)?.config(&self.model)?;
        let linears = linear_specs(&config);
        let written = Written { copy: Checkpoint::open(self.out)?, linears: &linears, format, solver };
        let readable = self.config(&written, &provenance)?;
        self.tensors(&written, sums)?;

        let known: BTreeMap<&str, f64> = layers.iter().map(|l| (l.name.as_str(), l.weight_error)).collect();
        for name in known.keys().filter(|name| !linears.iter().any(|linear| linear.module == **name)) {
            self.differ(format!("report.json has a layer {name}, which the base model has not"));
        }
        if readable {
            self.layers(&written, &known, observer);
        }
        Ok(())
    }

    /// The files of the output: all there, no others, none changed.
    fn files(&mut self, sums: &Sums) -> Result<()> {
        let names: Vec<PathBuf> = files(self.out)?;
        let (plain, others): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| self.out.join(name).is_file());
        for name in &others {
            self.differ(format!("{} is no file and does not belong to the checkpoint", name.display()));
        }
        let shown: BTreeSet<String> = plain.iter().map(|name| name.display().to_string()).collect();
        for name in sums.files.keys().filter(|name| !shown.contains(*name)) {
            self.differ(format!("the file {name} is missing"));
        }
        for name in shown.iter().filter(|name| !sums.files.contains_key(*name)) {
            self.differ(format!("the file {name} does not belong to the checkpoint: {SUMS} does not list it"));
        }
        let known: Vec<PathBuf> =
            shown.iter().filter(|name| sums.files.contains_key(*name)).map(PathBuf::from).collect();
        self.compare_files(self.out.to_owned(), &known, &sums.files, |name| {
            format!("the file {name} is not as it was written: its checksum differs")
        });
        Ok(())
    }

    /// Takes the checksums of `names` in `folder` and says where they are not those of `sums`.
    fn compare_files(
        &mut self,
        folder: PathBuf,
        names: &[PathBuf],
        sums: &BTreeMap<String, String>,
        say: impl Fn(&str) -> String + Sync,
    ) {
        let compare = |name: &PathBuf| {
            let shown = name.display().to_string();
            match checksum::of_file(&folder.join(name)) {
                Ok(sum) => (sums.get(&shown) != Some(&sum)).then(|| say(&shown)),
                Err(error) => Some(format!("{error:#}")),
            }
        };
        let differences = map(names.len(), |i| compare(&names[i]));
        self.found.differences.extend(differences.into_iter().flatten());
        self.found.files += names.len();
    }

    fn record(&self) -> Result<Record> {
        let path = self.out.join("report.json");
        let text = input::read(&path, input::MAX_INDEX_BYTES)?;
        serde_json::from_slice(&text).with_context(|| format!("{} is no report of vlmq-run quantize", path.display()))
    }

    /// The float checkpoint's files are those that the run read, and side files were copied from them.
    fn base_files(&mut self, inputs: &Inputs, sums: &Sums) -> Result<()> {
        let folder = self.model.folder().to_owned();
        let mut names = Vec::new();
        for name in inputs.model.keys() {
            let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
            ensure!(inside, "report.json names a file {name:?}, which leads out of the base model's folder");
            match folder.join(name).is_file() {
                true => names.push(PathBuf::from(name)),
                false => self.differ(format!("the base model has no file {name}, which the run had read")),
            }
        }
        self.compare_files(folder, &names, &inputs.model, |name| {
            format!("the base model's {name} is not the file that the run had read: its checksum differs")
        });
        for (name, sum) in inputs.model.iter().filter(|(name, _)| !is_replaced(name)) {
            let copied = match name.as_str() {
                // Under a new name.
                "README.md" => sums.files.iter().any(|(name, copy)| is_base_card(name) && copy == sum),
                name => MADE.contains(&name) || sums.files.get(name) == Some(sum),
            };
            if !copied {
                self.differ(format!("the base model's {name} was not copied"));
            }
        }
        Ok(())
    }

    /// config.json: all that the float checkpoint's has, and how the weights are stored. Returns whether it says that rightly.
    fn config(&mut self, written: &Written<'_>, provenance: &Provenance) -> Result<bool> {
        let &Written { ref copy, format, solver, .. } = written;
        let keys = |config: &Value| config.as_object().cloned().unwrap_or_default();
        let (old, new) = (keys(&self.model.own_config()), keys(copy.config()));
        let ours = [KEY, "quantization_config"];
        let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        for name in names.into_iter().filter(|name| !ours.contains(&name.as_str())) {
            if old.get(name) != new.get(name) {
                self.differ(format!("config.json's {name} is not the base model's"));
            }
        }
        // What later versions add is not asked of earlier ones.
        let summary = provenance.summary()?;
        for (name, said) in new.get(KEY).map(keys).unwrap_or_default() {
            if summary.get(&name).is_some_and(|known| !agrees(known, &said)) {
                self.differ(format!("config.json's {KEY}.{name} is not what report.json says"));
            }
        }
        if new.get(KEY).is_none() {
            self.differ(format!("config.json has no {KEY}, which names where the weights come from"));
        }
        let &SolverSettings { bits, group_size, symmetric, .. } = solver;
        let wanted = format.codes().map(|_| Quantization { format, packing: Packing { bits, group_size, symmetric } });
        let found = match copy.quantization() {
            Err(error) => Err(format!("{error:#}")),
            Ok(found) if found == wanted => Ok(()),
            Ok(None) => Err("not quantized".to_owned()),
            Ok(Some(other)) => Err(other_variant(format, other.format).unwrap_or_else(|| other.to_string())),
        };
        if let Err(found) = &found {
            let wanted = format!("{}, {} bits", format.name(), solver.bits);
            self.differ(format!("config.json does not describe the weights as report.json does ({wanted} …): {found}"));
        }
        Ok(found.is_ok())
    }

    /// Tensors: all there, no others, of the right type and shape, none changed, and copies like their originals.
    fn tensors(&mut self, written: &Written<'_>, sums: &Sums) -> Result<()> {
        let &Written { ref copy, linears, format, solver } = written;
        let layout = solver.layout();
        let planned = Planned::of(&QuantizedCopy { checkpoint: &self.model, linears, format, layout: &layout });
        let planned = planned.context("the base model cannot be the one quantized")?.tensors.concat();
        let found = of_tensors(copy)?;
        let known: BTreeSet<&str> = planned.iter().map(|spec| spec.name.as_str()).collect();
        for name in copy.names().filter(|name| !known.contains(name)) {
            self.differ(format!("the tensor {name} does not belong to the checkpoint"));
        }
        for name in sums.tensors.keys().filter(|name| !known.contains(name.as_str())) {
            self.differ(format!("{SUMS} lists a tensor {name}, which does not belong to the checkpoint"));
        }
        let model = &self.model;
        let quantized = |name: &str| {
            name.strip_suffix(".weight").is_some_and(|module| linears.iter().any(|linear| linear.module == module))
        };
        let compare = |spec: &TensorSpec| -> Option<String> {
            let name = &spec.name;
            let Ok(tensor) = copy.tensor(name) else { return Some(format!("the tensor {name} is missing")) };
            let mut wrong = Vec::new();
            if tensor.dtype != spec.dtype || tensor.shape != spec.shape {
                let (dtype, shape) = (spec.dtype, &spec.shape);
                wrong.push(format!("is {:?} {:?} instead of {dtype:?} {shape:?}", tensor.dtype, tensor.shape));
            }
            match sums.tensors.get(name) {
                None => wrong.push(format!("is not listed in {SUMS}")),
                Some(sum) if *sum != found[name] => wrong.push("is not as it was written: its checksum differs".into()),
                Some(_) => {}
            }
            // The others' originals are float weights.
            let original = model.tensor(name).ok().filter(|_| !quantized(name));
            if original.is_some_and(|original| original.bytes != tensor.bytes) {
                wrong.push("is not the base model's".to_owned());
            }
            (!wrong.is_empty()).then(|| format!("the tensor {name} {}", wrong.join("; it ")))
        };
        let differences = map(planned.len(), |i| compare(&planned[i]));
        self.found.differences.extend(differences.into_iter().flatten());
        self.found.tensors = planned.len();
        Ok(())
    }
}

/// How config.json tells a format from `wanted`, where both are of one method.
fn other_variant(wanted: Format, found: Format) -> Option<String> {
    let method = found.codes()?.method();
    let differs = found != wanted && wanted.codes()?.method() == method;
    let key = method.variant_key.filter(|_| differs)?;
    Some(format!("{key} {}", found.name()))
}

/// Whether a file is the float checkpoint's own card, under the name that the run gave it.
fn is_base_card(name: &str) -> bool {
    name.starts_with("README.base.") && name.ends_with("md")
}
