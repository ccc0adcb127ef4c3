//! Both small checkpoints of tests/data: every method at every width, over a few calibration draws.
//!
//! Mean over the draws ± half the distance between the best and the worst. Round-to-nearest looks at no data, so it has no spread.
//! All evaluation questions are asked; divergence is from the float checkpoint.

use super::rows::{self, Draw, Row};
use anyhow::Result;
use std::path::{Path, PathBuf};
use vlmq::device::cpu::Cpu;
use vlmq::evaluate::Evaluation;
use vlmq::quantize::settings::{CrossTerm, Grid, Order, Solver, SolverSettings};
use vlmq::run;
use vlmq::run::evaluation::{self, EvaluationSettings};
use vlmq::tensor::Matrix;

pub(crate) const CHECKPOINTS: [&str; 2] = ["tiny-qwen2-vl", "tiny-qwen2-vl-narrow"];
const SEEDS: [u64; 3] = [0, 1, 2];
/// Half of the calibration set, so that draws differ.
const SAMPLES: usize = 128;

type Change = fn(&mut SolverSettings);

pub(crate) fn methods(checkpoints: &[&str]) -> Result<()> {
    let methods = rows::rows(&[], &[], &[])?;
    header();
    for &checkpoint in checkpoints {
        let reference = evaluation::answer_logits(&Cpu, &evaluation(data(checkpoint)))?;
        let float = evaluation::evaluate(&Cpu, &evaluation(data(checkpoint)), &mut ())?;
        row(checkpoint, "float", "", &[float]);
        for bits in [4, 3, 2] {
            for method in &methods {
                let solver = SolverSettings { bits, ..method.solver.clone() };
                let found = runs(checkpoint, &reference, &Row { solver, ..method.clone() })?;
                row(checkpoint, &format!("W{bits} g128"), &method.name, &found);
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
    let default = rows::default()?;
    let reference = evaluation::answer_logits(&Cpu, &evaluation(data(checkpoint)))?;
    for bits in [3, 2] {
        for (name, change) in choices {
            let mut changed = default.clone();
            changed.solver.bits = bits;
            change(&mut changed.solver);
            row(checkpoint, &format!("W{bits} g128"), name, &runs(checkpoint, &reference, &changed)?);
        }
    }
    Ok(())
}

/// Quantizes and evaluates once for every seed.
fn runs(checkpoint: &str, reference: &[Matrix], row: &Row) -> Result<Vec<Evaluation>> {
    let seeds = if row.solver.solver == Solver::Rtn { &SEEDS[..1] } else { &SEEDS };
    let work = tempfile::tempdir()?;
    seeds
        .iter()
        .map(|&seed| {
            let out = work.path().join(format!("seed-{seed}"));
            let settings =
                row.run(data(checkpoint), data("vqa/calib.jsonl"), out.clone(), Draw { samples: SAMPLES, seed });
            run::run(&Cpu, &settings, &mut ())?;
            evaluation::run_against(&Cpu, &evaluation(out), reference, &mut ())
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
