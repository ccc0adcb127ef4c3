//! The model card: `README.md` of the output, as the Hugging Face Hub shows it.
//!
//! In front stand the Hub's metadata (<https://huggingface.co/docs/hub/model-cards>), with the licence that the float
//! checkpoint's own card names; that card stays beside this one as `README.base.md`. There is no time in it and no path: the
//! same run gives the same card.

use super::split;
use super::{RunReport, RunSettings};
use crate::checkpoint::formats::{FamilySupport, shell};
use crate::checkpoint::sums::SUMS;
use crate::input;
use crate::progress::{human_bytes, is_unshown};
use crate::quantize::settings::{Grid, Importance, ImportancePower, Order, Refit, Solver};
use anyhow::Result;
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;

const README: &str = "README.md";

/// Lines of a card's metadata that hold for a quantized copy too.
const INHERITED: [&str; 4] = ["license", "license_name", "license_link", "language"];

/// The card of a run that wrote a model of a family with this `support`, and the float checkpoint's own card, if it has one, under
/// its new name.
pub fn files(report: &RunReport, support: FamilySupport) -> Result<Vec<(String, Vec<u8>)>> {
    let RunSettings { model, out, .. } = &report.provenance.settings;
    let name = out.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
    let card = Card { report, settings: &report.provenance.settings, support };
    let Some(base) = base_name(model) else {
        return Ok(vec![(README.to_owned(), card.text(&name, None).into_bytes())]);
    };
    let old = input::read(&model.join(README), input::MAX_CONFIG_BYTES)?;
    let text = card.text(&name, Some((&base, &String::from_utf8_lossy(&old))));
    Ok(vec![(README.to_owned(), text.into_bytes()), (base, old)])
}

/// What a card is made of.
#[derive(Clone, Copy)]
struct Card<'a> {
    report: &'a RunReport,
    settings: &'a RunSettings,
    support: FamilySupport,
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

