//! `quantize --dry-run`: the same checks as a run, what the run would take, and nothing read or written for it.

use crate::sparse::hollow;
use crate::support::data;
use crate::support::program::{Bench, brief_run, edit_json, names_in, read_json, stderr, stdout, succeed, text};
use serde_json::{Value, json};
use std::fs;

/// Most processor time of a dry run, in seconds.
const SECONDS: u32 = 10;

/// The plan of a command line as JSON.
fn planned(arguments: &[&str]) -> Value {
    serde_json::from_str(&succeed(&[arguments, &["--dry-run=json", "--quiet"]].concat())).unwrap()
}

fn bytes(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value}"))
}

#[test]
fn large_models_are_planned_in_seconds_and_nothing_is_written() {
    for (name, blocks) in [("Qwen2-VL-7B-Instruct", 28.0), ("Qwen2-VL-72B-Instruct", 80.0)] {
        let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        hollow(name, folder.path());
        let (model, calib, out) = (text(folder.path()), text(data("vqa/calib.jsonl")), text(work.path().join("out")));
        let line = ["quantize", &model, "--calib", &calib, "--out", &out, "--samples", "16"];
        // Reading 15 or 145 GB of holes would take many times as long.
        let output = brief_run(SECONDS, &[&line[..], &["--dry-run=json", "--quiet"]].concat());
        let code = output.status.code();
        assert!(code.is_some(), "{name}: {}: more than {SECONDS} s of processor time?", output.status);
        assert_eq!(names_in(work.path()), [""; 0]);
        if code != Some(0) {
            let error = stderr(&output);
            // A machine too small for it says what is lacking.
            let lacks = error.contains("of host memory (") || error.contains("on disk while the run lasts");
            assert!(lacks && error.contains("GiB"), "{name}: {error}");
            continue;
        }
        let plan: Value = serde_json::from_str(&stdout(&output)).unwrap();
        // Two paths of a block and its H, C and factors alone.
        let inner = if blocks < 30.0 { 18944.0 } else { 29568.0f64 };
        assert!(bytes(&plan["memory"]["host"]["bytes"]) as f64 > 3.4 * 4.0 * inner.powi(2), "{name}: {plan:#}");
        assert!(plan["time"]["seconds"].as_f64().unwrap() > blocks, "{name}: {plan:#}");
        // 3 bits and a scale, a zero for 128 of 6.5 or 70 billion weights, and what is kept.
        assert!(bytes(&plan["disk"]["output_bytes"]) > 2_500_000_000, "{name}: {plan:#}");
    }
}

#[test]
fn a_plan_is_the_runs_own() {
    let bench = Bench::new("nested-f16-sharded");
    let line = bench.quantize(&["--samples", "1", "--max-pixels", "12544"]);
    let line: Vec<&str> = line.iter().map(String::as_str).collect();
    let plan = planned(&line);
    assert_eq!(names_in(&bench.outputs()), [""; 0]);
    succeed(&line);
    let out = bench.outputs().join("out");
    let report = read_json(out.join("report.json"));
    for key in ["device_bytes", "activations", "device_is_host"] {
        assert_eq!(plan["memory"][key], report["memory_plan"][key], "{key}");
    }
    assert_eq!(plan["calibration"], report["calibration"]);
    assert_eq!(plan["family"], report["family"]);
    // What the process holds before differs by pages of the program itself.
    let host = |plan: &Value| bytes(&plan["host"]["bytes"]) as f64;
    let (there, here) = (host(&plan["memory"]), host(&report["memory_plan"]));
    assert!((there / here - 1.0).abs() < 0.05, "{there} against {here}");
    // The output to the byte, but for what tells of the run and of the quantization.
    let written: u64 = names_in(&out)
        .iter()
        .filter(|name| {
            !["README.md", "SHA256SUMS", "config.json", "report.html", "report.json"].contains(&name.as_str())
        })
        .map(|name| fs::metadata(out.join(name)).unwrap().len())
        .sum();
    let written = written + fs::metadata(bench.file("config.json")).unwrap().len();
    assert_eq!(bytes(&plan["disk"]["output_bytes"]), written);

    // The same for people.
    let (out, other) = (text(&out), text(bench.outputs().join("other")));
    let line: Vec<&str> = line.iter().map(|&argument| if argument == out { &other } else { argument }).collect();
    let lines = succeed(&[&line[..], &["--dry-run"]].concat());
    for part in ["all inputs are good", "host memory: ", "disk: ", "time, estimated: ", "quantizing"] {
        assert!(lines.contains(part), "{part:?} is not in {lines}");
    }
}

#[test]
fn what_a_run_refuses_a_dry_run_refuses() {
    let bench = Bench::new("flat-tied-bf16");
    let refused = |extra: &[&str], says: &[&str]| {
        bench.refused(&bench.quantize(&[extra, &["--dry-run"]].concat()), says);
    };
    refused(&["--group-size", "56"], &["the group size 56 does not divide"]);
    refused(&["--chat-template", "none.jinja"], &["none.jinja"]);
    refused(&["--eval", "none.jsonl"], &["none.jsonl"]);
    bench.write_data(&[&crate::support::program::question("missing.png")]);
    refused(&[], &["missing.png"]);
    bench.write_data(&[r#"{"text": "a"}"#, "{"]);
    refused(&[], &["data.jsonl:2"]);
    bench.write_data(&[r#"{"text": "a"}"#]);
    edit_json(&bench.file("config.json"), |config| {
        config.insert("intermediate_size".into(), json!(72));
    });
    refused(&[], &["72"]);
}

#[test]
fn weights_are_not_looked_at() {
    // A NaN in a weight stops a run; a dry run does not read it.
    let bench = Bench::new("flat-tied-bf16");
    let name = "model.layers.0.mlp.down_proj.weight";
    crate::support::program::edit_tensor(&bench.file("model.safetensors"), name, |bytes| bytes.fill(0xff));
    bench.refused(&bench.quantize(&[]), &[name, "NaN"]);
    let lines = succeed(&bench.quantize(&["--dry-run"]));
    assert!(lines.contains("nothing was written"), "{lines}");
    assert_eq!(names_in(&bench.outputs()), [""; 0]);
}
