//! Numbers that go wrong: each is found, something is done about it, and `--strict` stops instead.
#![cfg(feature = "run")]

mod support;

use serde_json::Value;
use std::fs;
use support::devices::device;
use support::program::{Bench, edit_tensor, emulated_run, question, read_json, stderr, text, vlmq_run};
use support::{golden, message, noise};
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::Precision;
use vlmq::device::{ScaleType, SolveOps};
use vlmq::quantize::plain::{QuantizedLayer, quantize_layer};
use vlmq::quantize::settings::{Order, Solver, SolverSettings};
use vlmq::quantize::solve::{prepare, round_to_nearest, solve, solve_layer};
use vlmq::quantize::statistics::Statistics;
use vlmq::quantize::{Finding, FindingKind, SolveReport};
use vlmq::tensor::Matrix;

fn gptq() -> SolverSettings {
    SolverSettings { solver: Solver::Gptq, group_size: Some(32), ..SolverSettings::default() }
}

fn gptaq() -> SolverSettings {
    SolverSettings { group_size: Some(32), ..SolverSettings::default() }
}

fn kinds(report: &SolveReport) -> Vec<FindingKind> {
    report.findings.iter().map(|finding| finding.kind).collect()
}

/// The only finding, of this kind.
fn only(report: &SolveReport, kind: FindingKind) -> &Finding {
    assert_eq!(kinds(report), [kind], "{report:?}");
    &report.findings[0]
}

/// The layer is what rounding to nearest makes of the weights.
fn assert_rounded(layer: &QuantizedLayer, w: &Matrix, settings: &SolverSettings) {
    let (expected, report) = round_to_nearest(w, settings).unwrap();
    assert_eq!(layer.linear, expected);
    assert_eq!(layer.report.relative_error, report.relative_error);
    assert_eq!(layer.report.findings[0].done, "rounded to nearest instead");
}

/// Runs a check on the CPU and on emulated kernels.
macro_rules! on_both_devices {
    ($check:ident) => {
        $check(&Cpu);
        $check(&device(Precision::F32));
    };
}

#[test]
fn enough_good_tokens_are_no_finding() {
    fn check<D: SolveOps>(device: &D) {
        let (u, f, w) = (noise(200, 64, 1), noise(200, 64, 2), noise(20, 64, 3));
        for settings in [gptq(), gptaq(), SolverSettings { bits: 8, ..gptq() }, SolverSettings { bits: 2, ..gptaq() }] {
            let layer = quantize_layer(device, &w, &u, Some(&f), None, &settings).unwrap();
            assert_eq!(kinds(&layer.report), []);
        }
    }
    on_both_devices!(check);
}

#[test]
fn damping_is_raised_until_the_factor_exists() {
    /// Eigenvalues 1 ± `coupling` in pairs: positive definite with a damping above `coupling` − 1.
    fn check<D: SolveOps>(device: &D) {
        let statistics = |coupling: f32| {
            let mut h = Matrix::zeros(64, 64);
            for i in 0..64 {
                h.row_mut(i)[i] = 1.0;
                h.row_mut(i & !1)[i | 1] = if i % 2 == 0 { coupling } else { h.row(i & !1)[i | 1] };
            }
            (0..64).for_each(|i| h.row_mut(i)[i] = 1.0);
            Statistics { hessian: device.upload(h).unwrap(), cross: None, tokens: 500 }
        };
        let made = statistics(1.05);
        let prepared = prepare(device, &made, &gptq()).unwrap();
        assert_eq!(prepared.damp(), Some(0.08));
        let w = noise(8, 64, 4);
        let weight = device.upload(w.clone()).unwrap();
        let (_, report) = solve_layer(device, &prepared, &made.hessian, &weight, &gptq()).unwrap();
        let finding = only(&report, FindingKind::DampingRaised);
        assert!(finding.found.starts_with("H is not positive definite with damping 0.01 (input "), "{finding}");
        assert_eq!(finding.done, "damping raised to 0.08");
        assert_eq!(report.damp, Some(0.08));

        // Nothing helps: the layer is rounded to nearest, and who solves without looking is refused.
        let made = statistics(2.5);
        let prepared = prepare(device, &made, &gptq()).unwrap();
        assert_eq!(prepared.damp(), None);
        let error = message(solve(device, &prepared, &weight, &gptq()));
        assert!(error.contains("not positive definite even with damping 1"), "{error}");
        let (linear, report) = solve_layer(device, &prepared, &made.hessian, &weight, &gptq()).unwrap();
        assert_eq!(linear, round_to_nearest(&w, &gptq()).unwrap().0);
        let finding = only(&report, FindingKind::StatisticsUnusable);
        assert!(finding.found.starts_with("H is not positive definite even with damping 1 (input "), "{finding}");
    }
    on_both_devices!(check);
}

