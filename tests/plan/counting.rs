//! Whole runs on a device that counts, against the plans that were made before their start.

use crate::support::{data, golden};
use std::fs;
use std::path::Path;
use vlmq::device::counting::Counting;
use vlmq::device::cpu::Cpu;
use vlmq::plan::{ByKind, StagePlan};
use vlmq::progress::Stage;
use vlmq::quantize::block::Activations;
use vlmq::quantize::settings::{Importance, Solver, SolverSettings};
use vlmq::run::{self, RunSettings};
use vlmq::tensor::Float;

/// A few samples in several chunks.
fn settings(out: &Path, model: &Path, calib: &Path, solver: SolverSettings, importance: Importance) -> RunSettings {
    RunSettings {
        solver,
        importance,
        samples: 5,
        chunk_tokens: 64,
        ..RunSettings::new(model.to_owned(), Some(calib.to_owned()), out.to_owned())
    }
}

/// Solvers, importance and width of codes; scales of two bits are refitted.
const METHODS: [(Solver, Importance, u32); 4] = [
    (Solver::Gptaq, Importance::Vlmq, 3),
    (Solver::Gptq, Importance::None, 3),
    (Solver::Gptq, Importance::Vlmq, 2),
    (Solver::Gptaq, Importance::None, 2),
];

/// What the plan has of the next block's weights, which in a run may come before a stage's worst moment or behind it.
fn ahead(stage: &StagePlan) -> u64 {
    stage.entries.iter().filter(|entry| entry.name == "weights of the next block").map(|entry| entry.bytes).sum()
}

/// What a stage held at most was planned: not more, and not less by more than a tenth.
fn check(what: &str, stages: &[StagePlan]) {
    for stage in stages {
        let measured = stage.measured_bytes.unwrap();
        println!("{what}, {}, {}: {:.3}", stage.stage, stage.step, measured as f64 / stage.bytes as f64);
        let with_all = measured + ahead(stage);
        assert!(measured <= stage.bytes && 10 * with_all >= 9 * stage.bytes, "{what}: {measured} of {stage:?}");
    }
}

#[test]
fn runs_that_only_count_hold_what_was_planned() {
    let work = tempfile::tempdir().unwrap();
    let (model, calib) = (data("tiny-qwen2-vl-narrow"), data("vqa/calib.jsonl"));
    for (i, (solver, importance, bits)) in METHODS.into_iter().enumerate() {
        let solver = SolverSettings { solver, bits, ..SolverSettings::default() };
        let out = work.path().join(format!("{i}"));
        let settings = settings(&out, &model, &calib, solver, importance);
        let device = Counting::plain(Float::Bf16).running();
        let report = run::run(&device, &settings, &mut ()).unwrap();
        let plan = &report.memory_plan;
        check(&format!("{:?} {importance:?} {bits}", settings.solver.solver), &plan.stages);
        assert_eq!((plan.activations, device.parked_bytes()), (Activations::Resident, 0));
        assert_eq!(device.alive(), 0);
    }
}

#[test]
fn every_familys_tower_is_counted() {
    let work = tempfile::tempdir().unwrap();
    for name in ["flat-tied-bf16", "qwen2_5_vl-flat-bf16", "llava-hub-tied-f16", "qwen3_vl-tied-bf16"] {
        let (model, calib) = (golden("model").join(name), golden("model").join(format!("{name}.jsonl")));
        let solver = SolverSettings { solver: Solver::Gptq, group_size: Some(32), ..SolverSettings::default() };
        let settings = settings(&work.path().join(name), &model, &calib, solver, Importance::None);
        let device = Counting::plain(Float::Bf16).running();
        let report = run::run(&device, &settings, &mut ()).unwrap();
        let plan = &report.memory_plan;
        assert_eq!(plan.stages[0].stage, Stage::Vision);
        check(name, &plan.stages[..1]);
        // Of so narrow blocks the tables that a plan leaves room for are much.
        assert!(report.peak_device_bytes.unwrap() <= plan.device_bytes, "{name}");
    }
}

