//! Numbers that go wrong in a layer: each is found, on the CPU and on emulated kernels, and something is done about it.

use crate::support::devices::device;
use crate::support::{message, noise};
use vlmq::device::cpu::Cpu;
use vlmq::device::{LayerInputs, SolveOps, WIDTHS};
use vlmq::quantize::plain::{QuantizedLayer, quantize_layer};
use vlmq::quantize::settings::{Order, Solver, SolverSettings};
use vlmq::quantize::solve::{prepare, round_to_nearest, solve, solve_layer};
use vlmq::quantize::statistics::{Shares, Statistics};
use vlmq::quantize::{Finding, FindingKind, SolveReport};
use vlmq::tensor::Float;
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
        $check(&device(Float::F32));
    };
}

#[test]
fn enough_good_tokens_are_no_finding() {
    fn check<D: SolveOps>(device: &D) {
        let (u, f, w) = (noise(200, 64, 1), noise(200, 64, 2), noise(20, 64, 3));
        for settings in [gptq(), gptaq(), SolverSettings { bits: 8, ..gptq() }, SolverSettings { bits: 2, ..gptaq() }] {
            let layer = quantize_layer(device, &w, &LayerInputs { u: &u, f: Some(&f), g: None }, &settings).unwrap();
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
            (0..64).for_each(|i| h.row_mut(i)[i] = 1.0);
            (0..64).step_by(2).for_each(|i| h.row_mut(i)[i + 1] = coupling);
            Statistics { hessian: device.upload(h).unwrap(), cross: None, tokens: 500, shares: Shares::default() }
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
    // 64 of these weigh as much as 63 alike.
    for (tokens, few) in [(20, true), (63, true), (64, true), (67, false), (200, false)] {
        let layer =
            quantize_layer(&Cpu, &w, &LayerInputs { u: &noise(tokens as usize, 64, 1), f: None, g: None }, &gptq())
                .unwrap();
        assert_eq!(!kinds(&layer.report).is_empty(), few, "{tokens} tokens");
        if few {
            let finding = only(&layer.report, FindingKind::FewTokens);
            let effective = layer.report.effective_tokens.unwrap();
            assert!(effective < 64.0 && effective > 0.9 * f64::from(tokens), "{tokens}: {effective}");
            let found = format!(
                "{tokens} calibration tokens that weigh as much as {effective:.1} alike, fewer than the 64 inputs"
            );
            assert_eq!(finding.found, found);
        }
    }
    // So few of many carry most weight.
    let g: Vec<f32> = (0..400).map(|token| if token % 20 == 0 { 10.0 } else { 1.0 }).collect();
    let layer =
        quantize_layer(&Cpu, &w, &LayerInputs { u: &noise(400, 64, 1), f: None, g: Some(&g) }, &gptq()).unwrap();
    assert!(
        only(&layer.report, FindingKind::FewTokens).found.starts_with("400 calibration tokens that weigh as much as 2")
    );
    // Tokens that weigh nothing are none.
    let g: Vec<f32> = (0..100).map(|token| if token % 2 == 0 { 1.0 } else { 0.0 }).collect();
    let layer =
        quantize_layer(&Cpu, &w, &LayerInputs { u: &noise(100, 64, 1), f: None, g: Some(&g) }, &gptq()).unwrap();
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
            let layer =
                quantize_layer(device, &w, &LayerInputs { u: &without(dead), f: None, g: None }, &gptq()).unwrap();
            assert_eq!(layer.report.dead_inputs, dead);
            assert_eq!(kinds(&layer.report), if found { vec![FindingKind::DeadInputs] } else { vec![] });
            let weights = layer.linear.dequantize().unwrap();
            assert!((0..20).all(|row| weights.row(row)[..dead].iter().all(|&w| w == 0.0)));
        }
        for settings in [gptq(), SolverSettings { order: Order::Act, ..gptaq() }] {
            let layer =
                quantize_layer(device, &w, &LayerInputs { u: &without(64), f: Some(&without(64)), g: None }, &settings)
                    .unwrap();
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
        let layer = quantize_layer(device, &w, &LayerInputs { u: &u, f: None, g: None }, &gptq()).unwrap();
        assert_rounded(&layer, &w, &gptq());
        assert!(only(&layer.report, FindingKind::StatisticsUnusable).found.contains("H hold"));
        // The cross term alone.
        let mut huge = f.clone();
        huge.row_mut(7).fill(3e38);
        (0..200).for_each(|token| huge.row_mut(token)[5] = 3e38);
        let layer = quantize_layer(device, &w, &LayerInputs { u: &f, f: Some(&huge), g: None }, &gptaq()).unwrap();
        assert_eq!(
            layer.linear,
            quantize_layer(device, &w, &LayerInputs { u: &f, f: None, g: None }, &gptq()).unwrap().linear
        );
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
            let layer = quantize_layer(device, &w, &LayerInputs { u: &u, f: Some(&f), g: None }, &settings).unwrap();
            let plain = SolverSettings { solver: Solver::Gptq, ..settings.clone() };
            let expected = quantize_layer(device, &w, &LayerInputs { u: &u, f: None, g: None }, &plain).unwrap();
            assert_eq!(layer.linear, expected.linear);
            assert_eq!(layer.report.relative_error, expected.report.relative_error);
            let finding = only(&layer.report, FindingKind::ErrorExploded);
            assert!(finding.found.starts_with("relative error ") && finding.done.contains("GPTQ"), "{finding}");
        }
        // A path that is off by half steers by as much, which is what it is for.
        f.data_mut().iter_mut().zip(noise(200, 64, 9).data()).for_each(|(f, n)| *f = *f / 100.0 + 0.5 * n);
        for bits in WIDTHS {
            let settings = SolverSettings { bits, ..gptaq() };
            let layer = quantize_layer(device, &w, &LayerInputs { u: &u, f: Some(&f), g: None }, &settings).unwrap();
            assert_eq!(kinds(&layer.report), [], "{bits} bits");
        }
    }
    on_both_devices!(check);
}