#[test]
fn fewer_tokens_than_inputs() {
    let w = noise(20, 64, 3);
    for (tokens, few) in [(20, true), (63, true), (64, false), (200, false)] {
        let layer = quantize_layer(&Cpu, &w, &noise(tokens, 64, 1), None, None, &gptq()).unwrap();
        assert_eq!(!kinds(&layer.report).is_empty(), few, "{tokens} tokens");
        if few {
            let finding = only(&layer.report, FindingKind::FewTokens);
            assert_eq!(finding.found, format!("{tokens} calibration tokens, fewer than the 64 inputs"));
        }
    }
    // Tokens that weigh nothing are none.
    let g: Vec<f32> = (0..100).map(|token| if token % 2 == 0 { 1.0 } else { 0.0 }).collect();
    let layer = quantize_layer(&Cpu, &w, &noise(100, 64, 1), None, Some(&g), &gptq()).unwrap();
    assert!(only(&layer.report, FindingKind::FewTokens).found.starts_with("50 calibration tokens"));
}

#[test]
fn dead_inputs() {
    fn check<D: SolveOps>(device: &D) {
        let w = noise(20, 64, 3);
        let without = |dead: usize| {
            let mut u = noise(200, 64, 1);
            (0..200).for_each(|token| u.row_mut(token)[..dead].fill(0.0));
            u
        };
        // A tenth are 6.4.
        for (dead, found) in [(1, false), (6, false), (7, true), (63, true)] {
            let layer = quantize_layer(device, &w, &without(dead), None, None, &gptq()).unwrap();
            assert_eq!(layer.report.dead_inputs, dead);
            assert_eq!(kinds(&layer.report), if found { vec![FindingKind::DeadInputs] } else { vec![] });
            let weights = layer.linear.dequantize().unwrap();
            assert!((0..20).all(|row| weights.row(row)[..dead].iter().all(|&w| w == 0.0)));
        }
        for settings in [gptq(), SolverSettings { order: Order::Act, ..gptaq() }] {
            let layer = quantize_layer(device, &w, &without(64), Some(&without(64)), None, &settings).unwrap();
            assert_rounded(&layer, &w, &settings);
            // What the file needs stays.
            assert_eq!(layer.linear.group_index.is_some(), settings.order == Order::Act);
            assert_eq!((layer.report.damp, layer.report.dead_inputs), (None, 64));
            let found = &only(&layer.report, FindingKind::DeadInputs).found;
            assert_eq!(found, "no calibration token excites any of the 64 inputs");
        }
    }
    on_both_devices!(check);
}

#[test]
fn statistics_that_overflow() {
    fn check<D: SolveOps>(device: &D) {
        let (mut u, w) = (noise(200, 64, 1), noise(20, 64, 3));
        let f = u.clone();
        u.row_mut(7)[5] = 1e25;
        let layer = quantize_layer(device, &w, &u, None, None, &gptq()).unwrap();
        assert_rounded(&layer, &w, &gptq());
        assert!(only(&layer.report, FindingKind::StatisticsUnusable).found.contains("H hold"));
        // The cross term alone.
        let mut huge = f.clone();
        huge.row_mut(7).fill(3e38);
        (0..200).for_each(|token| huge.row_mut(token)[5] = 3e38);
        let layer = quantize_layer(device, &w, &f, Some(&huge), None, &gptaq()).unwrap();
        assert_eq!(layer.linear, quantize_layer(device, &w, &f, None, None, &gptq()).unwrap().linear);
        let finding = only(&layer.report, FindingKind::StatisticsUnusable);
        assert!(finding.found.contains("C hold") && finding.done.contains("GPTQ"), "{finding}");
    }
    on_both_devices!(check);
}