/// The plan that goes through a run finds what the run itself holds, but for the last blocks' exact course: with activations on the
/// device, and in host memory.
#[test]
fn what_is_counted_beforehand_is_what_a_run_counts() {
    let work = tempfile::tempdir().unwrap();
    let (model, calib) = (data("tiny-qwen2-vl-narrow"), work.path().join("calib.jsonl"));
    // So few that none is held out: by hand the tokens of those count as if they went into statistics.
    let lines = fs::read_to_string(data("vqa/calib.jsonl")).unwrap();
    fs::write(&calib, lines.lines().take(5).collect::<Vec<_>>().join("\n")).unwrap();
    for (i, (solver, importance, bits)) in METHODS.into_iter().enumerate() {
        let solver = SolverSettings { solver, bits, ..SolverSettings::default() };
        let settings = settings(&work.path().join(format!("{i}")), &model, &calib, solver, importance);
        let settings = RunSettings { image_root: Some(data("vqa")), ..settings };
        let fresh = || Counting::plain(Float::Bf16);
        let counted = run::count(&fresh(), &settings, Activations::Resident).unwrap();
        let streamed = run::count(&fresh(), &settings, Activations::Streamed).unwrap();
        assert!(streamed.parked_bytes > 0 && streamed.stages()[1].bytes < counted.stages()[1].bytes, "{streamed:?}");
        let device = fresh().running();
        let report = run::run(&device, &settings, &mut ()).unwrap();
        let plan = &report.memory_plan;
        for (counted, planned) in counted.stages().iter().zip(&plan.stages) {
            let measured = planned.measured_bytes.unwrap();
            println!("{i}, {}: {} of {measured} at {}, {planned:?}", counted.stage, counted.bytes, counted.step);
            assert_eq!(counted.bytes, planned.bytes);
            assert!(
                (counted.bytes - ahead(planned)..=counted.bytes).contains(&measured),
                "{measured}, {counted:?} of {planned:?}"
            );
            assert_eq!(counted.step, planned.step);
        }
        // All work but what a run does of its own accord: it looks at its weights and at what comes back.
        let (done, planned) = (device.work(), counted.vision + counted.blocks);
        let exact = |work: ByKind| [work.products, work.attention, work.statistics, work.factors, work.codes];
        for (done, planned) in exact(done).into_iter().zip(exact(planned)) {
            assert!((done / planned.max(1.0) - 1.0).abs() < 1e-9 || done == planned, "{i}: {done} of {planned}");
        }
        assert!((1.0..1.1).contains(&(done.values / planned.values)), "{i}: {} of {}", done.values, planned.values);
    }
}

/// Layers are written behind a device that works beside the host: what goes wrong there ends the run as it does in line, at the first
/// layer in their order.
#[test]
fn what_goes_wrong_behind_the_device_ends_the_run() {
    let work = tempfile::tempdir().unwrap();
    let (model, calib) = (data("tiny-qwen2-vl-narrow"), data("vqa/calib.jsonl"));
    let mut said = Vec::new();
    for device in [Counting::plain(Float::Bf16), Counting::of(&Cpu)] {
        let settings = settings(&work.path().join("out"), &model, &calib, SolverSettings::default(), Importance::Vlmq);
        // So few tokens are a finding of every layer.
        let settings = RunSettings { strict: true, samples: 1, ..settings };
        let error = run::run(&device.running(), &settings, &mut ()).unwrap_err();
        said.push(format!("{error:#}"));
        assert_eq!(fs::read_dir(work.path()).unwrap().count(), 0);
    }
    assert!(said[0].contains("layers.0.self_attn.q_proj: ") && said[0].contains("--strict"), "{said:?}");
    assert_eq!(said[0], said[1]);
}

/// In the CPU's place: its memory is the host's, of which the plan counts the device's part alike.
#[test]
fn the_cpus_part_is_counted() {
    let work = tempfile::tempdir().unwrap();
    let (model, calib) = (data("tiny-qwen2-vl-narrow"), data("vqa/calib.jsonl"));
    for (i, (solver, importance, bits)) in METHODS.into_iter().enumerate() {
        let solver = SolverSettings { solver, bits, ..SolverSettings::default() };
        let settings = settings(&work.path().join(format!("{i}")), &model, &calib, solver, importance);
        let device = Counting::of(&Cpu).running();
        let report = run::run(&device, &settings, &mut ()).unwrap();
        // The last stage's: books are opened anew before it.
        let (peak, stage) = (device.peak(), &report.memory_plan.stages[1]);
        println!("{i}: {} of {}, at {}: {peak:?}", peak.bytes, stage.bytes, stage.step);
        assert!((0.9..=1.1).contains(&(peak.bytes as f64 / stage.bytes as f64)), "{peak:?} of {stage:?}");
    }
}
