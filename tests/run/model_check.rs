//! What a run says of the finished model as a whole: the predictions of both paths, and that a model is destroyed.

use crate::resuming::{PLAIN, Place};
use crate::support::program::{Bench, edit_tensor, emulated_run, read_json, stderr, stdout, succeed, text, vlmq_run};
use crate::support::{data, message};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use vlmq::data::dataset;
use vlmq::device::cpu::Cpu;
use vlmq::progress::{Observer, Stage, StageTime};
use vlmq::quantize::settings::{Importance, Solver};
use vlmq::report::RunObserver;
use vlmq::run::{self, RunSettings};

const FLAT: &str = "flat-tied-bf16";

/// Questions without an image whose answers are long.
fn long_answers(bench: &Bench) {
    let words = ["red", "circle", "blue", "square", "and", "a", "green", "star", "left", "of", "the", "seven"];
    let line = |i: usize| {
        let answer: Vec<&str> = (0..30).map(|j| words[(i * i + 7 * j + j * j * (i + 1)) % words.len()]).collect();
        json!({"id": format!("{i}"), "messages": [
            {"role": "user", "content": "what shape?"},
            {"role": "assistant", "content": answer.join(" ")},
        ]})
        .to_string()
    };
    let lines: Vec<String> = (0..6).map(line).collect();
    bench.write_data(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

/// The report of a run and its summary; the output stays.
fn quantized(bench: &Bench, extra: &[&str], emulated: bool) -> (Value, String) {
    let _ = fs::remove_dir_all(bench.outputs().join("out"));
    let arguments = bench.quantize(extra);
    let output = if emulated { emulated_run(&arguments) } else { vlmq_run(&arguments) };
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    (read_json(bench.outputs().join("out/report.json")), stdout(&output))
}

fn figure(report: &Value, name: &str) -> f64 {
    report["check"][name].as_f64().unwrap_or_else(|| panic!("{name}: {}", report["check"]))
}

/// Lines of the data that a run of so many samples draws, and those behind them.
fn drawn(bench: &Bench, samples: usize) -> [Vec<String>; 2] {
    let lines: Vec<String> = fs::read_to_string(bench.data()).unwrap().lines().map(str::to_owned).collect();
    let all = dataset::select(dataset::read(&bench.data(), None).unwrap(), None, 0);
    let mut lines: Vec<String> = all.iter().map(|one| lines[one.id.parse::<usize>().unwrap()].clone()).collect();
    let others = lines.split_off(samples);
    [lines, others]
}

/// Enough answers are all that is asked: `eval` on the same data sees the same tokens.
#[test]
fn figures_are_those_of_an_evaluation() {
    let bench = Bench::new(FLAT);
    long_answers(&bench);
    let (out, model, json) =
        (text(bench.outputs().join("out")), text(bench.model()), text(bench.outputs().join("scores.json")));
    let data = bench.outputs().join("asked.jsonl");
    for (samples, extra) in [
        ("3", &["--bits", "2"][..]),
        ("3", &["--bits", "2", "--solver", "gptq", "--importance", "none", "--refit", "none"]),
        ("6", &["--bits", "2", "--solver", "gptq", "--importance", "none", "--refit", "none"]),
    ] {
        let (report, summary) = quantized(&bench, &[&["--samples", samples][..], extra].concat(), false);
        let [lines, others] = drawn(&bench, samples.parse().unwrap());
        let (asked, of) = match samples {
            "3" => (others, "3 samples held out"),
            _ => (lines, "the calibration samples, which flatter it"),
        };
        fs::write(&data, asked.join("\n")).unwrap();
        let scores = |of: &[&str]| {
            let _ = fs::remove_file(&json);
            succeed(&[&["eval"][..], of, &["--json", &json, "--quiet"]].concat());
            read_json(&json)
        };
        let of_out = scores(&[&out, &text(&data), "--reference", &model]);
        let of_float = scores(&[&model, &text(&data)]);
        let near = |name: &str, expected: &Value| {
            let (found, expected) = (figure(&report, name), expected.as_f64().unwrap());
            assert!((found - expected).abs() <= 1e-4 * expected.abs().max(1e-3), "{name}: {found} for {expected}");
        };
        near("nll_quantized", &of_out["nll"]);
        near("nll_float", &of_float["nll"]);
        near("kl", &of_out["kl"]);
        assert!(figure(&report, "kl") > 1e-4);
        let config = read_json(bench.file("config.json"));
        let vocab = config["text_config"]["vocab_size"].as_f64().or(config["vocab_size"].as_f64()).unwrap();
        assert!((figure(&report, "nll_guess") - vocab.ln()).abs() < 1e-9);
        let kept = figure(&report, "agreement");
        assert!((0.0..=1.0).contains(&kept) && figure(&report, "tokens") >= 64.0);
        assert_eq!(report["check"]["findings"], json!([]));
        assert!(
            summary.contains("\n  predictions  nll ") && summary.contains(&format!(" tokens of {of})")),
            "{summary}"
        );
        let read = |name: &str| fs::read_to_string(bench.outputs().join("out").join(name)).unwrap();
        let (page, card) = (read("report.html"), read("README.md"));
        assert!(page.contains("id=\"predictions\"") && page.contains("id=\"figure-kl\"") && page.contains(of));
        assert!(card.contains("| predictions | nll "), "{card}");
        assert_eq!(report["calibration"]["used"].to_string(), samples);
        // Without a float path of its own the method runs one for what is asked, and only for that.
        let gptq = report["settings"]["solver"]["solver"] == "gptq";
        assert_eq!(report["blocks"][1]["path_error"].is_null(), gptq && samples == "3");
    }
}

#[test]
fn samples_held_out_decide_no_weight() {
    let bench = Bench::new(FLAT);
    long_answers(&bench);
    let weights = || fs::read(bench.outputs().join("out/model.safetensors")).unwrap();
    let (before, _) = quantized(&bench, &["--samples", "3"], false);
    let first = weights();
    // In the same places of the file other texts, one of which nobody could read.
    let [lines, others] = drawn(&bench, 3);
    let mut text = fs::read_to_string(bench.data()).unwrap();
    let broken = |line: &str| line.replace("what shape?", r#"[{"type": "image", "image": "none.png"}]"#);
    text = text.replace(&others[0], &others[0].replace(r#""what shape?""#, &broken("what shape?")));
    text = text.replace(&others[1], &others[1].replace("red", "seven blue"));
    fs::write(bench.data(), &text).unwrap();
    assert_eq!(drawn(&bench, 3)[0], lines);
    let (after, _) = quantized(&bench, &["--samples", "3"], false);
    assert!(weights() == first);
    assert_eq!((&before["check"]["held_out"], &after["check"]["held_out"]), (&json!(3), &json!(2)));
    assert_ne!(before["check"]["kl"], after["check"]["kl"]);
    let sums = |report: &Value, name: &str| report["inputs"][name].as_str().unwrap().to_owned();
    assert_eq!(sums(&before, "samples"), sums(&after, "samples"));
    assert_ne!(sums(&before, "held_out"), sums(&after, "held_out"));
}

/// Puts something in the output's place once all blocks are done.
struct InTheWay(PathBuf);

impl Observer for InTheWay {
    fn stage_finished(&mut self, time: &StageTime) {
        if time.stage == Stage::Blocks {
            fs::create_dir(&self.0).unwrap();
            fs::write(self.0.join("file"), "").unwrap();
        }
    }
}

impl RunObserver for InTheWay {}

#[test]
fn figures_are_kept_behind_the_last_block() {
    for solver in [Solver::Gptaq, Solver::Gptq] {
        let place = Place::new(PLAIN);
        let importance = if solver == Solver::Gptq { Importance::None } else { Importance::Vlmq };
        let mut settings = RunSettings { samples: 2, importance, ..place.settings() };
        settings.solver.solver = solver;
        let expected = run::run(&Cpu, &settings, &mut ()).unwrap().check.unwrap();
        assert!(expected.held_out > 0 && expected.tokens > 0, "{expected:?}");
        fs::remove_dir_all(place.out()).unwrap();
        let error = message(run::run(&Cpu, &settings, &mut InTheWay(place.out())));
        assert!(error.contains("3 of 3 blocks are done"), "{error}");
        fs::remove_dir_all(place.out()).unwrap();
        assert_eq!(run::run(&Cpu, &settings, &mut ()).unwrap().check, Some(expected));
    }
}

#[test]
fn rounding_to_nearest_says_that_nothing_was_compared() {
    let bench = Bench::new(FLAT);
    let (report, summary) = quantized(&bench, &["--solver", "rtn"], false);
    assert!(report["check"].is_null());
    assert!(summary.contains("\n  predictions  not compared: rounding to nearest runs no samples"), "{summary}");
    let page = fs::read_to_string(bench.outputs().join("out/report.html")).unwrap();
    assert!(page.contains("Not compared: rounding to nearest runs no samples."));
}

#[test]
fn the_device_agrees() {
    let bench = Bench::new(FLAT);
    long_answers(&bench);
    let (here, _) = quantized(&bench, &["--samples", "3"], false);
    let (there, _) = quantized(&bench, &["--samples", "3", "--device", "cuda"], true);
    for name in ["nll_float", "nll_quantized", "nll_guess", "kl_guess"] {
        let (found, expected) = (figure(&there, name), figure(&here, name));
        assert!((found - expected).abs() < 0.01 * expected, "{name}: {found} for {expected}");
    }
    assert_eq!(there["check"]["tokens"], here["check"]["tokens"]);
}

/// A trained model in which one input of most layers is next to nothing and its weights are huge: the float model does as
/// before, but grids over the full range have no place for the other weights.
fn fragile() -> Bench {
    let bench = Bench::new(&text(data("tiny-qwen2-vl-narrow")));
    let first_of_row = |tensor: String, value: f32| {
        let bits = ((value.to_bits() >> 16) as u16).to_le_bytes();
        edit_tensor(&bench.file("model.safetensors"), &tensor, |bytes| {
            bytes.chunks_mut(2 * 128).for_each(|row| row[..2].copy_from_slice(&bits));
        });
    };
    for block in 0..4 {
        for (norm, layers) in [
            ("input_layernorm", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..]),
            ("post_attention_layernorm", &["mlp.gate_proj", "mlp.up_proj"]),
        ] {
            first_of_row(format!("model.layers.{block}.{norm}.weight"), 1e-7);
            layers.iter().for_each(|layer| first_of_row(format!("model.layers.{block}.{layer}.weight"), 1e4));
        }
    }
    bench
}

#[test]
fn a_destroyed_model_is_told() {
    let bench = fragile();
    let (calib, images) = (text(data("vqa/calib.jsonl")), text(data("vqa")));
    let (model, out) = (text(bench.model()), text(bench.outputs().join("out")));
    let line = |extra: &[&str]| {
        let fixed = ["quantize", &model, "--calib", &calib, "--image-root", &images, "--out", &out, "--samples", "32"];
        [&fixed[..], &["--bits", "2"], extra].concat().iter().map(|&word| word.to_owned()).collect::<Vec<String>>()
    };
    let output = vlmq_run(&line(&["--importance", "none", "--alpha", "0"]));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = read_json(bench.outputs().join("out/report.json"));
    let finding = &report["check"]["findings"][0];
    assert_eq!((&finding["kind"], &finding["done"]), (&json!("model-destroyed"), &json!("written as it is")));
    let found = finding["found"].as_str().unwrap();
    assert!(found.starts_with("the quantized model predicts samples held out at "), "{found}");
    assert!(stderr(&output).contains(&format!("warn: {found}: written as it is; raise --bits")), "{}", stderr(&output));
    assert!(figure(&report, "nll_float") < 1.0 && figure(&report, "kl") > 0.5 * figure(&report, "kl_guess"));
    assert!(stdout(&output).contains(&format!("\n  DESTROYED    {found}; raise --bits")), "{}", stdout(&output));
    let read = |name: &str| fs::read_to_string(bench.outputs().join("out").join(name)).unwrap();
    assert!(read("report.html").contains("the whole model"));
    assert!(read("README.md").contains(&format!("**Do not use it: {found}.**")), "{}", read("README.md"));
}
