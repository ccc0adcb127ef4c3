//! The peak memory of real runs against the plan that was made at their start.

#[allow(dead_code, missing_docs, unreachable_pub)]
#[path = "../../benches/wide_checkpoint.rs"]
mod wide_checkpoint;

use crate::sparse::hollow;
use crate::support::program::{emulated_run, read_json, stderr, succeed, text, vlmq_run};
use crate::support::{data, golden};
use clap::Parser;
use std::fs;
use std::path::Path;

/// What a run held at most, and what was planned; of emulated kernels with their device's memory, which is the host's.
fn peak(what: &str, out: &Path) -> [f64; 2] {
    let report = read_json(out.join("report.json"));
    let plan = &report["memory_plan"];
    let measured = report["peak_memory_bytes"].as_u64().unwrap();
    assert_eq!(plan["host"]["measured_bytes"].as_u64().unwrap(), measured);
    let device = if plan["device_is_host"] == true { 0 } else { plan["device_bytes"].as_u64().unwrap() };
    let planned = plan["host"]["bytes"].as_u64().unwrap() + device;
    let steps = plan["host"]["stages"].as_array().unwrap().iter();
    let steps: Vec<String> = steps.map(|stage| format!("{} {}", stage["step"], stage["bytes"])).collect();
    println!("{what}: {measured} of {planned}, {:.3} [{}]", measured as f64 / planned as f64, steps.join("; "));
    [measured as f64, planned as f64]
}

/// Quantizes and asserts that not much more and not much less was held than planned.
fn check(what: &str, line: &[&str], out: &Path) {
    succeed(line);
    let [measured, planned] = peak(what, out);
    assert!((0.9..=1.1).contains(&(measured / planned)), "{what}: {measured} of {planned}");
}

fn write_wide(folder: &str, sizes: &[&str]) {
    let arguments = [&["wide_checkpoint", folder], sizes].concat();
    wide_checkpoint::write(&wide_checkpoint::Arguments::parse_from(arguments)).unwrap();
}

const METHODS: &[(&str, &[&str])] = &[
    ("gptaq vlmq", &[]),
    // With scales refitted.
    ("gptaq vlmq w2", &["--bits", "2"]),
    ("gptq none", &["--solver", "gptq", "--importance", "none"]),
    ("rtn", &["--solver", "rtn"]),
];

#[test]
#[ignore = "slow: whole runs of a wide model"]
fn wide_runs_hold_what_was_planned() {
    let work = tempfile::tempdir().unwrap();
    let (model, calib) = (text(work.path().join("wide")), text(data("vqa/calib.jsonl")));
    write_wide(
        &model,
        &["--hidden", "512", "--intermediate", "4608", "--heads", "8", "--kv-heads", "2", "--blocks", "2"],
    );
    for (method, flags) in METHODS {
        let out = work.path().join(method.replace(' ', "-"));
        let to = text(&out);
        let line = ["quantize", &model, "--calib", &calib, "--out", &to, "--samples", "6", "--quiet"];
        check(method, &[&line[..], flags].concat(), &out);
    }
}

/// Runs of a model by every method.
fn check_small_runs(name: &str, samples: &str) {
    let work = tempfile::tempdir().unwrap();
    let calib = text(data("vqa/calib.jsonl"));
    for (method, flags) in METHODS {
        let out = work.path().join(method.replace(' ', "-"));
        let (model, to) = (text(data(name)), text(&out));
        let line = ["quantize", &model, "--calib", &calib, "--out", &to, "--samples", samples, "--quiet"];
        check(&format!("{name} {method}"), &[&line[..], flags].concat(), &out);
    }
}

#[test]
#[ignore = "slow: several whole runs"]
fn small_runs_hold_what_was_planned() {
    check_small_runs("tiny-qwen2-vl", "16");
}

#[test]
fn narrow_runs_hold_what_was_planned() {
    check_small_runs("tiny-qwen2-vl-narrow", "24");
}

#[test]
fn runs_of_every_family_hold_what_was_planned() {
    let work = tempfile::tempdir().unwrap();
    for name in ["flat-tied-bf16", "qwen2_5_vl-flat-bf16", "llava-hub-tied-f16", "qwen3_vl-tied-bf16"] {
        let (model, calib) = (text(golden("model").join(name)), text(golden("model").join(format!("{name}.jsonl"))));
        let out = work.path().join(name);
        let to = text(&out);
        check(name, &["quantize", &model, "--calib", &calib, "--out", &to, "--group-size", "32", "--quiet"], &out);
    }
}

/// Evaluates, and asserts the same of what was held; returns that.
fn check_evaluation(what: &str, line: &[&str]) -> f64 {
    let output = vlmq_run(&[line, &["--log-level", "info"]].concat());
    let said = stderr(&output);
    assert!(output.status.success(), "{what}: {said}");
    let numbers = said.lines().find_map(|line| line.split("peak memory: ").nth(1)).unwrap_or_else(|| panic!("{said}"));
    let numbers: Vec<f64> = numbers.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [measured, planned] = numbers[..] else { panic!("{said}") };
    println!("{what}: {measured} of {planned}, {:.3}\n{said}", measured / planned);
    assert!((0.9..=1.1).contains(&(measured / planned)), "{what}: {measured} of {planned}");
    measured
}

