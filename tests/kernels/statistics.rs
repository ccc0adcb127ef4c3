//! kernels/statistics on the emulator: H and C against exact sums, float64 and the CPU's operation.

use crate::buffers::{BF16, Buffer, DTYPES, F16, F32, noise, rounded};
use crate::calls::{accepted, every_schedule, refused_each};
use crate::support::golden::relative_error;
use crate::support::kernels::{self, Variant};
use std::ptr::{null, null_mut};
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::bindings::*;
use vlmq::device::{LayerInputs, SolveOps};
use vlmq::tensor::Matrix;

const NAME: &str = "vlmq_weighted_hessian";

/// Inputs, row by row without gaps, in values that `dtype` holds.
#[derive(Clone)]
struct Inputs {
    dtype: vlmq_dtype,
    tokens: usize,
    features: usize,
    u: Vec<f32>,
    f: Option<Vec<f32>>,
    g: Option<Vec<f32>>,
}

/// How they are handed over.
#[derive(Clone, Copy)]
struct Call {
    fast: bool,
    /// Elements from row to row beyond the features, and before the first: odd numbers take the path of single elements.
    gap: usize,
}

impl Inputs {
    /// Features of very different size, tokens of very different weight, F near U.
    fn noise(dtype: vlmq_dtype, tokens: usize, features: usize) -> Self {
        let round = |values: Vec<f32>| values.into_iter().map(|v| rounded(dtype, v)).collect::<Vec<_>>();
        let size = |i: usize| if i % features % 7 == 3 { 40.0 } else { 1.0 };
        let u = noise(F32, tokens * features, 1).iter().enumerate().map(|(i, v)| size(i) * v).collect();
        let change = noise(F32, tokens * features, 2);
        let u: Vec<f32> = round(u);
        let f = round(u.iter().zip(change).map(|(u, change)| u * (1.0 + 0.1 * change)).collect());
        let g = noise(F32, tokens, 3).iter().map(|v| 1e-3 * (1.5 * v).exp()).collect();
        Self { dtype, tokens, features, u, f: Some(f), g: Some(g) }
    }

    /// Small integers, weights that are powers of two: all sums are exact. Tokens of weight zero hold NaN and infinities.
    fn integers(dtype: vlmq_dtype, tokens: usize, features: usize) -> Self {
        let g: Vec<f32> = (0..tokens).map(|token| [1.0, 0.5, 0.0, 4.0, 2.0][(token * 7 + token / 5) % 5]).collect();
        let values = |seed: u64, dead: f32| -> Vec<f32> {
            let values = noise(F32, tokens * features, seed);
            let of = |(i, v): (usize, &f32)| if g[i / features] == 0.0 { dead } else { (3.0 * v).round() };
            values.iter().enumerate().map(of).collect()
        };
        let (u, f) = (values(4, f32::NAN), values(5, f32::INFINITY));
        Self { dtype, tokens, features, u, f: Some(f), g: Some(g) }
    }

    fn alive(&self, token: usize) -> bool {
        self.g.as_ref().is_none_or(|g| g[token] != 0.0)
    }

    /// H (zeros below the diagonal) and C in float64.
    fn reference(&self) -> (Vec<f64>, Vec<f64>) {
        let n = self.features;
        let (mut hessian, mut cross) = (vec![0.0; n * n], vec![0.0; n * n]);
        for token in (0..self.tokens).filter(|&token| self.alive(token)) {
            let weight = self.g.as_ref().map_or(1.0, |g| f64::from(g[token]).powi(2));
            let u: Vec<f64> = self.u[token * n..][..n].iter().map(|&v| v.into()).collect();
            for i in 0..n {
                let left = weight * u[i];
                for j in i..n {
                    hessian[i * n + j] += left * u[j];
                }
                let Some(f) = &self.f else { continue };
                let left = weight * (f64::from(f[token * n + i]) - u[i]);
                for j in 0..n {
                    cross[i * n + j] += left * u[j];
                }
            }
        }
        (hessian, cross)
    }

    /// Rows with NaN between them.
    fn spread(&self, values: &[f32], gap: usize) -> Buffer {
        let mut spread = Vec::new();
        for (token, row) in values.chunks(self.features).enumerate() {
            if token > 0 {
                spread.resize(spread.len() + gap, f32::NAN);
            }
            spread.extend(row);
        }
        Buffer::input(self.dtype, &spread, gap % 2)
    }

