//! The model card: `README.md` of the output, as the Hugging Face Hub shows it.
//!
//! In front stand the Hub's metadata (<https://huggingface.co/docs/hub/model-cards>), with the licence that the float
//! checkpoint's own card names; that card stays beside this one as `README.base.md`. There is no time in it and no path: the
//! same run gives the same card.

use super::templates::render;
use super::{CalibrationCounts, RunReport, RunSettings, split};
use crate::checkpoint::formats::{FamilySupport, Format, Loader, shell};
use crate::checkpoint::sums::SUMS;
use crate::input;
use crate::progress::is_unshown;
use crate::quantize::settings::{Grid, Importance, ImportancePower, Order, Refit, Solver, SolverSettings};
use anyhow::Result;
use serde::Serialize;
use std::path::Path;

const README: &str = "README.md";

/// Lines of a card's metadata that hold for a quantized copy too.
const INHERITED: [&str; 4] = ["license", "license_name", "license_link", "language"];

/// The card of a run that wrote a model of a family with this `support`, and the float checkpoint's own card, if it has one, under
/// its new name.
pub fn files(report: &RunReport, support: FamilySupport) -> Result<Vec<(String, Vec<u8>)>> {
    let model = &report.provenance.settings.model;
    let Some(base) = base_name(model) else {
        return Ok(vec![(README.to_owned(), text(report, support, None)?.into_bytes())]);
    };
    let old = input::read(&model.join(README), input::MAX_CONFIG_BYTES)?;
    let text = text(report, support, Some((&base, &String::from_utf8_lossy(&old))))?;
    Ok(vec![(README.to_owned(), text.into_bytes()), (base, old)])
}

/// Names of the files that a card of a copy of `model` takes.
pub fn names(model: &Path) -> Vec<String> {
    [README.to_owned()].into_iter().chain(base_name(model)).collect()
}

/// What the card of `model` is called beside that of a copy, if it has one.
fn base_name(model: &Path) -> Option<String> {
    model.join(README).is_file().then(|| {
        // A copy of a copy has both already.
        let mut base = "README.base.md".to_owned();
        while model.join(&base).exists() {
            base = base.replacen("README.", "README.base.", 1);
        }
        base
    })
}

#[derive(Serialize)]
struct CardView<'a> {
    /// Metadata of the float checkpoint's card that holds here too.
    inherited: Vec<&'a str>,
    base_model: &'a str,
    base_model_sha256: String,
    /// Whether the base model's name is one of a repository: the Hub takes no other.
    is_repository: bool,
    /// The folder's name, and the same as a Python string.
    name: &'a str,
    quoted_name: String,
    solver: &'a SolverSettings,
    format: Format,
    dequantized: bool,
    method: String,
    grid: &'static str,
    order: &'static str,
    bits_per_weight: Option<f64>,
    bytes_before: u64,
    bytes_after: u64,
    calibration: Option<CalibrationView<'a>>,
    largest_split: String,
    mean_error: Option<f64>,
    worst: Option<WorstView<'a>>,
    /// How many findings there are of layers.
    findings: usize,
    /// What was found of the model as a whole.
    destroyed: Vec<&'a str>,
    predictions: Option<String>,
    vlmq_version: &'a str,
    commit: &'a str,
    loaders: Vec<Loader>,
    shut_out: &'a [String],
    sums: &'static str,
    /// The base model's folder as it is typed.
    against: String,
    /// The file of the float checkpoint's card.
    base_card: Option<&'a str>,
}

#[derive(Serialize)]
struct CalibrationView<'a> {
    #[serde(flatten)]
    counts: &'a CalibrationCounts,
    file: String,
    sha256: &'a str,
    seed: u64,
}

#[derive(Serialize)]
struct WorstView<'a> {
    layer: &'a str,
    error: f64,
}

/// The card's text. `base` is the float checkpoint's card: its new name, and its text.
fn text(report: &RunReport, support: FamilySupport, base: Option<(&str, &str)>) -> Result<String> {
    let provenance = &report.provenance;
    let RunSettings { out, solver, format, .. } = &provenance.settings;
    let name = out.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy());
    let base_model = provenance.base_model();
    let checks = || report.check.iter();
    let calibration = provenance.calibration_file().zip(provenance.inputs.calibration.as_deref());
    render(
        "card.md.jinja",
        CardView {
            inherited: base.map(|(_, text)| inherited(text)).unwrap_or_default(),
            base_model_sha256: provenance.base_model_sha256(),
            is_repository: base_model.split('/').all(|part| !part.is_empty() && part.chars().all(is_repository_letter)),
            against: shell(&format!("path/to/{}", base_model.rsplit('/').next().unwrap_or(&base_model))),
            base_model: &base_model,
            name: &name,
            quoted_name: format!("{name:?}"),
            solver,
            format: *format,
            dequantized: format.codes().is_none(),
            method: method(&provenance.settings),
            grid: grid(solver),
            order: order(solver),
            bits_per_weight: report.bits_per_weight(),
            bytes_before: report.bytes_before,
            bytes_after: report.bytes_after,
            calibration: calibration.map(|(file, sha256)| {
                let (counts, seed) = (&report.calibration, provenance.settings.seed);
                CalibrationView { counts, file, sha256, seed }
            }),
            largest_split: split::told(report.largest_split),
            mean_error: report.mean_relative_error(),
            worst: report
                .worst_layer()
                .map(|layer| WorstView { layer: &layer.name, error: layer.solve.relative_error }),
            findings: report.layers.iter().map(|layer| layer.solve.findings.len()).sum(),
            destroyed: checks().flat_map(|check| &check.findings).map(|finding| finding.found.as_str()).collect(),
            predictions: checks().map(|check| check.line()).next(),
            vlmq_version: &provenance.vlmq_version,
            commit: &provenance.commit,
            loaders: format.loaders(&solver.layout(), support, Path::new(name.as_ref())),
            shut_out: &report.shut_out,
            sums: SUMS,
            base_card: base.map(|(name, _)| name),
        },
    )
}

