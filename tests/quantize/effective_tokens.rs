//! How many tokens of equal weight the statistics of a layer rest on, and what importance to a power makes of it.

use crate::support::noise;
use crate::support::program::{Bench, read_json, stderr, vlmq_run};
use serde_json::Value;
use std::fs;
use vlmq::device::{Device, cpu::Cpu};
use vlmq::quantize::statistics::Statistics;
use vlmq::tensor::Matrix;

/// Of tokens `u` with factors `g`, added in parts of so many.
fn effective(u: &Matrix, g: &[f32], part: usize) -> f64 {
    let mut statistics = Statistics::new(&Cpu, u.cols(), false).unwrap();
    for first in (0..u.rows()).step_by(part) {
        let rows = first..(first + part).min(u.rows());
        let values = u.data()[rows.start * u.cols()..rows.end * u.cols()].to_vec();
        let some = Matrix::new(rows.len(), u.cols(), values).unwrap();
        statistics.accumulate(&Cpu, &some, None, Some(&g[rows])).unwrap();
    }
    statistics.effective_tokens().unwrap()
}

/// The same in float64, from the definition.
fn exact(u: &Matrix, g: &[f32]) -> f64 {
    let token = |n: usize| u.row(n).iter().map(move |&u| (f64::from(g[n]) * f64::from(u)).powi(2));
    let mut moments = vec![0.0; u.cols()];
    (0..u.rows()).for_each(|n| moments.iter_mut().zip(token(n)).for_each(|(sum, square)| *sum += square));
    let share = |n: usize| token(n).zip(&moments).filter(|(_, h)| **h > 0.0).map(|(square, h)| square / h).sum::<f64>();
    let shares: Vec<f64> = (0..u.rows()).map(share).collect();
    shares.iter().sum::<f64>().powi(2) / shares.iter().map(|share| share * share).sum::<f64>()
}

/// Factors of which one in fifty is ten times the others.
fn uneven(tokens: usize) -> Vec<f32> {
    (0..tokens).map(|n| if n % 50 == 7 { 10.0 } else { 1.0 }).collect()
}

#[test]
fn tokens_count_by_their_shares() {
    let u = noise(500, 70, 1);
    let alike = effective(&u, &[1.0; 500], 500);
    assert!((480.0..500.0).contains(&alike), "{alike}");
    // Ten tokens of a hundred times the weight: (10·100 + 490)² / (10·100² + 490).
    let heavy = effective(&u, &uneven(500), 500);
    assert!((heavy / 22.1 - 1.0).abs() < 0.05, "{heavy}");
    for g in [vec![1.0; 500], uneven(500)] {
        let (found, exact) = (effective(&u, &g, 500), exact(&u, &g));
        assert!((found / exact - 1.0).abs() < 1e-5, "{found} for {exact}");
    }
    // Neither a common factor nor an input's unit matters; dead inputs count for nothing.
    let mut scaled = u.clone();
    (0..500)
        .for_each(|n| scaled.row_mut(n).iter_mut().enumerate().for_each(|(c, u)| *u *= 10f32.powi(c as i32 % 9 - 4)));
    let g: Vec<f32> = uneven(500).iter().map(|g| g * 1e-3).collect();
    assert!((effective(&scaled, &g, 500) / heavy - 1.0).abs() < 1e-5);
    (0..500).for_each(|n| scaled.row_mut(n)[3] = 0.0);
    assert!((effective(&scaled, &g, 500) / heavy - 1.0).abs() < 0.05);
    // Tokens that do not count may hold anything.
    let mut g = vec![1.0; 500];
    g[9] = 0.0;
    let before = effective(&u, &g, 500);
    let mut broken = u;
    broken.row_mut(9).fill(f32::NAN);
    assert_eq!(effective(&broken, &g, 500), before);
}

/// One token of a thousand times the others in two inputs: those rest on it, the other inputs on all.
#[test]
fn a_massive_token_is_not_all_there_is() {
    let mut u = noise(500, 70, 2);
    (u.row_mut(0)[5], u.row_mut(0)[6]) = (1e3, -1e3);
    let found = effective(&u, &[1.0; 500], 500);
    assert!((250.0..450.0).contains(&found), "{found}");
}