    /// Adds to `hessian` and `cross`.
    fn add(&self, call: Call, hessian: &mut Buffer, cross: &mut Buffer) {
        let u = self.spread(&self.u, call.gap);
        let f = self.f.as_ref().map(|f| self.spread(f, call.gap));
        let stride = (self.features + call.gap) as i64;
        let mut args = vlmq_weighted_hessian_args {
            u: u.ptr(),
            f: f.as_ref().map_or(null(), Buffer::ptr),
            g: self.g.as_ref().map_or(null(), |g| g.as_ptr()),
            hessian: hessian.ptr_mut(),
            cross: if f.is_some() { cross.ptr_mut() } else { null_mut() },
            tokens: self.tokens as i64,
            features: self.features as i64,
            u_stride: stride,
            f_stride: if f.is_some() { stride } else { 0 },
            dtype: self.dtype,
            fast: i32::from(call.fast),
            workspace: null_mut(),
            workspace_bytes: 0,
        };
        args.workspace_bytes = kernels::workspace_bytes(NAME, &args);
        let mut workspace = Buffer::workspace(args.workspace_bytes);
        args.workspace = workspace.ptr_mut();
        accepted(NAME, &args);
        workspace.bytes();
    }

    /// Adds to `old` everywhere, NaN below H's diagonal, which must stay. H comes back with zeros there.
    fn run(&self, call: Call, old: f32) -> (Vec<f32>, Vec<f32>) {
        let n = self.features;
        let below = |i: usize| i / n > i % n;
        let before: Vec<f32> = (0..n * n).map(|i| if below(i) { f32::NAN } else { old }).collect();
        let outputs = every_schedule(|| {
            let mut hessian = Buffer::in_out(F32, &before, call.gap % 2);
            let mut cross = Buffer::in_out(F32, &vec![old; n * n], 0);
            self.add(call, &mut hessian, &mut cross);
            vec![hessian, cross]
        });
        let mut hessian = outputs[0].values();
        for (i, value) in hessian.iter_mut().enumerate().filter(|&(i, _)| below(i)) {
            assert_eq!(value.to_bits(), f32::NAN.to_bits(), "written below the diagonal, at {i}");
            *value = 0.0;
        }
        let cross = outputs[1].values();
        assert!(self.f.is_some() || cross.iter().all(|&v| v == old), "C was touched");
        (hessian, cross)
    }

    /// A gap that makes rows begin at multiples of 16 bytes, or one that does not.
    fn gap(&self, aligned: bool) -> usize {
        let gap = self.features.next_multiple_of(8) + 8 - self.features;
        if aligned { gap } else { gap + 1 - gap % 2 }
    }
}

const DEFAULT: Call = Call { fast: false, gap: 0 };

fn sizes() -> &'static [(usize, usize)] {
    let all = &[(17, 33), (33, 129), (1, 1), (129, 17), (100, 64), (7, 257), (300, 200), (127, 127)];
    match Variant::current() {
        Variant::Plain => all,
        Variant::Address => &all[..4],
        Variant::Thread => &all[..2],
    }
}

#[test]
fn integers_are_summed_exactly() {
    for (index, &(tokens, features)) in sizes().iter().enumerate() {
        for (turn, dtype) in DTYPES.into_iter().enumerate() {
            let all = Inputs::integers(dtype, tokens, features);
            // Each call of a size with other settings; over the sizes, all of them.
            for aligned in [true, false] {
                let mut inputs = all.clone();
                let setting = index + turn + usize::from(aligned);
                if setting % 3 == 0 {
                    inputs.f = None;
                }
                if setting % 4 == 1 {
                    inputs.g = None;
                    inputs.u = all.u.iter().map(|&v| if v.is_nan() { 1.0 } else { v }).collect();
                    inputs.f = inputs.f.map(|f| f.iter().map(|&v| if v.is_finite() { v } else { -2.0 }).collect());
                }
                let call = Call { fast: setting % 5 == 2, gap: inputs.gap(aligned) };
                let (hessian, cross) = inputs.run(call, 3.0);
                let (exact_hessian, exact_cross) = inputs.reference();
                for i in 0..features * features {
                    let what = format!("{dtype:?} {tokens}x{features} setting {setting}, at {i}");
                    if i / features <= i % features {
                        assert_eq!(f64::from(hessian[i]), 3.0 + exact_hessian[i], "H, {what}");
                    }
                    assert_eq!(f64::from(cross[i]), 3.0 + exact_cross[i], "C, {what}");
                }
            }
        }
    }
}

#[test]
fn sums_are_accurate() {
    for dtype in DTYPES {
        // 2100 tokens are two splits, 136 features three tiles of H and four of C.
        for (tokens, features) in [(1, 17), (17, 127), (100, 129), (1000, 33), (2100, 136)] {
            let inputs = Inputs::noise(dtype, tokens, features);
            let (exact_hessian, exact_cross) = inputs.reference();
            let errors = |inputs: &Inputs, call| {
                let (hessian, cross) = inputs.run(call, 0.0);
                [relative_error(&hessian, &exact_hessian), relative_error(&cross, &exact_cross)]
            };
            let what = format!("{dtype:?} {tokens}x{features}");
            for error in errors(&inputs, DEFAULT) {
                assert!(error <= 1e-6, "{what}: {error:e}");
            }
            // One rounding to 11 bits; a low part that counts after all would be seen.
            for error in errors(&inputs, Call { fast: true, ..DEFAULT }) {
                assert!((1e-5..=1e-3).contains(&error), "{what} fast: {error:e}");
            }
        }
    }
}

