//! Properties of the solver that need no golden: threads, shapes, failures, limits.

use crate::support::noise;
use crate::support::ties::Layer;
use std::panic::{AssertUnwindSafe, catch_unwind};
use vlmq::codes::QuantizedLinear;
use vlmq::device::{LayerInputs, cpu::Cpu};
use vlmq::quantize::plain::{QuantizedLayer, quantize_layer};
use vlmq::quantize::settings::{CrossTerm, Grid, Order, Solver, SolverSettings};
use vlmq::quantize::solve::{prepare, round_to_nearest, solve};
use vlmq::quantize::statistics::Statistics;
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

fn gptq(group: Option<usize>) -> SolverSettings {
    SolverSettings { solver: Solver::Gptq, group_size: group, ..SolverSettings::default() }
}

fn same(a: &QuantizedLayer, b: &QuantizedLayer) -> bool {
    a.linear == b.linear && a.order == b.order && a.report.relative_error == b.report.relative_error
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let (u, f, w) = (noise(700, 384, 1), noise(700, 384, 2), noise(300, 384, 3));
    let g: Vec<f32> = (0..700).map(|i| (i % 5) as f32 / 2.0).collect();
    for settings in [SolverSettings::default(), SolverSettings { grid: Grid::Mse, ..gptq(Some(32)) }] {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                quantize_layer(&Cpu, &w, &LayerInputs { u: &u, f: Some(&f), g: Some(&g) }, &settings).unwrap()
            })
        };
        let one = run(1);
        assert!(same(&one, &run(2)) && same(&one, &run(3)));
    }
}

#[test]
fn odd_shapes_solve_and_beat_rounding() {
    let shapes = [(1, 32, Some(32)), (17, 96, Some(8)), (130, 200, None), (5, 8, Some(8)), (33, 640, Some(320))];
    for (rows, cols, group) in shapes {
        let (u, w) = (noise(3 * cols, cols, 5), noise(rows, cols, 6));
        let settings = gptq(group);
        let layer = quantize_layer(&Cpu, &w, &LayerInputs { u: &u, f: None, g: None }, &settings).unwrap();
        let groups = cols / group.unwrap_or(cols);
        assert_eq!(layer.linear.codes.len(), rows * cols);
        assert_eq!((layer.linear.scales.len(), layer.linear.zeros.len()), (rows * groups, rows * groups));
        let (rounded, _) = round_to_nearest(&w, &settings).unwrap();
        let (ours, theirs) = (
            output_error(&w, &layer.linear.dequantize().unwrap(), &u),
            output_error(&w, &rounded.dequantize().unwrap(), &u),
        );
        assert!(ours < theirs, "{rows}x{cols}: {ours} against {theirs}");
        let reported = layer.report.relative_error;
        assert!((reported / ours - 1.0).abs() < 1e-3, "{rows}x{cols}: reported {reported}, is {ours}");
    }
}

/// `‖(Ŵ − W)·Uᵀ‖² / ‖W·Uᵀ‖²` in float64.
fn output_error(w: &Matrix, q: &Matrix, u: &Matrix) -> f64 {
    let (mut off, mut norm) = (0.0, 0.0);
    for r in 0..w.rows() {
        for t in 0..u.rows() {
            let (mut exact, mut ours) = (0.0, 0.0);
            for ((&w, &q), &u) in w.row(r).iter().zip(q.row(r)).zip(u.row(t)) {
                exact += f64::from(w) * f64::from(u);
                ours += f64::from(q) * f64::from(u);
            }
            off += (exact - ours) * (exact - ours);
            norm += exact * exact;
        }
    }
    off / norm
}

/// By float64 from the codes before it; a code that is not shows, and so does a scale.
#[test]
fn each_code_is_the_nearest() {
    let (u, f, w) = (noise(700, 320, 1), noise(700, 320, 2), noise(9, 320, 3));
    let g: Vec<f32> = (0..700).map(|i| (i % 5) as f32 / 2.0).collect();
    let gptaq = SolverSettings { group_size: Some(32), ..SolverSettings::default() };
    for settings in [
        gptq(Some(160)),
        SolverSettings { grid: Grid::Minmax, ..gptq(Some(160)) },
        SolverSettings { bits: 8, ..gptq(None) },
        SolverSettings { cross_term: CrossTerm::Quantized, ..gptaq.clone() },
        SolverSettings { order: Order::Act, group_size: Some(160), ..gptaq.clone() },
        SolverSettings { group_size: None, cross_term: CrossTerm::Quantized, symmetric: true, ..gptaq },
    ] {
        let solved = quantize_layer(&Cpu, &w, &LayerInputs { u: &u, f: Some(&f), g: Some(&g) }, &settings).unwrap();
        let layer = Layer::new(&w, [&u, &f], &g, &settings, &solved);
        layer.compare(&solved.linear, &solved.linear);
        let strange = |change: fn(&mut QuantizedLinear)| {
            let mut other = solved.linear.clone();
            change(&mut other);
            catch_unwind(AssertUnwindSafe(|| layer.compare(&other, &solved.linear))).is_err()
        };
        assert!(strange(|linear| linear.codes[5 * 320 + 200] ^= 1), "another code with {settings:?}");
        assert!(strange(|linear| linear.scales[3] *= 1.01), "another scale with {settings:?}");
    }
}