/// Float-path inputs a hundred times the quantized path's: what GPTAQ then steers to has little to do with the weights.
#[test]
fn an_error_that_explodes() {
    fn check<D: SolveOps>(device: &D) {
        let (u, w) = (noise(200, 64, 1), noise(20, 64, 3));
        let mut f = u.clone();
        f.data_mut().iter_mut().for_each(|f| *f *= 100.0);
        for settings in [gptaq(), SolverSettings { alpha: 1.0, bits: 8, ..gptaq() }] {
            let layer = quantize_layer(device, &w, &u, Some(&f), None, &settings).unwrap();
            let plain = SolverSettings { solver: Solver::Gptq, ..settings.clone() };
            let expected = quantize_layer(device, &w, &u, None, None, &plain).unwrap();
            assert_eq!(layer.linear, expected.linear);
            assert_eq!(layer.report.relative_error, expected.report.relative_error);
            let finding = only(&layer.report, FindingKind::ErrorExploded);
            assert!(finding.found.starts_with("relative error ") && finding.done.contains("GPTQ"), "{finding}");
        }
        // A path that is off by half steers by as much, which is what it is for.
        f.data_mut().iter_mut().zip(noise(200, 64, 9).data()).for_each(|(f, n)| *f = *f / 100.0 + 0.5 * n);
        for bits in [2, 3, 4, 8] {
            let settings = SolverSettings { bits, ..gptaq() };
            let layer = quantize_layer(device, &w, &u, Some(&f), None, &settings).unwrap();
            assert_eq!(kinds(&layer.report), [], "{bits} bits");
        }
    }
    on_both_devices!(check);
}

/// One input that is a hundred times its neighbours hands them a hundred times its rounding error, in weights.
#[test]
fn corrections_that_outgrow_the_type_of_scales() {
    fn check<D: SolveOps>(device: &D) {
        let mut w = noise(20, 64, 3);
        w.data_mut().iter_mut().for_each(|w| *w *= 2000.0);
        let mut u = noise(400, 64, 1);
        for token in 0..400 {
            let row = u.row_mut(token);
            (32..64).for_each(|i| row[i] = 1e-3 * (row[i - 32] + 1e-3 * row[i]));
        }
        let settings = SolverSettings { bits: 2, scale_type: ScaleType::F16, damp: 1e-9, ..gptq() };
        let layer = quantize_layer(device, &w, &u, None, None, &settings).unwrap();
        let finding = layer.report.findings.iter().find(|f| f.kind == FindingKind::ErrorExploded).unwrap();
        assert!(finding.found.contains("output row") && finding.found.contains("F16"), "{finding}");
        assert_eq!(layer.linear, round_to_nearest(&w, &settings).unwrap().0);
        assert!(layer.report.relative_error.is_finite());
        // The weights themselves too large: that is an error, with the figure.
        w.row_mut(11)[40] = 1e6;
        let error = message(quantize_layer(device, &w, &u, None, None, &settings));
        assert!(error.contains("row 11") && error.contains("F16") && error.contains("1e6"), "{error}");
    }
    on_both_devices!(check);
}