/// Evaluations of a model by itself and beside a reference.
fn check_small_evaluations(name: &str) {
    let (model, questions) = (text(data(name)), text(data("vqa/eval.jsonl")));
    let alone = ["eval", &model, &questions, "--limit", "40"];
    check_evaluation(name, &alone);
    check_evaluation(&format!("{name}, twice"), &[&alone[..], &["--reference", &model]].concat());
}

#[test]
#[ignore = "slow: two evaluations"]
fn small_evaluations_hold_what_was_planned() {
    check_small_evaluations("tiny-qwen2-vl");
}

#[test]
fn narrow_evaluations_hold_what_was_planned() {
    check_small_evaluations("tiny-qwen2-vl-narrow");
}

/// Bytes of a folder's weights.
fn weights_of(folder: &str) -> f64 {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let weights = files.filter(|file| file.file_name().to_str().unwrap().ends_with(".safetensors"));
    weights.map(|file| file.metadata().unwrap().len() as f64).sum()
}

/// A model whose float32 weights pass what is held is never there as a whole, as a float model, as codes, or beside a reference.
#[test]
#[ignore = "slow: half a billion weights"]
fn large_evaluations_hold_some_blocks() {
    let work = tempfile::tempdir().unwrap();
    let (model, out) = (text(work.path().join("wide")), text(work.path().join("out")));
    write_wide(&model, &["--blocks", "12"]);
    let float32 = 12.0 * 4.0 * (2.0 * 1536.0 * 1536.0 + 2.0 * 256.0 * 1536.0 + 3.0 * 1536.0 * 8960.0);
    let line = ["quantize", &model, "--out", &out, "--solver", "rtn", "--quiet"];
    succeed(&line);
    let questions = text(data("vqa/eval.jsonl"));
    let asked = [questions.as_str(), "--limit", "1", "--max-new-tokens", "1"];
    for (what, folder, more) in [("float", &model, &[][..]), ("codes against float", &out, &["--reference", &model])] {
        let measured = check_evaluation(what, &[&["eval", folder], &asked[..], more].concat());
        let most = weights_of(folder) + 1.5e9;
        assert!(measured < most && most < 1.2 * float32, "{what}: {measured} of {most}, {float32} in all");
    }
}

/// Qwen2-VL-2B's shapes: 2.2 billion weights, 4.4 GB in the file, 8.8 GB in float32.
#[test]
#[ignore = "slow: two billion weights, twice"]
fn a_published_model_answers_in_little_more_than_its_file() {
    let folder = tempfile::tempdir().unwrap();
    hollow("Qwen2-VL-2B-Instruct", folder.path());
    let (model, questions) = (text(folder.path()), text(data("vqa/eval.jsonl")));
    let line = ["eval", &model, &questions, "--limit", "1", "--max-new-tokens", "1", "--reference", &model];
    let measured = check_evaluation("against a reference", &line);
    assert!(measured < 4.42e9 + 1.5e9, "{measured}");
}

/// The emulator takes some 10 MB for itself, which no plan knows, and more with more images: what a wider model takes more is
/// looked at, with two samples in all.
#[test]
#[ignore = "slow: whole runs on the emulator"]
fn a_wider_model_takes_on_emulated_kernels_what_was_planned() {
    let work = tempfile::tempdir().unwrap();
    let (wide, narrow, calib) =
        (text(work.path().join("wide")), text(work.path().join("narrow")), text(work.path().join("calib.jsonl")));
    let lines = fs::read_to_string(data("vqa/calib.jsonl")).unwrap();
    fs::write(&calib, lines.lines().take(2).collect::<Vec<_>>().join("\n")).unwrap();
    let images = text(data("vqa"));
    let sizes = ["--hidden", "256", "--heads", "4", "--kv-heads", "2", "--blocks", "1", "--intermediate"];
    write_wide(&wide, &[&sizes[..], &["2048"]].concat());
    write_wide(&narrow, &[&sizes[..], &["256"]].concat());
    let [wide, narrow] = [&wide, &narrow].map(|model| {
        let out = format!("{model}-out");
        let line = [
            "quantize",
            model,
            "--calib",
            &calib,
            "--image-root",
            &images,
            "--out",
            &out,
            "--device",
            "cuda",
            "--quiet",
        ];
        let output = emulated_run(&line);
        assert!(output.status.success(), "{}", stderr(&output));
        peak(model, Path::new(&out))
    });
    let ratio = (wide[0] - narrow[0]) / (wide[1] - narrow[1]);
    println!("{ratio:.3}");
    assert!((0.9..=1.1).contains(&ratio), "{ratio}");
}