impl Card<'_> {
    /// The card's text for a folder of this `name`. `base` is the float checkpoint's card: its new name, and its text.
    fn text(&self, name: &str, base: Option<(&str, &str)>) -> String {
        let mut text = self.metadata(base.map(|(_, text)| text));
        let mut say = |line: String| {
            text += &line;
            text.push('\n');
        };
        let solver = &self.settings.solver;
        let model = self.report.provenance.base_model();
        say(format!("# {}\n", plain(name)));
        let what = match self.settings.format.codes() {
            None => "plain weights that stand on the grid of",
            Some(_) => "integer codes of",
        };
        say(format!(
            "{} after quantization with vlmq: the linear layers of its language backbone are {what} {} bits. Everything \
             else (vision tower, projector, embeddings, norms, `lm_head`) is as in the base model, to the byte.\n",
            code(&model),
            solver.bits
        ));
        say("| | |\n|---|---|".to_owned());
        for (key, value) in self.facts() {
            say(format!("| {key} | {value} |"));
        }
        for finding in report_findings(self.report) {
            say(format!("\n**Do not use it: {finding}.**"));
        }
        say("\n`report.json` has the settings, and the figures of every layer.".to_owned());
        self.loading(name, &mut text);
        let last = model.rsplit('/').next().unwrap_or(&model);
        let shown = shell(&format!("path/to/{last}"));
        let _ = write!(
            text,
            "\n## Check it\n\n```sh\nsha256sum -c {SUMS}\nvlmq-run verify . --against {shown}\n```\n\nBoth are run inside this \
             folder. The first checks the files; the second also every tensor, against the base model.\n"
        );
        if let Some((base, _)) = base {
            let _ = write!(text, "\n## Base model\n\nIts own card is [{base}]({base}).\n");
        }
        text
    }

    fn metadata(&self, base: Option<&str>) -> String {
        let mut lines = vec!["---".to_owned()];
        lines.extend(inherited(base.unwrap_or_default()));
        let model = self.report.provenance.base_model();
        // The Hub takes names of repositories only.
        if model.split('/').all(|part| !part.is_empty() && part.chars().all(is_repository_letter)) {
            lines.push(format!("base_model: {}", Value::from(model)));
            lines.push("base_model_relation: quantized".to_owned());
        }
        lines.push("library_name: transformers".to_owned());
        lines.push("pipeline_tag: image-text-to-text".to_owned());
        lines.push("tags:".to_owned());
        lines.push("- vlmq".to_owned());
        lines.push(format!("- {}-bit", self.settings.solver.bits));
        if self.settings.format.codes().is_some() {
            lines.push(format!("- {}", self.settings.format.name()));
        }
        lines.push("---\n\n".to_owned());
        lines.join("\n")
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let (report, solver) = (self.report, &self.settings.solver);
        let provenance = &report.provenance;
        let mut facts = vec![(
            "base model",
            format!("{}, SHA-256 {}", code(&provenance.base_model()), provenance.base_model_sha256()),
        )];
        facts.push(("method", self.method()));
        let group = solver.group_size.map_or_else(|| "whole rows".to_owned(), |size| format!("groups of {size}"));
        let zero = if solver.symmetric { "symmetric" } else { "asymmetric" };
        let grid = match solver.grid {
            Grid::Minmax => "full range",
            Grid::Mse => "best of 80 ranges",
            Grid::Loss => "range of least loss",
        };
        let order = match (solver.solver, solver.order) {
            (Solver::Rtn, _) | (_, Order::None) => "in their order",
            (_, Order::ActGroup) => "most active first inside groups",
            (_, Order::Act) => "most active first",
        };
        facts.push(("grid", format!("{} bits, {group}, {zero}, {grid}; columns {order}", solver.bits)));
        let width =
            report.bits_per_weight().map_or_else(String::new, |bits| format!(", {bits:.2} bits per quantized weight"));
        facts.push(("format", format!("{}{width}", self.settings.format.name())));
        let (before, after) = (human_bytes(report.bytes_before), human_bytes(report.bytes_after));
        facts.push(("size", format!("{before} → {after}")));
        facts.push(("calibration", self.calibration()));
        facts.push(("tensor parallelism", split::told(report.largest_split)));
        if let (Some(mean), Some(worst)) = (report.mean_relative_error(), report.worst_layer()) {
            let (error, layer) = (worst.solve.relative_error, code(&worst.name));
            facts.push(("relative error of outputs", format!("mean {mean:.2e}, worst {error:.2e} in {layer}")));
        }
        let findings: usize = report.layers.iter().map(|layer| layer.solve.findings.len()).sum();
        let findings = if findings == 0 { "none".to_owned() } else { format!("{findings}, listed in `report.json`") };
        facts.push(("numerical findings", findings));
        if let Some(check) = &report.check {
            facts.push(("predictions", check.line()));
        }
        facts.push(("made by", format!("vlmq {}, commit {}", provenance.vlmq_version, plain(&provenance.commit))));
        facts
    }

    fn method(&self) -> String {
        let solver = match self.settings.solver.solver {
            Solver::Rtn => return "round to nearest, without calibration".to_owned(),
            Solver::Gptq => "GPTQ (arXiv 2210.17323)".to_owned(),
            Solver::Gptaq => format!("GPTAQ (arXiv 2504.02692), α {}", self.settings.solver.alpha),
        };
        let damp = self.settings.solver.damp;
        let damp = match self.settings.refit {
            None | Some(Refit::None) => damp.to_string(),
            Some(Refit::Residual) => format!("{damp}, scales refitted to the residual stream"),
        };
        match self.settings.importance {
            Importance::None => format!("{solver}, damping {damp}"),
            Importance::Vlmq => {
                let power = match self.settings.importance_power {
                    ImportancePower::Fixed(1.0) => String::new(),
                    ImportancePower::Fixed(power) => format!(" with importance to the power {power}"),
                    ImportancePower::Auto => " with importance to a power chosen by layer".to_owned(),
                };
                format!("VLMQ (arXiv 2508.03351){power} on {solver}, damping {damp}")
            }
        }
    }

    fn calibration(&self) -> String {
        let (provenance, counts) = (&self.report.provenance, &self.report.calibration);
        let (Some(file), Some(sum)) = (provenance.calibration_file(), &provenance.inputs.calibration) else {
            return "none".to_owned();
        };
        let seed = self.settings.seed;
        let left = match counts.too_long {
            0 => String::new(),
            left => format!(", {left} more left out as too long"),
        };
        let bad = counts.bad();
        format!(
            "{} samples of {} (seed {seed}){left}{bad}; {} vision and {} text tokens; SHA-256 {sum}",
            counts.used,
            code(&file),
            counts.vision_tokens,
            counts.text_tokens
        )
    }

    /// One section a loader, with what to type in the folder above this one.
    fn loading(&self, name: &str, text: &mut String) {
        *text += "\n## Load it\n\nIn the folder that this one lies in, or with its path in place of its name. Programs that are not here are \
                  not known to load this file.\n";
        for loader in self.settings.format.loaders(&self.settings.solver.layout(), self.support, Path::new(name)) {
            let _ = match python(&loader.command, name) {
                Some(lines) => write!(text, "\n### {}\n\n```python\n{lines}\n```\n", loader.name),
                None => write!(text, "\n### {}\n\n```sh\n{}\n```\n", loader.name, loader.command),
            };
        }
        for reason in &self.report.shut_out {
            let _ = write!(text, "\nNot here: {reason}.\n");
        }
    }
}