#[test]
fn weights_of_zeros_are_no_finding() {
    let (u, f) = (noise(200, 64, 1), noise(200, 64, 2));
    let mut w = noise(20, 64, 3);
    w.row_mut(4).fill(0.0);
    (0..20).for_each(|row| w.row_mut(row)[32..].fill(0.0));
    for settings in [gptq(), gptaq()] {
        let layer = quantize_layer(&Cpu, &w, &u, Some(&f), None, &settings).unwrap();
        assert_eq!(kinds(&layer.report), []);
        assert!(layer.linear.dequantize().unwrap().row(4).iter().all(|&w| w == 0.0));
        let nothing = quantize_layer(&Cpu, &Matrix::zeros(20, 64), &u, Some(&f), None, &settings).unwrap();
        assert_eq!((kinds(&nothing.report), nothing.report.relative_error), (vec![], 0.0));
    }
    // Weights whose squares float32 does not hold have an error in the Frobenius norm.
    let mut tiny = noise(20, 64, 3);
    tiny.data_mut().iter_mut().for_each(|w| *w *= 1e-30);
    let settings = SolverSettings { scale_type: ScaleType::F32, ..gptq() };
    let mut quiet = u;
    quiet.data_mut().iter_mut().for_each(|u| *u *= 1e-15);
    let layer = quantize_layer(&Cpu, &tiny, &quiet, None, None, &settings).unwrap();
    assert!(layer.report.relative_error.is_finite(), "{:?}", layer.report);
}

const FLAT: &str = "flat-tied-bf16";
const WEIGHTS: &str = "model.safetensors";

/// The report of a run, and what it said on stderr and stdout.
fn quantized(bench: &Bench, extra: &[&str], emulated: bool) -> (Value, String, String) {
    let arguments = bench.quantize(extra);
    let output = if emulated { emulated_run(&arguments) } else { vlmq_run(&arguments) };
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let out = bench.outputs().join("out");
    let report = read_json(out.join("report.json"));
    fs::remove_dir_all(out).unwrap();
    (report, stderr(&output), String::from_utf8(output.stdout).unwrap())
}

/// Layers with a finding of this kind, and the first one's.
fn found<'a>(report: &'a Value, kind: &str) -> (Vec<&'a str>, &'a Value) {
    let layers = report["layers"].as_array().unwrap().iter();
    let of = |layer: &'a Value| layer["findings"].as_array().unwrap().iter().find(|f| f["kind"] == kind);
    let with: Vec<(&str, &Value)> = layers.filter_map(|l| Some((l["name"].as_str().unwrap(), of(l)?))).collect();
    assert!(!with.is_empty(), "no layer has {kind}: {report}");
    (with.iter().map(|(name, _)| *name).collect(), with[0].1)
}

