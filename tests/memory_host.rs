//! The peak memory of real runs against the plan that was made at their start.
#![cfg(feature = "run")]

mod support;
#[allow(dead_code, missing_docs, unreachable_pub)]
#[path = "../benches/wide_checkpoint.rs"]
mod wide_checkpoint;

use clap::Parser;
use std::fs;
use std::path::Path;
use support::program::{emulated_run, read_json, stderr, succeed, text};
use support::{data, golden};

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

const METHODS: &[(&str, &[&str])] =
    &[("gptaq vlmq", &[]), ("gptq none", &["--solver", "gptq", "--importance", "none"]), ("rtn", &["--solver", "rtn"])];

#[test]
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

#[test]
fn small_runs_hold_what_was_planned() {
    let work = tempfile::tempdir().unwrap();
    let calib = text(data("vqa/calib.jsonl"));
    for (name, samples) in [("tiny-qwen2-vl", "16"), ("tiny-qwen2-vl-narrow", "24")] {
        for (method, flags) in METHODS {
            let out = work.path().join(format!("{name}-{}", method.replace(' ', "-")));
            let (model, to) = (text(data(name)), text(&out));
            let line = ["quantize", &model, "--calib", &calib, "--out", &to, "--samples", samples, "--quiet"];
            check(&format!("{name} {method}"), &[&line[..], flags].concat(), &out);
        }
    }
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

/// The emulator takes some 10 MB for itself, which no plan knows, and more with more images: what a wider model takes more is
/// looked at, with two samples in all.
#[test]
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
