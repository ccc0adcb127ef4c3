//! Both small checkpoints of tests/data: every method at every width, over a few calibration draws.
//!
//! Mean over the draws ± half the distance between the best and the worst. Round-to-nearest looks at no data, so it has no spread.
//! All evaluation questions are asked; divergence is from the float checkpoint.

use anyhow::Result;
use std::path::{Path, PathBuf};
use vlmq::checkpoint::formats::Format;
use vlmq::device::cpu::Cpu;
use vlmq::evaluate::{self, Evaluation, EvaluationSettings};
use vlmq::model::families::ImageOptions;
use vlmq::quantize::pipeline::{self, CHUNK_TOKENS, PipelineSettings};
use vlmq::quantize::settings::{CrossTerm, Grid, Importance, ImportancePower, Order, Solver, SolverSettings};
use vlmq::tensor::Matrix;

pub(crate) const CHECKPOINTS: [&str; 2] = ["tiny-qwen2-vl", "tiny-qwen2-vl-narrow"];
const SEEDS: [u64; 3] = [0, 1, 2];
/// Half of the calibration set, so that draws differ.
const SAMPLES: usize = 128;

type Change = fn(&mut SolverSettings);

pub(crate) fn methods(checkpoints: &[&str]) -> Result<()> {
    let methods: [(&str, Solver, Importance); 5] = [
        ("round to nearest", Solver::Rtn, Importance::None),
        ("GPTQ", Solver::Gptq, Importance::None),
        ("GPTAQ", Solver::Gptaq, Importance::None),
        ("VLMQ on GPTQ", Solver::Gptq, Importance::Vlmq),
        ("VLMQ on GPTAQ", Solver::Gptaq, Importance::Vlmq),
    ];
    header();
    for &checkpoint in checkpoints {
        let reference = evaluate::answer_logits(&Cpu, &evaluation(data(checkpoint)))?;
        let float = evaluate::run(&Cpu, &evaluation(data(checkpoint)), &mut ())?;
        row(checkpoint, "float", "", &[float]);
        for bits in [4, 3, 2] {
            for (name, solver, importance) in methods {
                let settings = SolverSettings { solver, bits, ..SolverSettings::default() };
                row(checkpoint, &format!("W{bits} g128"), name, &runs(checkpoint, &reference, &settings, importance)?);
            }
        }
    }
    Ok(())
}

pub(crate) fn choices() -> Result<()> {
    let choices: [(&str, Change); 9] = [
        ("default", |_| ()),
        ("cross term with rounded weights", |s| s.cross_term = CrossTerm::Quantized),
        ("alpha 0.5", |s| s.alpha = 0.5),
        ("alpha 1", |s| s.alpha = 1.0),
        ("grid mse", |s| s.grid = Grid::Mse),
        ("order none", |s| s.order = Order::None),
        ("order act", |s| s.order = Order::Act),
        ("damp 0.05", |s| s.damp = 0.05),
        ("symmetric", |s| s.symmetric = true),
    ];
    header();
    // The checkpoint that low bits hurt.
    let checkpoint = CHECKPOINTS[1];
    let reference = evaluate::answer_logits(&Cpu, &evaluation(data(checkpoint)))?;
    for bits in [3, 2] {
        for (name, change) in choices {
            let mut settings = SolverSettings { bits, ..SolverSettings::default() };
            change(&mut settings);
            row(
                checkpoint,
                &format!("W{bits} g128"),
                name,
                &runs(checkpoint, &reference, &settings, Importance::Vlmq)?,
            );
        }
    }
    Ok(())
}

/// Quantizes and evaluates once for every seed.
fn runs(
    checkpoint: &str,
    reference: &[Matrix],
    solver: &SolverSettings,
    importance: Importance,
) -> Result<Vec<Evaluation>> {
    let seeds = if solver.solver == Solver::Rtn { &SEEDS[..1] } else { &SEEDS };
    let work = tempfile::tempdir()?;
    seeds
        .iter()
        .map(|&seed| {
            let out = work.path().join(format!("seed-{seed}"));
            let settings = PipelineSettings {
                model: data(checkpoint),
                calib: Some(data("vqa/calib.jsonl")),
                image_root: None,
                out: out.clone(),
                format: Format::CompressedTensors,
                solver: solver.clone(),
                importance,
                importance_power: ImportancePower::default(),
                samples: SAMPLES,
                seed,
                max_tokens: 2048,
                chunk_tokens: CHUNK_TOKENS,
                image_options: ImageOptions::default(),
                chat_template: Default::default(),
                strict: false,
                restart: false,
                save_every: 0,
            };
            pipeline::run(&Cpu, &settings, &mut ())?;
            evaluate::run_against(&Cpu, &evaluation(out), reference, &mut ())
        })
        .collect()
}

fn evaluation(model: PathBuf) -> EvaluationSettings {
    EvaluationSettings::new(model, data("vqa/eval.jsonl"))
}

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn header() {
    println!("| checkpoint | weights | method | accuracy | log-likelihood | KL from float |");
    println!("|---|---|---|---|---|---|");
}

fn row(checkpoint: &str, weights: &str, method: &str, runs: &[Evaluation]) {
    let cell = |value: &dyn Fn(&Evaluation) -> Option<f64>, digits: usize| {
        let values: Option<Vec<f64>> = runs.iter().map(value).collect();
        let Some(values) = values else { return "–".to_owned() };
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(a, b), &v| (a.min(v), b.max(v)));
        match values.len() {
            1 => format!("{mean:.digits$}"),
            _ => format!("{mean:.digits$} ± {:.digits$}", (most - least) / 2.0),
        }
    };
    println!(
        "| {checkpoint} | {weights} | {method} | {} | {} | {} |",
        cell(&|run| Some(100.0 * run.score), 2),
        cell(&|run| run.nll.map(|nll| -nll), 4),
        cell(&|run| run.kl, 5),
    );
}