#[test]
fn parts_come_to_nearly_the_same() {
    let u = noise(4000, 64, 3);
    for g in [vec![1.0; 4000], uneven(4000)] {
        let whole = effective(&u, &g, 4000);
        for part in [400, 1000, 1500] {
            let found = effective(&u, &g, part);
            assert!((found / whole - 1.0).abs() < 0.05, "parts of {part}: {found} for {whole}");
        }
    }
    // The second part is a hundred times the first, which then counts for nothing.
    let mut u = u;
    (2000..4000).for_each(|n| u.row_mut(n).iter_mut().for_each(|u| *u *= 100.0));
    let found = effective(&u, &[1.0; 4000], 2000);
    assert!((found / exact(&u, &[1.0; 4000]) - 1.0).abs() < 0.01, "{found}");
}

#[test]
fn nothing_is_said_of_what_is_unknown() {
    let mut statistics = Statistics::new(&Cpu, 8, false).unwrap();
    assert_eq!(statistics.effective_tokens(), None);
    statistics.accumulate(&Cpu, &Matrix::zeros(5, 8), None, None).unwrap();
    assert_eq!(statistics.effective_tokens(), None);
    let mut huge = noise(5, 8, 4);
    huge.row_mut(2)[2] = 1e30;
    statistics.accumulate(&Cpu, &huge, None, None).unwrap();
    assert_eq!(statistics.effective_tokens(), None);
    assert!(Cpu.scaled_squares_rows(&huge, &[1.0; 7]).is_err());
}

/// The report of a run over plenty of text, and its model card.
fn run(bench: &Bench, extra: &[&str]) -> (Value, String) {
    let output = vlmq_run(&bench.quantize(extra));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let out = bench.outputs().join("out");
    let found = (read_json(out.join("report.json")), fs::read_to_string(out.join("README.md")).unwrap());
    let config = read_json(out.join("config.json"));
    assert_eq!(config["vlmq"]["settings"]["importance_power"], found.0["settings"]["importance_power"]);
    fs::remove_dir_all(out).unwrap();
    found
}

#[test]
fn powers_through_the_program() {
    let bench = Bench::new("flat-tied-bf16");
    let line = |i: usize| {
        let words: Vec<&str> =
            (0..40).map(|j| ["red", "star", "blue", "of", "seven"][(i * i + 7 * j + i * j * j) % 5]).collect();
        serde_json::json!({"text": words.join(" ")}).to_string()
    };
    let lines: Vec<String> = (0..12).map(line).collect();
    bench.write_data(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    let q = |report: &Value| {
        let layers = report["layers"].as_array().unwrap();
        layers.iter().find(|layer| layer["name"] == "model.layers.1.self_attn.q_proj").unwrap().clone()
    };
    let of = |layer: &Value, what: &str| layer["importance"][what].as_f64().unwrap();
    let (usual, card) = run(&bench, &["--importance-power", "1"]);
    assert_eq!(usual["settings"]["importance_power"], 1.0);
    assert_eq!(of(&q(&usual), "power"), 1.0);
    assert!(card.contains("VLMQ (arXiv 2508.03351) on GPTAQ"), "{card}");
    let (half, card) = run(&bench, &[]);
    assert_eq!(of(&q(&half), "power"), 0.5);
    assert!(of(&q(&half), "largest") < of(&q(&usual), "largest"));
    let tokens = |layer: &Value| layer["effective_tokens"].as_f64().unwrap();
    assert!(tokens(&q(&half)) > tokens(&q(&usual)) && tokens(&q(&half)) < q(&half)["tokens"].as_f64().unwrap());
    assert!(card.contains("VLMQ (arXiv 2508.03351) with importance to the power 0.5 on GPTAQ"), "{card}");
    let (auto, card) = run(&bench, &["--importance-power", "auto"]);
    assert_eq!(auto["settings"]["importance_power"], "auto");
    let power = of(&q(&auto), "power");
    assert!(power > 0.0 && power <= 1.0, "{power}");
    assert!(card.contains("importance to a power chosen by layer"), "{card}");
    // Where all weigh alike there is nothing to raise.
    let (none, _) = run(&bench, &["--importance", "none", "--importance-power", "0.5"]);
    assert_eq!(none["settings"]["importance_power"], 1.0);
    assert!(none["layers"].as_array().unwrap().iter().all(|layer| layer["importance"].is_null()));
    for wrong in ["0", "1.5", "-1", "nan", "automatic"] {
        let output = vlmq_run(&bench.quantize(&["--importance-power", wrong]));
        assert_eq!(output.status.code(), Some(2), "{wrong}");
        assert!(stderr(&output).contains("above 0 and at most 1"), "{}", stderr(&output));
    }
}
