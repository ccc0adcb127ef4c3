//! The whole method, images to packed file, against a float64 implementation in PyTorch (tests/golden/make_model.py).

use crate::support::golden;
use crate::support::golden::{Golden, relative_error};
use crate::support::program::lasting_files_of;
use vlmq::checkpoint::Checkpoint;
use vlmq::device::cpu::Cpu;
use vlmq::quantize::settings::{Grid, Importance, ImportancePower, Refit, Solver, SolverSettings};
use vlmq::report::RunReport;
use vlmq::run::{self, RunSettings};

/// A checkpoint, how the files of its goldens begin, and what its decoder holds.
struct Case {
    model: &'static str,
    files: &'static str,
    layers: usize,
    codes: usize,
}

const QWEN2: Case = Case { model: "rope-parameters-f32", files: "pipeline", layers: 21, codes: 86_016 };
/// Norms of queries and keys, more heads than the residual stream is wide, and DeepStack behind both blocks.
const QWEN3: Case = Case { model: "qwen3_vl-f32", files: "qwen3_vl-pipeline", layers: 14, codes: 69_632 };

fn settings(case: &Case, out: std::path::PathBuf, solver: Solver, importance: Importance) -> RunSettings {
    let (model, calib) = (golden("model").join(case.model), golden("model").join(format!("{}.jsonl", case.files)));
    RunSettings {
        solver: SolverSettings { solver, group_size: Some(32), grid: Grid::Minmax, ..SolverSettings::default() },
        importance,
        importance_power: ImportancePower::PAPER,
        ..RunSettings::new(model, Some(calib), out)
    }
}

#[test]
fn codes_of_every_layer_equal_the_float64_pipeline() {
    for (case, solver, importance, run) in [
        (QWEN2, Solver::Gptaq, Importance::Vlmq, "gptaq-vlmq"),
        (QWEN2, Solver::Gptaq, Importance::None, "gptaq-none"),
        (QWEN2, Solver::Gptq, Importance::Vlmq, "gptq-vlmq"),
        (QWEN2, Solver::Gptq, Importance::None, "gptq-none"),
        (QWEN3, Solver::Gptaq, Importance::Vlmq, "gptaq-vlmq"),
    ] {
        let errors = std::fs::read(golden("model").join(format!("{}.json", case.files))).unwrap();
        let expected_errors: serde_json::Value = serde_json::from_slice(&errors).unwrap();
        let golden = Golden::read(&format!("model/{}.{run}.safetensors", case.files));
        let name = format!("{} {run}", case.model);
        let work = tempfile::tempdir().unwrap();
        let out = work.path().join("out");
        let report = run::run(&Cpu, &settings(&case, out.clone(), solver, importance), &mut ()).unwrap();
        assert_eq!(report.layers.len(), case.layers);
        assert_eq!(report.calibration.used, 4);
        let written = Checkpoint::open(&out).unwrap();
        let (mut different, mut total) = (0, 0);
        for layer in &report.layers {
            let key = &layer.name[layer.name.find("layers.").unwrap()..];
            let linear = written.packed(&layer.name, layer.rows, layer.cols).unwrap();
            let expected = golden.values(&format!("{key}.codes"));
            different += linear.codes.iter().zip(&expected).filter(|&(&code, &e)| f64::from(code) != e).count();
            total += expected.len();
            let scales = relative_error(&linear.scales, &golden.values(&format!("{key}.scales")));
            assert!(scales < 1e-3, "{name} {key}: scales off by {scales:e}");
            let error = expected_errors["relative_error"][run][key].as_f64().unwrap();
            let relative = (layer.solve.relative_error - error).abs() / error;
            assert!(relative < 1e-2, "{name} {key}: error {} against {error}", layer.solve.relative_error);
        }
        assert_eq!(total, case.codes);
        assert!(different * 1000 <= total, "{name}: {different} of {total} codes differ");
    }
}