fn grid(solver: &SolverSettings) -> &'static str {
    match solver.grid {
        Grid::Minmax => "full range",
        Grid::Mse => "best of 80 ranges",
        Grid::Loss => "range of least loss",
    }
}

fn order(solver: &SolverSettings) -> &'static str {
    match (solver.solver, solver.order) {
        (Solver::Rtn, _) | (_, Order::None) => "in their order",
        (_, Order::ActGroup) => "most active first inside groups",
        (_, Order::Act) => "most active first",
    }
}

fn method(settings: &RunSettings) -> String {
    let solver = match settings.solver.solver {
        Solver::Rtn => return "round to nearest, without calibration".to_owned(),
        Solver::Gptq => "GPTQ (arXiv 2210.17323)".to_owned(),
        Solver::Gptaq => format!("GPTAQ (arXiv 2504.02692), α {}", settings.solver.alpha),
    };
    let damp = settings.solver.damp;
    let damp = match settings.refit {
        None | Some(Refit::None) => damp.to_string(),
        Some(Refit::Residual) => format!("{damp}, scales refitted to the residual stream"),
    };
    match settings.importance {
        Importance::None => format!("{solver}, damping {damp}"),
        Importance::Vlmq => {
            let power = match settings.importance_power {
                ImportancePower::Fixed(1.0) => String::new(),
                ImportancePower::Fixed(power) => format!(" with importance to the power {power}"),
                ImportancePower::Auto => " with importance to a power chosen by layer".to_owned(),
            };
            format!("VLMQ (arXiv 2508.03351){power} on {solver}, damping {damp}")
        }
    }
}

/// The lines of a card's metadata that a copy inherits, as they stand there. Values may go on in indented or listed lines.
fn inherited(card: &str) -> Vec<&str> {
    let mut lines = card.trim_start_matches('\u{feff}').lines().map(str::trim_end);
    if lines.next() != Some("---") {
        return Vec::new();
    }
    let lines: Vec<&str> = lines.collect();
    // Metadata without an end is none.
    let Some(end) = lines.iter().position(|line| *line == "---") else { return Vec::new() };
    let mut keep = false;
    let mut found = Vec::new();
    for line in &lines[..end] {
        if !line.starts_with([' ', '\t', '-', '#']) {
            keep = line.split_once(':').is_some_and(|(key, _)| INHERITED.contains(&key));
        }
        // Some readers of it take more than line feeds for the end of a line.
        if keep && !line.chars().any(is_unshown) {
            found.push(*line);
        }
    }
    found
}