#[test]
fn gptaq_with_equal_paths_is_gptq() {
    let (u, w) = (noise(400, 256, 7), noise(24, 256, 8));
    let gptaq = SolverSettings { group_size: Some(64), ..SolverSettings::default() };
    let a = quantize_layer(&Cpu, &w, &LayerInputs { u: &u, f: Some(&u), g: None }, &gptaq).unwrap();
    let b = quantize_layer(&Cpu, &w, &LayerInputs { u: &u, f: None, g: None }, &gptq(Some(64))).unwrap();
    assert!(same(&a, &b));
}

#[test]
fn dead_inputs_become_zero_weights() {
    let (mut u, w) = (noise(300, 64, 9), noise(20, 64, 10));
    for t in 0..u.rows() {
        u.row_mut(t)[3] = 0.0;
        u.row_mut(t)[40] = 0.0;
    }
    let layer = quantize_layer(&Cpu, &w, &LayerInputs { u: &u, f: None, g: None }, &gptq(Some(32))).unwrap();
    assert_eq!(layer.report.dead_inputs, 2);
    let weights = layer.linear.dequantize().unwrap();
    assert!((0..20).all(|r| weights.row(r)[3] == 0.0 && weights.row(r)[40] == 0.0));
    assert!((0..20).any(|r| weights.row(r)[4] != 0.0));
}

#[test]
fn tokens_of_importance_zero_are_not_read() {
    let (mut u, w) = (noise(100, 32, 11), noise(4, 32, 12));
    let mut g = vec![1.0; 100];
    (g[10], g[99]) = (0.0, 0.0);
    let settings = gptq(Some(32));
    let mut statistics = Statistics::new(&Cpu, 32, false).unwrap();
    statistics.accumulate(&Cpu, &u, None, Some(&g)).unwrap();
    u.row_mut(10).fill(f32::NAN);
    u.row_mut(99).fill(f32::INFINITY);
    let mut broken = Statistics::new(&Cpu, 32, false).unwrap();
    broken.accumulate(&Cpu, &u, None, Some(&g)).unwrap();
    assert_eq!(statistics.hessian, broken.hessian);
    assert_eq!(broken.tokens, 98);
    let prepared = prepare(&Cpu, &broken, &settings).unwrap();
    assert!(solve(&Cpu, &prepared, &w, &settings).is_ok());
}

#[test]
fn groups_of_zeros_and_scales_at_their_limits() {
    let settings = |scale_type| SolverSettings { scale_type, ..gptq(Some(32)) };
    let mut w = Matrix::zeros(2, 64);
    w.row_mut(1)[..32].fill(1e-9);
    let (linear, report) = round_to_nearest(&w, &settings(Float::F16)).unwrap();
    assert_eq!((linear.scales[0], linear.zeros[0], linear.codes[0]), (1.0, 4, 4));
    assert_eq!(linear.scales[2], Float::F16.smallest());
    assert!(report.relative_error.is_finite());
    w.row_mut(1)[0] = 1e6;
    let error = round_to_nearest(&w, &settings(Float::F16)).unwrap_err().to_string();
    assert!(error.contains("output row 1") && error.contains("F16"), "{error}");
    assert!(round_to_nearest(&w, &settings(Float::Bf16)).is_ok());
}

#[test]
fn bad_input_is_refused_with_the_reason() {
    let (u, w) = (noise(50, 64, 13), noise(4, 64, 14));
    let refuse = |w: &Matrix, u: &Matrix, f: Option<&Matrix>, g: Option<&[f32]>, s: &SolverSettings, why: &str| {
        let error = quantize_layer(&Cpu, w, &LayerInputs { u, f, g }, s).unwrap_err().to_string();
        assert!(error.contains(why), "{error} does not say {why}");
    };
    let settings = gptq(Some(32));
    refuse(&w, &noise(50, 32, 1), None, None, &settings, "columns");
    refuse(&w, &Matrix::zeros(0, 64), None, None, &settings, "no calibration token");
    refuse(&w, &u, None, Some(&[1.0; 49]), &settings, "49 importance factors for 50 tokens");
    refuse(&w, &u, None, Some(&[-1.0; 50]), &settings, "negative");
    refuse(&w, &u, None, None, &gptq(Some(48)), "not divisible by the group size 48");
    refuse(&w, &u, None, None, &SolverSettings { group_size: Some(32), ..Default::default() }, "float path");
    let gptaq = SolverSettings { group_size: Some(32), order: Order::Act, ..SolverSettings::default() };
    refuse(&w, &u, Some(&noise(49, 64, 2)), None, &gptaq, "49x64");
    for (name, matrix) in [("weight", &w), ("inputs", &u)] {
        let mut broken = matrix.clone();
        broken.row_mut(1)[2] = f32::NAN;
        let (w, u) = if name == "weight" { (&broken, &u) } else { (&w, &broken) };
        refuse(w, u, None, None, &settings, "[1, 2] is NaN");
    }
}
