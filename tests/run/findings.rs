//! Numbers that go wrong in whole blocks and whole runs: named with their layer in log, report and summary; `--strict` stops.

use crate::support::golden::Golden;
use crate::support::program::{Bench, IMAGE, edit_tensor, emulated_run, question, read_json, stderr, vlmq_run};
use crate::support::{golden, message};
use serde_json::Value;
use std::fs;
use vlmq::checkpoint::Checkpoint;
use vlmq::device::cpu::Cpu;
use vlmq::model::decoder::{Block, Projection};
use vlmq::model::families::{self, ModelConfig};
use vlmq::model::source::Weights;
use vlmq::progress::Stop;
use vlmq::quantize::block::Activations;
use vlmq::quantize::block::{BlockOutcome, BlockQuantizer, Chunk, SolvedLayer};
use vlmq::quantize::settings::{Importance, ImportancePower, Refit, SolverSettings};
use vlmq::quantize::{Finding, FindingKind};
use vlmq::tensor::Matrix;

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
    let lines: Vec<String> = (0..12).map(line).chain([question(IMAGE)]).collect();
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
    // No sample is left to hold out: the float path runs for the calibration samples that are looked at in the end.
    let (report, ..) = quantized(&bench, &["--strict", "--solver", "gptq", "--importance", "none"], false);
    assert!(report["blocks"][1]["path_error"].as_f64().unwrap() > 0.0);
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

/// Weights that starve the quantized path: next to one that is huge on an input that is next to nothing, the grid has no
/// place for the others of `up_proj`, and what reaches `down_proj` is a shadow of the float path's.
#[test]
fn an_error_that_explodes_through_the_program() {
    let bench = Bench::new(FLAT);
    plenty(&bench);
    let first_of_32 = |tensor: &str, value: f32| {
        let bits = ((value.to_bits() >> 16) as u16).to_le_bytes();
        edit_tensor(&bench.file(WEIGHTS), tensor, |bytes| {
            bytes.chunks_mut(64).for_each(|row| row[..2].copy_from_slice(&bits));
        });
    };
    first_of_32("model.layers.1.post_attention_layernorm.weight", 1e-7);
    first_of_32("model.layers.1.mlp.up_proj.weight", 1e4);
    // The grid of least loss would give the huge weight up.
    let flags = ["--bits", "8", "--grid", "minmax"];
    let (report, log, _) = quantized(&bench, &flags, false);
    let (layers, _) = found(&report, "error-exploded");
    assert_eq!(layers, ["up", "down"].map(|p| format!("model.layers.1.mlp.{p}_proj")));
    assert!(log.contains("warn: model.layers.1.mlp.down_proj: relative error "), "{log}");
    assert!(log.contains("solved without the cross term, as GPTQ does"), "{log}");
    assert!(log.contains("kept as solved"), "{log}");
    bench.refused(
        &bench.quantize(&[&flags[..], &["--strict"]].concat()),
        &["model.layers.1.mlp.up_proj", "relative error"],
    );
}

/// A block's inputs on both paths, one chunk of some samples.
fn golden_chunk() -> Chunk<Matrix> {
    let golden = Golden::read(&format!("model/{FLAT}.importance.safetensors"));
    let layout = golden.layout(&config().decoder);
    let tokens = layout.spans.last().map_or(0, |span| span.q.end);
    let samples = (0..layout.spans.len()).map(|i| format!("sample-{i}")).collect();
    Chunk {
        layout,
        x_quantized: golden.matrix("structured.x_quantized"),
        x_float: Some(golden.matrix("x_float")),
        held_out: false,
        is_vision: vec![false; tokens],
        samples,
    }
}

fn checkpoint() -> Checkpoint {
    Checkpoint::open(&golden("model").join(FLAT)).unwrap()
}

fn config() -> ModelConfig {
    families::of::<Cpu>(&checkpoint()).unwrap().config(&checkpoint()).unwrap()
}

/// Quantizes block 1 from these inputs.
fn block(index: usize, chunk: Chunk<Matrix>) -> anyhow::Result<(BlockOutcome, Vec<SolvedLayer>)> {
    let config = config();
    let load = || Block::load(&Weights::new(&Cpu, &checkpoint()), &config.decoder, &config.names, 1).unwrap();
    let mut quantizer = BlockQuantizer {
        device: &Cpu,
        config: &config.decoder,
        settings: &SolverSettings { group_size: Some(32), ..SolverSettings::default() },
        importance: Importance::Vlmq,
        importance_power: ImportancePower::default(),
        refit: Refit::None,
        activations: Activations::Resident,
        stop: &Stop::default(),
        index,
        float: load(),
        quantized: load(),
    };
    let mut layers = Vec::new();
    let outcome = quantizer.run(&mut [chunk], &mut |_| {}, &mut |layer| {
        layers.push(layer);
        Ok(())
    })?;
    Ok((outcome, layers))
}

fn unusable(layer: &SolvedLayer) -> Option<&Finding> {
    layer.report.findings.iter().find(|finding| finding.kind == FindingKind::ImportanceUnusable)
}

/// The distance of the paths is so large in one token that the loss has no gradient in float32.
#[test]
fn importance_that_overflows() {
    let (_, usual) = block(1, golden_chunk()).unwrap();
    assert!(usual.iter().all(|layer| unusable(layer).is_none()));
    assert_eq!(usual.iter().filter(|layer| layer.importance.is_some()).count(), 4);

    let mut chunk = golden_chunk();
    let last = chunk.layout.spans.len() - 1;
    let token = chunk.layout.spans[last].q.end - 1;
    chunk.x_float.as_mut().unwrap().row_mut(token).fill(2e38);
    let (outcome, layers) = block(1, chunk).unwrap();
    assert_eq!(outcome.path_error, None);
    for layer in &layers {
        let found = unusable(layer);
        assert_eq!(found.is_some(), (layer.projection as usize) < 4, "{:?}", layer.projection);
        assert!(layer.importance.is_none());
        if layer.projection == Projection::O {
            let says = format!("the importance of 1 tokens is not finite (first in sample sample-{last})");
            assert_eq!(found.unwrap().found, says);
        }
    }
}

#[test]
fn inputs_that_are_not_finite_name_their_sample() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut chunk = golden_chunk();
        let token = chunk.layout.spans[1].q.start;
        chunk.x_quantized.row_mut(token)[3] = bad;
        let error = message(block(0, chunk).map(drop));
        for part in ["self_attn.q_proj of block 0", "NaN or an infinity", "sample sample-1", "leave the sample out"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