fn is_repository_letter(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || "._-".contains(letter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::{Finding, FindingKind, SolveReport};
    use crate::report::LayerReport;
    use crate::report::check::ModelCheck;
    use crate::report::provenance::{Inputs, Provenance};

    fn report(model: &str, name: &str, format: Format) -> RunReport {
        let provenance = Provenance {
            vlmq_version: "1.2.3".into(),
            commit: "unknown".into(),
            model: model.into(),
            settings: RunSettings {
                format,
                seed: 7,
                ..RunSettings::new(model.into(), Some("/x/secret/c|.jsonl".into()), name.into())
            },
            inputs: Inputs { calibration: Some("3".repeat(64)), ..Inputs::default() },
        };
        let calibration =
            CalibrationCounts { used: 5, too_long: 1, bad_images: 0, vision_tokens: 320, text_tokens: 80 };
        RunReport { provenance, calibration, bytes_before: 2 << 20, bytes_after: 1 << 20, ..RunReport::default() }
    }

    fn card(model: &str, name: &str, format: Format, base: Option<(&str, &str)>) -> String {
        text(&report(model, name, format), FamilySupport::default(), base).unwrap()
    }

    #[test]
    fn metadata_is_the_hubs() {
        let base = "---\r\nlicense: other\r\nlicense_name: some\r\ntags:\r\n- x\r\nlanguage:\r\n- en\r\n- zh\r\nbase_model: a/b\r\n---\r\n# Base\r\nlicense: no\r\n";
        let text =
            card("/x/hub/models--Org--Some-VL/snapshots/0", "w3", Format::gptq(true), Some(("README.base.md", base)));
        let expected = "---\nlicense: other\nlicense_name: some\nlanguage:\n- en\n- zh\nbase_model: \"Org/Some-VL\"\n\
            base_model_relation: quantized\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags:\n- vlmq\n- 3-bit\n\
            - gptq\n---\n\n# w3\n";
        assert!(text.starts_with(expected), "{text}");
        assert!(text.ends_with("\n## Base model\n\nIts own card is [README.base.md](README.base.md).\n"), "{text}");
        assert!(!text.contains("license: no"));
        for none in ["", "# No metadata", "---\nlicense: x\n", "text\n---\nlicense: x\n---\n"] {
            assert_eq!(inherited(none), [""; 0], "{none}");
        }
        assert_eq!(
            inherited("---\nlicense: x\u{85}evil: y\nlanguage: en\u{202e}\nlicense_name: z\n---\n"),
            ["license_name: z"]
        );
        // A name that the Hub would refuse is left out of the metadata.
        assert!(!card("my  model", "w3", Format::gptq(true), None).contains("base_model:"));
    }

    #[test]
    fn facts_stand_in_words() {
        let text = card("/x/secret/Some-VL", "w3", Format::COMPRESSED_TENSORS, None);
        for fact in [
            "integer codes of 3 bits",
            "VLMQ (arXiv 2508.03351) with importance to the power 0.5 on GPTAQ (arXiv 2504.02692), α 0.25, damping 0.01",
            "| grid | 3 bits, groups of 128, asymmetric, range of least loss; columns most active first inside groups |",
            "| calibration | 5 samples of `c_.jsonl` (seed 7), 1 more left out as too long; 320 vision and 80 text tokens; SHA-256 3",
            "| size | 2.00 MiB → 1.00 MiB |",
            "| made by | vlmq 1.2.3, commit unknown |",
            "vlmq-run verify . --against path/to/Some-VL\n",
        ] {
            assert!(text.contains(fact), "{fact} is not in {text}");
        }
        assert!(!text.contains("secret"), "{text}");
    }

    /// A card with something to say everywhere, and one of a run that did next to nothing.
    #[test]
    fn facts_are_told_where_there_are_any() {
        let shown = |edit: fn(&mut RunReport)| {
            let mut report = report("m", "w3", Format::GPTQ_V1);
            edit(&mut report);
            text(&report, FamilySupport::default(), None).unwrap()
        };
        let whole = shown(|report| {
            let finding = |kind| Finding { kind, found: "it broke".into(), done: String::new() };
            let solve = SolveReport {
                relative_error: 0.125,
                findings: vec![finding(FindingKind::FewTokens); 2],
                ..SolveReport::default()
            };
            report.layers = vec![LayerReport { name: "a|b".into(), rows: 4, cols: 8, solve, ..LayerReport::default() }];
            report.quantized_bytes = 26;
            report.calibration.bad_images = 2;
            report.check =
                Some(ModelCheck { findings: vec![finding(FindingKind::ModelDestroyed)], ..ModelCheck::default() });
            report.shut_out = vec!["one".into(), "two".into()];
        });
        for part in [
            "| format | gptq, 6.50 bits per quantized weight |\n| size |",
            " more left out as too long, 2 for a bad image; 320 vision",
            "| relative error of outputs | mean 1.25e-1, worst 1.25e-1 in `a_b` |\n| numerical findings | 2, listed in `report.json` |\n\
             | predictions | nll 0.0000 float, ",
            "\n\n**Do not use it: it broke.**\n\n`report.json` has",
            "```\n\nNot here: one.\n\nNot here: two.\n\n## Check it\n",
        ] {
            assert!(whole.contains(part), "{part} is not in {whole}");
        }
        let bare = shown(|report| {
            report.provenance.inputs.calibration = None;
            let settings = &mut report.provenance.settings;
            (settings.solver.group_size, settings.solver.symmetric, settings.solver.solver) = (None, true, Solver::Rtn);
        });
        for part in [
            "| method | round to nearest, without calibration |\n\
             | grid | 3 bits, whole rows, symmetric, range of least loss; columns in their order |\n| format | gptq |\n",
            "| calibration | none |\n| tensor parallelism | one GPU alone |\n| numerical findings | none |\n| made by |",
            "commit unknown |\n\n`report.json` has the settings, and the figures of every layer.\n\n## Load it\n",
        ] {
            assert!(bare.contains(part), "{part} is not in {bare}");
        }
        assert!(bare.ends_with("against the base model.\n"), "{bare}");
    }

    #[test]
    fn commands_are_whole() {
        let text = card("m", "my w3", Format::DEQUANTIZED, None);
        for line in [
            "vllm serve 'my w3'\n",
            "model = AutoModelForImageTextToText.from_pretrained(\"my w3\")\n",
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n",
            "processor = AutoProcessor.from_pretrained(\"my w3\")\n",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        let text = card("m", "w3", Format::COMPRESSED_TENSORS, None);
        assert!(text.contains("AutoProcessor, CompressedTensorsConfig\n"), "{text}");
        assert!(text.contains("from_pretrained(\"w3\", quantization_config=CompressedTensorsConfig(dequantize=True))"));
    }
}