/// One weight so large that the grid has no place for the others.
#[test]
fn half_of_the_output_lost() {
    let (mut u, mut w) = (noise(200, 64, 1), noise(20, 64, 3));
    (0..20).for_each(|row| w.row_mut(row)[0] = 1e6);
    (0..200).for_each(|token| u.row_mut(token)[0] *= 1e-6);
    let settings = SolverSettings { group_size: None, bits: 8, ..gptq() };
    let layer = quantize_layer(&Cpu, &w, &LayerInputs { u: &u, f: None, g: None }, &settings).unwrap();
    let finding = only(&layer.report, FindingKind::ErrorExploded);
    assert_eq!(finding.done, "kept as solved");
    assert!((0.5..1.5).contains(&layer.report.relative_error), "{:?}", layer.report);
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
        let settings = SolverSettings { bits: 2, scale_type: Float::F16, damp: 1e-9, ..gptq() };
        let layer = quantize_layer(device, &w, &LayerInputs { u: &u, f: None, g: None }, &settings).unwrap();
        let finding = layer.report.findings.iter().find(|f| f.kind == FindingKind::ErrorExploded).unwrap();
        assert!(finding.found.contains("output row") && finding.found.contains("F16"), "{finding}");
        assert_eq!(layer.linear, round_to_nearest(&w, &settings).unwrap().0);
        assert!(layer.report.relative_error.is_finite());
        // The weights themselves too large: that is an error, with the figure.
        w.row_mut(11)[40] = 1e6;
        let error = message(quantize_layer(device, &w, &LayerInputs { u: &u, f: None, g: None }, &settings));
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
        let layer = quantize_layer(&Cpu, &w, &LayerInputs { u: &u, f: Some(&f), g: None }, &settings).unwrap();
        assert_eq!(kinds(&layer.report), []);
        assert!(layer.linear.dequantize().unwrap().row(4).iter().all(|&w| w == 0.0));
        let nothing =
            quantize_layer(&Cpu, &Matrix::zeros(20, 64), &LayerInputs { u: &u, f: Some(&f), g: None }, &settings)
                .unwrap();
        assert_eq!((kinds(&nothing.report), nothing.report.relative_error), (vec![], 0.0));
    }
    // Weights whose squares float32 does not hold have an error in the Frobenius norm.
    let mut tiny = noise(20, 64, 3);
    tiny.data_mut().iter_mut().for_each(|w| *w *= 1e-30);
    let settings = SolverSettings { scale_type: Float::F32, ..gptq() };
    let mut quiet = u;
    quiet.data_mut().iter_mut().for_each(|u| *u *= 1e-15);
    let layer = quantize_layer(&Cpu, &tiny, &LayerInputs { u: &quiet, f: None, g: None }, &settings).unwrap();
    assert!(layer.report.relative_error.is_finite(), "{:?}", layer.report);
}