/// What was found of the model as a whole.
fn report_findings(report: &RunReport) -> impl Iterator<Item = &str> {
    report.check.iter().flat_map(|check| &check.findings).map(|finding| finding.found.as_str())
}

/// A whole program around a line of Python that loads the model in `folder`; `None` for shell commands.
fn python(command: &str, folder: &str) -> Option<String> {
    if !command.starts_with("AutoModel") {
        return None;
    }
    let mut classes = vec!["AutoModelForImageTextToText", "AutoProcessor"];
    classes.extend(["CompressedTensorsConfig", "GPTQConfig"].into_iter().filter(|class| command.contains(class)));
    Some(format!(
        r#"from transformers import {}

model = {command}
processor = AutoProcessor.from_pretrained({folder:?})
content = [{{"type": "image", "image": "picture.png"}}, {{"type": "text", "text": "What is in the picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
tokens = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"#,
        classes.join(", ")
    ))
}

/// The lines of a card's metadata that a copy inherits, as they stand there. Values may go on in indented or listed lines.
fn inherited(card: &str) -> Vec<String> {
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
            found.push((*line).to_owned());
        }
    }
    found
}

fn is_repository_letter(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || "._-".contains(letter)
}

/// A name from outside that cannot end a line or a cell of a table, or begin another kind of text.
fn plain(name: &str) -> String {
    name.chars().map(|letter| if is_unshown(letter) || "`|<>[]".contains(letter) { '_' } else { letter }).collect()
}

fn code(name: &str) -> String {
    format!("`{}`", plain(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Format;
    use crate::report::CalibrationCounts;
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
        let report = report(model, name, format);
        let card = Card { report: &report, settings: &report.provenance.settings, support: FamilySupport::default() };
        card.text(name, base)
    }

    #[test]
    fn metadata_is_the_hubs() {
        let base = "---\r\nlicense: other\r\nlicense_name: some\r\ntags:\r\n- x\r\nlanguage:\r\n- en\r\n- zh\r\nbase_model: a/b\r\n---\r\n# Base\r\nlicense: no\r\n";
        let text =
            card("/x/hub/models--Org--Some-VL/snapshots/0", "w3", Format::GPTQ_V1, Some(("README.base.md", base)));
        let expected = "---\nlicense: other\nlicense_name: some\nlanguage:\n- en\n- zh\nbase_model: \"Org/Some-VL\"\n\
            base_model_relation: quantized\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags:\n- vlmq\n- 3-bit\n\
            - gptq\n---\n\n# w3\n";
        assert!(text.starts_with(expected), "{text}");
        assert!(text.contains("[README.base.md](README.base.md)") && !text.contains("license: no"));
        for none in ["", "# No metadata", "---\nlicense: x\n", "text\n---\nlicense: x\n---\n"] {
            assert_eq!(inherited(none), [""; 0], "{none}");
        }
        assert_eq!(
            inherited("---\nlicense: x\u{85}evil: y\nlanguage: en\u{202e}\nlicense_name: z\n---\n"),
            ["license_name: z"]
        );
        // A name that the Hub would refuse is left out of the metadata.
        assert!(!card("my  model", "w3", Format::GPTQ_V1, None).contains("base_model:"));
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