#[test]
fn the_cpu_agrees() {
    for dtype in DTYPES {
        let inputs = Inputs::noise(dtype, 200, 150);
        let (hessian, cross) = inputs.run(DEFAULT, 0.0);
        let n = inputs.features;
        let matrix = |values: &[f32]| Matrix::new(inputs.tokens, n, values.to_vec()).unwrap();
        let (mut cpu_hessian, mut cpu_cross) = (Matrix::zeros(n, n), Matrix::zeros(n, n));
        let (u, f) = (matrix(&inputs.u), matrix(inputs.f.as_ref().unwrap()));
        Cpu.accumulate_statistics(
            &mut cpu_hessian,
            Some(&mut cpu_cross),
            &LayerInputs { u: &u, f: Some(&f), g: inputs.g.as_deref() },
        )
        .unwrap();
        let upper = |i: usize| i / n <= i % n;
        let wide = |values: &[f32], keep: &dyn Fn(usize) -> bool| -> Vec<f64> {
            values.iter().enumerate().map(|(i, &v)| if keep(i) { v.into() } else { 0.0 }).collect()
        };
        let error = relative_error(&hessian, &wide(cpu_hessian.data(), &upper));
        assert!(error <= 1e-6, "H of {dtype:?}: {error:e}");
        let error = relative_error(&cross, &wide(cpu_cross.data(), &|_| true));
        assert!(error <= 1e-6, "C of {dtype:?}: {error:e}");
    }
}

#[test]
fn columns_and_weights_may_be_of_any_size() {
    // 2^-12 to 2^12 in float16, with its subnormals; 2^-30 to 2^30 in the others. Weights of 1e-8 and of 1e5.
    for (dtype, smallest, step) in [(F16, -12, 6), (BF16, -30, 15), (F32, -30, 15)] {
        for weight in [1e-5, 1e8] {
            let mut inputs = Inputs::noise(dtype, 70, 40);
            let sized = |values: &[f32]| -> Vec<f32> {
                let size = |i: usize| 2f32.powi(smallest + step * (i % 40 % 5) as i32);
                values.iter().enumerate().map(|(i, v)| rounded(dtype, v / 40.0 * size(i))).collect()
            };
            inputs.u = sized(&inputs.u);
            inputs.f = inputs.f.map(|f| sized(&f));
            inputs.g = inputs.g.map(|g| g.iter().map(|g| g * weight).collect());
            let (hessian, cross) = inputs.run(DEFAULT, 0.0);
            let (exact_hessian, exact_cross) = inputs.reference();
            // Each entry against the sizes of its own columns: a norm would see the largest ones alone.
            let mut difference = inputs.clone();
            difference.u = inputs.f.as_ref().unwrap().iter().zip(&inputs.u).map(|(f, u)| f - u).collect();
            difference.f = None;
            let (exact_difference, _) = difference.reference();
            let check = |what: &str, got: &[f32], exact: &[f64], left: &[f64]| {
                for i in 0..40 * 40 {
                    let size = (left[i / 40 * 41] * exact_hessian[i % 40 * 41]).sqrt();
                    let error = (f64::from(got[i]) - exact[i]).abs() / size;
                    assert!(error <= 1e-6, "{what} of {dtype:?}, weight {weight}: {error:e} at {i}");
                }
            };
            check("H", &hessian, &exact_hessian, &exact_hessian);
            check("C", &cross, &exact_cross, &exact_difference);
        }
    }
}

#[test]
fn calls_add_up() {
    let inputs = Inputs::noise(BF16, 240, 70);
    let (exact_hessian, exact_cross) = inputs.reference();
    let mut outputs = [0, 1].map(|_| Buffer::in_out(F32, &vec![0.0; 70 * 70], 0));
    for first in (0..240).step_by(60) {
        let part = |values: &Vec<f32>, each: usize| values[first * each..][..60 * each].to_vec();
        let inputs = Inputs {
            tokens: 60,
            u: part(&inputs.u, 70),
            f: inputs.f.as_ref().map(|f| part(f, 70)),
            g: inputs.g.as_ref().map(|g| part(g, 1)),
            ..inputs
        };
        let [hessian, cross] = &mut outputs;
        inputs.add(DEFAULT, hessian, cross);
    }
    assert!(relative_error(&outputs[0].values(), &exact_hessian) <= 1e-6);
    assert!(relative_error(&outputs[1].values(), &exact_cross) <= 1e-6);
}