/// Enough text for every layer of the small checkpoint.
fn plenty(bench: &Bench) {
    let words = ["red", "circle", "blue", "square", "and", "a", "green", "star", "left", "of", "the", "seven"];
    let line = |i: usize| {
        let text: Vec<&str> = (0..40).map(|j| words[(i * i + 7 * j + j * j * (i + 1)) % words.len()]).collect();
        serde_json::json!({"text": text.join(" ")}).to_string()
    };
    let lines: Vec<String> =
        (0..12).map(line).chain([question(&text(golden("model/images/gradient-70x42.png")))]).collect();
    bench.write_data(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

fn fill(bench: &Bench, tensor: &str, value: f32) {
    let bits = ((value.to_bits() >> 16) as u16).to_le_bytes();
    edit_tensor(&bench.file(WEIGHTS), tensor, |bytes| {
        bytes.as_chunks_mut::<2>().0.iter_mut().for_each(|two| *two = bits);
    });
}

#[test]
fn a_usual_run_has_no_findings() {
    let bench = Bench::new(FLAT);
    plenty(&bench);
    for extra in [&["--strict"][..], &["--strict", "--solver", "gptq"], &["--strict", "--bits", "2", "--alpha", "1"]] {
        let (report, log, summary) = quantized(&bench, extra, false);
        assert!(!log.contains("warn") && !summary.contains("findings"), "{log}{summary}");
        let path_error = |block: usize| report["blocks"][block]["path_error"].as_f64().unwrap();
        assert!(path_error(0) > 0.0 && path_error(1) > path_error(0), "{}", report["blocks"]);
        assert!(summary.contains("path error   "), "{summary}");
    }
    let (report, ..) = quantized(&bench, &["--strict", "--solver", "gptq", "--importance", "none"], false);
    assert!(report["blocks"][0]["path_error"].is_null());
    quantized(&bench, &["--strict", "--solver", "rtn"], false);
}

#[test]
fn few_samples_through_the_program() {
    let bench = Bench::new(FLAT);
    bench.write_data(&[r#"{"text": "a red circle"}"#]);
    let (report, log, summary) = quantized(&bench, &[], false);
    let (layers, finding) = found(&report, "few-tokens");
    assert_eq!(layers.len(), report["layers"].as_array().unwrap().len());
    assert!(finding["found"].as_str().unwrap().contains("fewer than the 32 inputs"), "{finding}");
    // Once a width.
    assert_eq!(log.matches("warn: ").count(), 2, "{log}");
    assert!(
        log.contains("warn: model.layers.0.self_attn.q_proj: ") && log.contains("fewer than the 32 inputs"),
        "{log}"
    );
    assert!(log.contains("few tokens\n"), "{log}");
    assert!(summary.contains("\n  findings     14 of 14 layers: few tokens in 14\n"), "{summary}");
    let says = ["model.layers.0.self_attn.q_proj", "fewer than the 32 inputs", "--strict", "--samples"];
    bench.refused(&bench.quantize(&["--strict"]), &says);
    let (_, log, _) = quantized(&bench, &["--quiet"], false);
    assert_eq!(log, "");
}

#[test]
fn raised_damping_through_the_program() {
    let bench = Bench::new(FLAT);
    bench.write_data(&[r#"{"text": "a red circle"}"#]);
    for emulated in [false, true] {
        let extra = ["--damp", "1e-12", "--device", if emulated { "cuda" } else { "cpu" }];
        let (report, log, summary) = quantized(&bench, &extra, emulated);
        let (layers, finding) = found(&report, "damping-raised");
        let raised = finding["done"].as_str().unwrap();
        assert!(raised.starts_with("damping raised to ") && log.contains(raised), "{log}");
        assert!(finding["found"].as_str().unwrap().contains("damping 0.000000000001 (input "), "{finding}");
        assert!(summary.contains(&format!("damping raised in {}", layers.len())), "{summary}");
    }
    bench.refused(&bench.quantize(&["--damp", "1e-12", "--strict"]), &["q_proj", "--strict"]);
}

#[test]
fn dead_inputs_through_the_program() {
    let bench = Bench::new(FLAT);
    plenty(&bench);
    fill(&bench, "model.layers.1.input_layernorm.weight", 0.0);
    let (report, log, summary) = quantized(&bench, &[], false);
    let (layers, _) = found(&report, "dead-inputs");
    assert_eq!(layers, ["q", "k", "v"].map(|p| format!("model.layers.1.self_attn.{p}_proj")));
    assert!(log.contains("warn: model.layers.1.self_attn.q_proj: no calibration token excites any"), "{log}");
    assert!(log.contains("32 dead inputs"), "{log}");
    assert!(summary.contains("dead inputs in 3"), "{summary}");
    bench
        .refused(&bench.quantize(&["--strict"]), &["model.layers.1.self_attn.q_proj", "excites", "rounded to nearest"]);
}

/// A first block that adds nothing leaves both paths equal: nothing tells the second one's tokens apart.
#[test]
fn importance_without_a_gradient() {
    let bench = Bench::new(FLAT);
    plenty(&bench);
    fill(&bench, "model.layers.0.self_attn.o_proj.weight", 0.0);
    fill(&bench, "model.layers.0.mlp.down_proj.weight", 0.0);
    let (report, log, _) = quantized(&bench, &[], false);
    let (layers, finding) = found(&report, "importance-unusable");
    assert_eq!(layers, ["q", "k", "v", "o"].map(|p| format!("model.layers.1.self_attn.{p}_proj")));
    assert_eq!(finding["done"], "all tokens weighed alike");
    assert!(log.contains("warn: model.layers.1.self_attn.o_proj: the importance of all tokens is 0"), "{log}");
    assert_eq!(report["blocks"][0]["path_error"], 0.0);
    let q = report["layers"].as_array().unwrap().iter().find(|l| l["name"] == layers[0]).unwrap();
    assert!(q["importance"].is_null(), "{q}");
    bench.refused(&bench.quantize(&["--strict"]), &["model.layers.1.self_attn.q_proj", "--importance none"]);
    quantized(&bench, &["--strict", "--importance", "none"], false);
}
