//! Tensors that a run reads are looked for at its start, by the headers alone, in every command: names, shapes and types.

use crate::support::golden;
use crate::support::program::{Bench, edit_header, names_in, succeed};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use vlmq::checkpoint::Checkpoint;
use vlmq::device::cpu::Cpu;
use vlmq::quantize::settings::SolverSettings;
use vlmq::run::evaluation::EvaluationSettings;
use vlmq::run::inspect;
use vlmq::run::{self, RunSettings};

const FAMILIES: [&str; 4] =
    ["flat-tied-bf16", "qwen2_5_vl-nested-f16", "llava-resaved-f16-sharded", "qwen3_vl-f16-sharded"];

/// What may be wrong with a tensor.
const FAULTS: [&str; 3] = ["name", "shape", "type"];

fn spoil(fault: &str, name: &str, header: &mut serde_json::Map<String, Value>) {
    let Some(mut entry) = header.remove(name) else { return };
    match fault {
        "name" => {
            header.insert(format!("gone.{name}"), entry);
            return;
        }
        "shape" => {
            let shape = entry["shape"].as_array_mut().unwrap();
            shape.reverse();
            shape.insert(0, json!(1));
        }
        // Another one of as many bytes.
        _ => {
            entry["dtype"] = match entry["dtype"].as_str().unwrap() {
                "F32" => json!("I32"),
                "I32" => json!("F32"),
                "I64" => json!("F64"),
                _ => json!("I16"),
            }
        }
    }
    header.insert(name.to_owned(), entry);
}

/// Spoils a tensor of every file that has it, in the index too.
fn spoil_in(model: &Path, fault: &str, name: &str) {
    for file in names_in(model) {
        let path = model.join(&file);
        if file.ends_with(".safetensors") {
            edit_header(&path, |header| spoil(fault, name, header));
        } else if file.ends_with(".index.json") && fault == "name" {
            let text = fs::read_to_string(&path).unwrap();
            fs::write(&path, text.replace(&format!("\"{name}\""), &format!("\"gone.{name}\""))).unwrap();
        }
    }
}

/// What is said where something is.
fn said<T>(result: anyhow::Result<T>) -> Option<String> {
    result.err().map(|error| format!("{error:#}"))
}

/// Each tensor of each family, absent, of another shape, of another type: the error names it before a weight is read.
#[test]
#[ignore = "slow: many runs"]
fn every_tensor_that_a_run_reads_is_looked_for_at_its_start() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::open(&golden("model").join(family)).unwrap();
        // transformers writes a last norm of this tower that nobody applies.
        let read = |name: &&str| !name.contains(".post_layernorm.");
        let names: Vec<&str> = checkpoint.names().filter(read).collect();
        assert!(names.len() > 40, "{family}");
        let cases: Vec<(&str, &str)> = names.iter().flat_map(|&name| FAULTS.map(|fault| (name, fault))).collect();
        cases.into_par_iter().for_each(|(name, fault)| {
            let bench = Bench::new(family);
            spoil_in(&bench.model(), fault, name);
            let (model, data, out) = (bench.model(), bench.data(), bench.outputs().join("out"));
            let solver = SolverSettings { group_size: Some(16), ..SolverSettings::default() };
            let settings = RunSettings { solver, ..RunSettings::new(model.clone(), Some(data.clone()), out) };
            let evaluation = EvaluationSettings::new(model.clone(), data);
            let errors = [
                ("inspect", said(inspect::inspect(&Cpu, &model))),
                ("quantize", said(run::plan(&Cpu, &settings))),
                ("evaluate", said(run::evaluation::plan_comparison(&Cpu, &evaluation, 3))),
            ];
            for (command, error) in errors {
                // A model without a head can be quantized, and its float self be looked at.
                if fault == "name" && name.ends_with("lm_head.weight") && command != "evaluate" {
                    assert_eq!(error, None, "{family} {command}: {name}");
                    continue;
                }
                let error =
                    error.unwrap_or_else(|| panic!("{family} {command}: nothing is said of the {fault} of {name}"));
                assert!(error.contains(name), "{family} {command}: {fault} of {name}: {error}");
            }
        });
    }
}

/// The same of layers that are packed, for `eval` and `inspect`, which read quantized checkpoints.
#[test]
fn packed_layers_are_looked_for_too() {
    for format in ["compressed-tensors", "gptq"] {
        let bench = Bench::new("flat-tied-bf16");
        succeed(&bench.quantize(&["--solver", "rtn", "--format", format, "--order", "none"]));
        let out = bench.outputs().join("out");
        let checkpoint = Checkpoint::open(&out).unwrap();
        let last = "model.layers.1.mlp.down_proj.";
        let names: Vec<&str> = checkpoint.names().filter(|name| name.starts_with(last)).collect();
        assert!(names.len() >= 3, "{names:?}");
        for (name, fault) in names.iter().flat_map(|&name| FAULTS.map(|fault| (name, fault))) {
            let broken = tempfile::tempdir().unwrap();
            crate::support::program::copy_folder(&out, broken.path());
            spoil_in(broken.path(), fault, name);
            let evaluation = EvaluationSettings::new(broken.path().to_path_buf(), bench.data());
            for error in [
                said(inspect::inspect(&Cpu, broken.path())),
                said(run::evaluation::plan_comparison(&Cpu, &evaluation, 3)),
            ] {
                let error = error.unwrap_or_else(|| panic!("{format}: nothing is said of the {fault} of {name}"));
                assert!(error.contains(name), "{format}: {fault} of {name}: {error}");
            }
        }
    }
}

/// What is wrong with the last block's weights ends a run at its start, and nothing is left of it; mended, the same command runs.
#[test]
fn a_mended_input_runs() {
    let bench = Bench::new("flat-tied-bf16");
    let (file, name) = (bench.file("model.safetensors"), "model.layers.1.mlp.down_proj.weight");
    let sound = fs::read(&file).unwrap();
    for fault in ["name", "numbers"] {
        match fault {
            "name" => spoil_in(&bench.model(), "name", name),
            _ => crate::support::program::edit_tensor(&file, name, |bytes| bytes.fill(0xff)),
        }
        let output = crate::support::program::vlmq_run(&bench.quantize(&[]));
        let error = crate::support::program::stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(name) && !error.contains("blocks are done"), "{fault}: {error}");
        assert_eq!(names_in(&bench.outputs()), [""; 0], "{fault}");
        fs::write(&file, &sound).unwrap();
    }
    succeed(&bench.quantize(&[]));
}
