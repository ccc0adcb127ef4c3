//! The peak memory of real runs against the plan that was made at their start.
#![cfg(feature = "run")]

mod support;
#[allow(dead_code, missing_docs, unreachable_pub)]
#[path = "../benches/wide_checkpoint.rs"]
mod wide_checkpoint;

use clap::Parser;
use serde_json::Value;
use std::path::Path;
use support::program::{emulated_run, read_json, stderr, succeed, text};
use support::{data, golden};

/// What a run held at most, over what was planned.
fn ratio(what: &str, out: &Path) -> f64 {
    let report = read_json(out.join("report.json"));
    let host = &report["memory_plan"]["host"];
    let measured = report["peak_memory_bytes"].as_u64().unwrap();
    assert_eq!(host["measured_bytes"].as_u64().unwrap(), measured);
    // Emulated kernels have their device's memory on the host.
    let device = match report["memory_plan"]["device_is_host"].as_bool().unwrap() {
        true => 0,
        false => report["memory_plan"]["device_bytes"].as_u64().unwrap(),
    };
    let planned = host["bytes"].as_u64().unwrap() + device;
    let stages: Vec<String> = host["stages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|stage: &Value| format!("{} {} {}", stage["stage"], stage["step"], stage["bytes"]))
        .collect();
    let ratio = measured as f64 / planned as f64;
    println!("{what}: {measured} of {planned}, {ratio:.3} [{}]", stages.join("; "));
    ratio
}

const METHODS: &[(&str, &[&str])] =
    &[("gptaq vlmq", &[]), ("gptq none", &["--solver", "gptq", "--importance", "none"]), ("rtn", &["--solver", "rtn"])];

#[test]
fn wide_runs_hold_what_was_planned() {
    let work = tempfile::tempdir().unwrap();
    let model = text(work.path().join("wide"));
    let sizes = ["--hidden", "512", "--intermediate", "4608", "--heads", "8", "--kv-heads", "2", "--blocks", "2"];
    let arguments = ["wide_checkpoint", &model].into_iter().chain(sizes);
    wide_checkpoint::write(&wide_checkpoint::Arguments::parse_from(arguments)).unwrap();
    for (method, flags) in METHODS {
        let out = work.path().join(method.replace(' ', "-"));
        let calib = text(data("vqa/calib.jsonl"));
        let line = ["quantize", &model, "--calib", &calib, "--out", &text(&out), "--samples", "6", "--quiet"];
        succeed(&[&line[..], flags].concat());
        let ratio = ratio(method, &out);
        assert!((0.9..=1.1).contains(&ratio), "{method}: {ratio}");
    }
}

#[test]
fn small_runs_hold_what_was_planned() {
    let work = tempfile::tempdir().unwrap();
    let calib = text(data("vqa/calib.jsonl"));
    for (name, samples) in [("tiny-qwen2-vl", "16"), ("tiny-qwen2-vl-narrow", "24")] {
        for (method, flags) in METHODS {
            let out = work.path().join(format!("{name}-{}", method.replace(' ', "-")));
            let (model, to) = (text(data(name)), text(&out));
            let line = ["quantize", &model, "--calib", &calib, "--out", &to, "--samples", samples, "--quiet"];
            succeed(&[&line[..], flags].concat());
            let ratio = ratio(&format!("{name} {method}"), &out);
            assert!((0.9..=1.1).contains(&ratio), "{name} {method}: {ratio}");
        }
    }
}

#[test]
fn a_family_of_each_kind_holds_what_was_planned() {
    let work = tempfile::tempdir().unwrap();
    for name in ["qwen2_5_vl-flat-bf16", "llava-hub-tied-f16", "qwen3_vl-tied-bf16"] {
        let model = text(golden("model").join(name));
        let calib = text(golden("model").join(format!("{name}.jsonl")));
        let out = work.path().join(name);
        let to = text(&out);
        let line = ["quantize", &model, "--calib", &calib, "--out", &to, "--group-size", "32", "--quiet"];
        succeed(&line);
        let here = ratio(name, &out);
        assert!((0.9..=1.1).contains(&here), "{name}: {here}");
        let there = text(work.path().join(format!("{name}-emulated")));
        let line = line.map(|argument| if argument == to { there.clone() } else { argument.to_owned() });
        let output = emulated_run(&[&line[..], &["--device", "cuda"].map(str::to_owned)].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        ratio(&format!("{name}, emulated"), Path::new(&there));
    }
}