#[test]
fn wide_inputs_are_covered() {
    // 9 tiles a side: a whole group of tile rows that are walked together, and a group of one.
    let inputs = Inputs::integers(F16, 2, 1100);
    let (hessian, cross) = inputs.run(DEFAULT, 1.0);
    let (exact_hessian, exact_cross) = inputs.reference();
    for i in 0..1100 * 1100 {
        assert!(i / 1100 > i % 1100 || f64::from(hessian[i]) == 1.0 + exact_hessian[i], "H at {i}");
        assert!(f64::from(cross[i]) == 1.0 + exact_cross[i], "C at {i}");
    }
}

#[test]
fn long_inputs_take_several_passes() {
    // One more than a pass of 65536.
    let inputs = Inputs::integers(BF16, 65537, 3);
    let (exact_hessian, exact_cross) = inputs.reference();
    let mut outputs = [0, 1].map(|_| Buffer::in_out(F32, &[0.0; 9], 0));
    let [hessian, cross] = &mut outputs;
    inputs.add(Call { gap: 5, ..DEFAULT }, hessian, cross);
    let (hessian, cross) = (hessian.values(), cross.values());
    for i in 0..9 {
        assert!(i / 3 > i % 3 || f64::from(hessian[i]) == exact_hessian[i], "H at {i}");
        assert_eq!(f64::from(cross[i]), exact_cross[i], "C at {i}");
    }
}

#[test]
fn what_is_not_finite_is_not_hidden() {
    for dtype in DTYPES {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut inputs = Inputs::noise(dtype, 20, 10);
            inputs.u[13 * 10 + 4] = bad;
            let (hessian, cross) = inputs.run(DEFAULT, 0.0);
            for i in 0..100 {
                let (row, col) = (i / 10, i % 10);
                let touched = row == 4 || col == 4;
                assert!(row > col || hessian[i].is_finite() != touched, "H of {dtype:?} with {bad} at {i}");
                assert!(cross[i].is_finite() != touched, "C of {dtype:?} with {bad} at {i}");
            }
        }
    }
}

#[test]
fn bad_arguments_are_refused() {
    let inputs = Inputs::integers(BF16, 2000, 8);
    let u = inputs.spread(&inputs.u, 0);
    let mut outputs = [0, 1].map(|_| Buffer::output(F32, 64, 0));
    let mut workspace = Buffer::workspace(1 << 20);
    let [hessian, cross] = &mut outputs;
    let mut good = vlmq_weighted_hessian_args {
        u: u.ptr(),
        f: u.ptr(),
        g: inputs.g.as_ref().unwrap().as_ptr(),
        hessian: hessian.ptr_mut(),
        cross: cross.ptr_mut(),
        tokens: 2000,
        features: 8,
        u_stride: 8,
        f_stride: 8,
        dtype: BF16,
        fast: 0,
        workspace: workspace.ptr_mut(),
        workspace_bytes: 0,
    };
    good.workspace_bytes = kernels::workspace_bytes(NAME, &good);
    assert!((1..=1 << 20).contains(&good.workspace_bytes));
    let bad: [fn(&mut vlmq_weighted_hessian_args); 19] = [
        |a| a.u = null(),
        |a| a.u = a.u.wrapping_byte_add(1),
        |a| a.f = a.f.wrapping_byte_add(1),
        |a| a.g = a.g.wrapping_byte_add(2),
        |a| a.hessian = null_mut(),
        |a| a.hessian = a.hessian.wrapping_byte_add(2),
        |a| a.cross = a.cross.wrapping_byte_add(2),
        |a| a.f = null(),
        |a| a.cross = null_mut(),
        |a| a.tokens = -1,
        |a| a.features = -1,
        |a| a.features = 1 << 40,
        |a| a.u_stride = 7,
        |a| a.f_stride = 7,
        |a| a.dtype = vlmq_dtype(3),
        |a| a.dtype = vlmq_dtype(7),
        |a| a.workspace = null_mut(),
        |a| a.workspace = a.workspace.wrapping_byte_add(128),
        |a| a.workspace_bytes -= 1,
    ];
    refused_each(NAME, &good, &bad);
    for empty in [(0, 8), (2000, 0)] {
        let mut args = good;
        (args.tokens, args.features) = empty;
        args.workspace_bytes = 0;
        assert_eq!(kernels::workspace_bytes(NAME, &args), 0);
        accepted(NAME, &args);
    }
    assert!(outputs.iter().all(Buffer::is_untouched), "written by a call that does nothing");
}

#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn small_cases_pass_under_sanitizers() {
    let tests = ["integers_are_summed_exactly", "bad_arguments_are_refused"];
    kernels::pass_under_sanitizers(module_path!(), &tests, &[("vlmq_kernels", "kernels")]);
}