/// Their codes, of which the golden script makes sure, follow from the same scales.
#[test]
fn refitted_scales_of_every_layer_equal_the_float64_pipeline() {
    for (case, solver, run) in [(QWEN2, Solver::Gptaq, "gptaq-vlmq-refit"), (QWEN3, Solver::Gptq, "gptq-vlmq-refit")] {
        let golden = Golden::read(&format!("model/{}.{run}.safetensors", case.files));
        let work = tempfile::tempdir().unwrap();
        let out = work.path().join("out");
        let usual = settings(&case, out.clone(), solver, Importance::Vlmq);
        let report = run::run(&Cpu, &RunSettings { refit: Some(Refit::Residual), ..usual.clone() }, &mut ()).unwrap();
        let scales = |folder: &std::path::Path, name: &str, (rows, cols)| {
            Checkpoint::open(folder).unwrap().packed(name, rows, cols).unwrap().scales
        };
        for layer in &report.layers {
            let key = &layer.name[layer.name.find("layers.").unwrap()..];
            let found = scales(&out, &layer.name, (layer.rows, layer.cols));
            let off = relative_error(&found, &golden.values(&format!("{key}.scales")));
            assert!(off < 1e-5, "{run} {key}: scales off by {off:e}");
        }
        // Without it the first layer is the same, its output projection is not, and the paths are further apart.
        let plain = work.path().join("plain");
        let without = run::run(&Cpu, &RunSettings { out: plain.clone(), ..usual }, &mut ()).unwrap();
        for (layer, same) in [("q_proj", true), ("o_proj", false), ("down_proj", false)] {
            let layer = report.layers.iter().find(|found| found.name.ends_with(layer)).unwrap();
            let shape = (layer.rows, layer.cols);
            assert_eq!(scales(&out, &layer.name, shape) == scales(&plain, &layer.name, shape), same, "{}", layer.name);
        }
        let apart = |report: &RunReport| report.blocks.last().unwrap().path_error.unwrap();
        assert!(apart(&report) < apart(&without), "{} and {}", apart(&report), apart(&without));
    }
}

#[test]
fn scales_are_refitted_at_two_bits_unless_it_is_said_otherwise() {
    let run = |bits: u32, refit: Option<Refit>| {
        let work = tempfile::tempdir().unwrap();
        let usual = settings(&QWEN2, work.path().join("out"), Solver::Gptaq, Importance::Vlmq);
        let solver = SolverSettings { bits, ..usual.solver.clone() };
        let settings = RunSettings { solver, refit, ..usual };
        let report = run::run(&Cpu, &settings, &mut ()).unwrap();
        (report.provenance.settings.refit, std::fs::read(settings.out.join("model.safetensors")).unwrap())
    };
    for (bits, expected, other) in [(2, Refit::Residual, Refit::None), (3, Refit::None, Refit::Residual)] {
        let usual = run(bits, None);
        assert_eq!(usual.0, Some(expected));
        assert!(run(bits, Some(expected)) == usual && run(bits, Some(other)).1 != usual.1, "{bits} bits");
    }
}

#[test]
fn same_bytes_whatever_the_number_of_threads() {
    let run = |threads: usize| -> (Vec<(String, Vec<u8>)>, RunReport) {
        let work = tempfile::tempdir().unwrap();
        let out = work.path().join("out");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let settings = settings(&QWEN2, out.clone(), Solver::Gptaq, Importance::Vlmq);
        let settings = RunSettings { refit: Some(Refit::Residual), ..settings };
        let report = pool.install(|| run::run(&Cpu, &settings, &mut ())).unwrap();
        let files = lasting_files_of(&out);
        (files, report)
    };
    let (one, report) = run(1);
    assert!(one.iter().any(|(name, _)| name == "model.safetensors"));
    for threads in [2, 3, 5] {
        let (files, other) = run(threads);
        assert_eq!(files.len(), one.len());
        for (file, expected) in files.iter().zip(&one) {
            assert!(file == expected, "{} differs on {threads} threads", file.0);
        }
        let errors =
            |report: &RunReport| -> Vec<f64> { report.layers.iter().map(|l| l.solve.relative_error).collect() };
        assert_eq!(errors(&report), errors(&other));
    }
}
