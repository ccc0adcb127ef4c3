//! kernels/factor: products, norms and permutations, on the emulator.

use crate::buffers::{Buffer, F32, integers, noise};
use crate::calls::{accepted, every_schedule, refused, refused_each, schedules};
use crate::support::golden::relative_error;
use crate::support::kernels::{self, Variant};
use std::ptr::{null, null_mut};
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::bindings::*;
use vlmq::device::{PermuteSymmetric, ProductRange, SolveOps};
use vlmq::tensor::Matrix;

/// Everything of one product but the numbers.
#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    cols: usize,
    inner: usize,
    transposed: bool,
    /// Elements between the end of a row and the next, and before the first: odd ones take 4-byte copies.
    gap: usize,
    alpha: f32,
    beta: f32,
}

impl Case {
    fn b_shape(&self) -> (usize, usize) {
        if self.transposed { (self.cols, self.inner) } else { (self.inner, self.cols) }
    }

    /// beta * c + alpha * a * op(b) in float64.
    fn reference(&self, a: &[f32], b: &[f32], c: &[f32]) -> Vec<f64> {
        let (_, b_cols) = self.b_shape();
        let at = |k: usize, j: usize| f64::from(if self.transposed { b[j * b_cols + k] } else { b[k * b_cols + j] });
        (0..self.rows * self.cols)
            .map(|index| {
                let (i, j) = (index / self.cols, index % self.cols);
                let sum: f64 = (0..self.inner).map(|k| f64::from(a[i * self.inner + k]) * at(k, j)).sum();
                let old = if self.beta == 0.0 { 0.0 } else { f64::from(self.beta) * f64::from(c[index]) };
                old + f64::from(self.alpha) * sum
            })
            .collect()
    }

    /// Rows of `cols` values with a gap of poison behind each but the last.
    fn spread(&self, values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        let stride = cols + self.gap;
        let mut spread = vec![f32::NAN; (rows * stride).saturating_sub(self.gap)];
        for (i, row) in values.chunks(cols.max(1)).enumerate() {
            spread[i * stride..][..cols].copy_from_slice(row);
        }
        spread
    }

    fn run(&self, a: &[f32], b: &[f32], c: &[f32]) -> Vec<f32> {
        let (b_rows, b_cols) = self.b_shape();
        let a = Buffer::input(F32, &self.spread(a, self.rows, self.inner), self.gap);
        let b = Buffer::input(F32, &self.spread(b, b_rows, b_cols), self.gap);
        let c_stride = self.cols + self.gap;
        // Without beta, what c holds is poison.
        let mut out = if self.beta == 0.0 {
            Buffer::output(F32, (self.rows * c_stride).saturating_sub(self.gap), self.gap)
        } else {
            Buffer::in_out(F32, &self.spread(c, self.rows, self.cols), self.gap)
        };
        accepted(
            "vlmq_product",
            &vlmq_product_args {
                a: a.ptr(),
                b: b.ptr(),
                c: out.ptr_mut(),
                rows: self.rows as i64,
                cols: self.cols as i64,
                inner: self.inner as i64,
                a_stride: (self.inner + self.gap) as i64,
                b_stride: (b_cols + self.gap) as i64,
                c_stride: c_stride as i64,
                alpha: self.alpha,
                beta: self.beta,
                transposed: i32::from(self.transposed),
            },
        );
        let values = out.values();
        for row in values.chunks(c_stride) {
            assert!(row.iter().skip(self.cols).all(|v| v.is_nan()), "{self:?}: written between rows");
        }
        values.chunks(c_stride).flat_map(|row| &row[..self.cols]).copied().collect()
    }
}

/// Shapes, each with both forms of b, aligned and not.
fn cases(shapes: &[(usize, usize, usize)]) -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, &(rows, cols, inner)) in shapes.iter().enumerate() {
        for transposed in [false, true] {
            for gap in [0, 1, 4] {
                let (alpha, beta) = [(1.0, 0.0), (-1.0, 1.0), (2.0, -0.5)][(i + gap + usize::from(transposed)) % 3];
                cases.push(Case { rows, cols, inner, transposed, gap, alpha, beta });
            }
        }
    }
    cases
}

fn shapes() -> &'static [(usize, usize, usize)] {
    let all = &[(1, 1, 1), (17, 33, 7), (33, 12, 40), (129, 127, 33), (127, 129, 64), (260, 136, 100)];
    match Variant::current() {
        Variant::Plain => all,
        Variant::Address => &all[..4],
        Variant::Thread => &all[..3],
    }
}

#[test]
fn products_of_integers_are_exact() {
    for (i, case) in cases(shapes()).into_iter().enumerate() {
        let (b_rows, b_cols) = case.b_shape();
        // 12 bits, so that one operand has a low part, and all sums stay below 2^24.
        let (most_a, most_b) = if i % 2 == 0 { (4095, 3) } else { (3, 4095) };
        let a = integers(case.rows * case.inner, 1, most_a);
        let b = integers(b_rows * b_cols, 2, most_b);
        let c = integers(case.rows * case.cols, 3, 100);
        let got: Vec<f64> = case.run(&a, &b, &c).into_iter().map(f64::from).collect();
        assert!(got == case.reference(&a, &b, &c), "{case:?}");
    }
}

#[test]
fn products_are_float32_accurate() {
    for case in cases(&[(130, 70, 300), (65, 129, 900)]) {
        let (b_rows, b_cols) = case.b_shape();
        let a = noise(F32, case.rows * case.inner, 4);
        let b = noise(F32, b_rows * b_cols, 5);
        let c = noise(F32, case.rows * case.cols, 6);
        let got = every_schedule(|| case.run(&a, &b, &c));
        let error = relative_error(&got, &case.reference(&a, &b, &c));
        assert!(error <= 1e-6, "{case:?}: {error:.1e}");
        // One pass of tf32 would be off by 2e-4: the low parts are there.
        assert!(error < 3e-7, "{case:?}: {error:.1e}");
    }
}

#[test]
fn products_agree_with_the_cpu() {
    let (rows, features, cols) = (40, 200, 90);
    let matrix = |r, c, seed| Matrix::new(r, c, noise(F32, r * c, seed)).unwrap();
    let (a, b) = (matrix(rows, features, 7), matrix(features, features, 8));
    let mut expected = matrix(rows, cols, 9);
    let mut c = Buffer::in_out(F32, expected.data(), 0);
    let range = ProductRange { inner: 50..178, columns: 110..150, target: 31 };
    Cpu.add_product(&mut expected, &a, &b, &range).unwrap();
    let args = vlmq_product_args {
        a: a.data()[range.inner.start..].as_ptr(),
        b: b.data()[range.inner.start * features + range.columns.start..].as_ptr(),
        c: c.ptr_mut::<f32>().wrapping_add(range.target),
        rows: rows as i64,
        cols: range.columns.len() as i64,
        inner: range.inner.len() as i64,
        a_stride: features as i64,
        b_stride: features as i64,
        c_stride: cols as i64,
        alpha: 1.0,
        beta: 1.0,
        transposed: 0,
    };
    accepted("vlmq_product", &args);
    let expected: Vec<f64> = expected.data().iter().map(|&v| f64::from(v)).collect();
    let error = relative_error(&c.values(), &expected);
    assert!(error <= 1e-6, "{error:.1e}");
}

#[test]
fn an_empty_product_scales_and_bad_arguments_are_refused() {
    let mut c = Buffer::in_out(F32, &[1.0, 2.0, 3.0, 4.0], 0);
    let x = [1.0f32; 4];
    let good = vlmq_product_args {
        a: x.as_ptr(),
        b: x.as_ptr(),
        c: c.ptr_mut(),
        rows: 2,
        cols: 2,
        inner: 2,
        a_stride: 2,
        b_stride: 2,
        c_stride: 2,
        alpha: 1.0,
        beta: 2.0,
        transposed: 0,
    };
    accepted("vlmq_product", &vlmq_product_args { rows: 0, a: null(), b: null(), c: null_mut(), ..good });
    accepted("vlmq_product", &vlmq_product_args { cols: 0, ..good });
    assert_eq!(c.values(), [1.0, 2.0, 3.0, 4.0]);
    accepted("vlmq_product", &vlmq_product_args { inner: 0, a: null(), b: null(), ..good });
    assert_eq!(c.values(), [2.0, 4.0, 6.0, 8.0]);
    // The last four: rows of a, of b and of c overlap.
    let bad: [fn(&mut vlmq_product_args); 9] = [
        |a| a.a = null(),
        |a| a.b = null(),
        |a| a.c = null_mut(),
        |a| a.rows = -1,
        |a| a.inner = -1,
        |a| a.a_stride = 1,
        |a| a.b_stride = 1,
        |a| a.c_stride = 1,
        |a| (a.inner, a.b_stride) = (1, 1),
    ];
    refused_each("vlmq_product", &good, &bad);
    // More tiles than a launch has blocks.
    let wide = vlmq_product_args { rows: i64::MAX / 2, cols: i64::MAX / 2, inner: 0, c_stride: i64::MAX, ..good };
    refused("vlmq_product", &wide);
    assert_eq!(c.values(), [2.0, 4.0, 6.0, 8.0]);
}

/// An order that is neither the identity nor its own inverse.
fn shuffled(n: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n as u32).collect();
    let steps = noise(F32, n, 11);
    order.sort_by(|&a, &b| steps[a as usize].total_cmp(&steps[b as usize]));
    order
}

fn permuted(x: &[f32], n: usize, order: &[u32], diagonal: Option<&[f32]>, symmetric: bool) -> Vec<f32> {
    let order: Vec<i32> = order.iter().map(|&i| i as i32).collect();
    let (x, diagonal) = (Buffer::input(F32, x, 0), diagonal.map(|d| Buffer::input(F32, d, 1)));
    every_schedule(|| {
        let mut out = Buffer::output(F32, n * n, 0);
        accepted(
            "vlmq_permute",
            &vlmq_permute_args {
                x: x.ptr(),
                order: order.as_ptr(),
                diagonal: diagonal.as_ref().map_or(null(), Buffer::ptr),
                out: out.ptr_mut(),
                n: n as i64,
                symmetric: i32::from(symmetric),
            },
        );
        out.values()
    })
}

#[test]
fn permutations_are_the_cpus() {
    let sizes: &[usize] = if Variant::current() == Variant::Plain { &[1, 17, 33, 127, 129] } else { &[1, 17, 65] };
    for &n in sizes {
        let x = Matrix::new(n, n, noise(F32, n * n, 12)).unwrap();
        let diagonal = noise(F32, n, 13);
        let upper =
            |m: &Matrix| -> Vec<f32> { (0..n * n).map(|i| if i / n <= i % n { m.data()[i] } else { 0.0 }).collect() };
        for order in [(0..n as u32).collect(), (0..n as u32).rev().collect(), shuffled(n)] {
            let order: Vec<u32> = order;
            let plain = Cpu.permute(&x, &order).unwrap();
            assert_eq!(permuted(x.data(), n, &order, None, false), upper(&plain), "n {n}");
            let how = PermuteSymmetric { order: &order, diagonal: &diagonal };
            let symmetric = Cpu.permute_symmetric(&x, how).unwrap();
            // Below the diagonal nothing is read.
            let half: Vec<f32> = (0..n * n).map(|i| if i / n <= i % n { x.data()[i] } else { f32::NAN }).collect();
            assert_eq!(permuted(&half, n, &order, Some(&diagonal), true), upper(&symmetric), "n {n}");
            let own: Vec<f32> = (0..n).map(|i| half[i * n + i]).collect();
            let kept = Cpu.permute_symmetric(&x, PermuteSymmetric { order: &order, diagonal: &own }).unwrap();
            assert_eq!(permuted(&half, n, &order, None, true), upper(&kept), "n {n}");
        }
    }
    let mut out = Buffer::output(F32, 4, 0);
    let (x, order) = ([0.0f32; 4], [0i32, 1]);
    let good = vlmq_permute_args {
        x: x.as_ptr(),
        order: order.as_ptr(),
        diagonal: null(),
        out: out.ptr_mut(),
        n: 2,
        symmetric: 0,
    };
    let bad: [fn(&mut vlmq_permute_args); 5] =
        [|a| a.x = null(), |a| a.order = null(), |a| a.out = null_mut(), |a| a.x = a.out, |a| a.n = -2];
    refused_each("vlmq_permute", &good, &bad);
    accepted("vlmq_permute", &vlmq_permute_args { n: 0, ..good });
    assert!(out.is_untouched());
}

fn norm(x: &Buffer, h: Option<&Buffer>, rows: usize, cols: usize) -> f64 {
    schedules(0..2, || {
        let mut norm = f64::NAN;
        let mut args = vlmq_squared_norm_args {
            x: x.ptr(),
            h: h.map_or(null(), Buffer::ptr),
            norm: &raw mut norm,
            rows: rows as i64,
            cols: cols as i64,
            workspace: null_mut(),
            workspace_bytes: 0,
        };
        args.workspace_bytes = kernels::workspace_bytes("vlmq_squared_norm", &args);
        let mut workspace = Buffer::workspace(args.workspace_bytes);
        args.workspace = workspace.ptr_mut();
        accepted("vlmq_squared_norm", &args);
        workspace.bytes();
        norm
    })
}

#[test]
fn norms_are_sums_in_float64() {
    let plain = Variant::current() == Variant::Plain;
    let all = [(1, 1), (17, 33), (3, 128), (129, 127), (130, 300), (1, 9000)];
    for (rows, cols) in all.into_iter().take(if plain { 6 } else { 3 }) {
        for shift in [0, 1] {
            let values = noise(F32, rows * cols, 14);
            let expected: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
            let got = norm(&Buffer::input(F32, &values, shift), None, rows, cols);
            assert!((got - expected).abs() <= 1e-13 * expected, "{rows}x{cols}: {got} {expected}");
        }
        let large = integers(rows * cols, 15, 4000);
        let expected: f64 = large.iter().map(|&v| f64::from(v).powi(2)).sum();
        assert_eq!(norm(&Buffer::input(F32, &large, 0), None, rows, cols), expected, "{rows}x{cols}");
    }
}

#[test]
fn weighted_norms_read_the_upper_triangle() {
    let plain = Variant::current() == Variant::Plain;
    let all = [(1, 1), (5, 17), (17, 40), (127, 129), (130, 300)];
    for (rows, cols) in all.into_iter().take(if plain { 5 } else { 3 }) {
        let upper = |values: Vec<f32>| -> Vec<f32> {
            values.iter().enumerate().map(|(i, &v)| if i / cols <= i % cols { v } else { f32::NAN }).collect()
        };
        let reference = |x: &[f32], h: &[f32]| -> f64 {
            let at = |i: usize, j: usize| f64::from(h[i.min(j) * cols + i.max(j)]);
            let row = |x: &[f32]| -> f64 {
                let inner = |i: usize| -> f64 { (0..cols).map(|j| at(i, j) * f64::from(x[j])).sum() };
                (0..cols).map(|i| f64::from(x[i]) * inner(i)).sum()
            };
            x.chunks(cols).map(row).sum()
        };
        let (x, h) = (integers(rows * cols, 16, 9), upper(integers(cols * cols, 17, 9)));
        for shift in [0, 1] {
            let got = norm(&Buffer::input(F32, &x, shift), Some(&Buffer::input(F32, &h, 0)), rows, cols);
            assert_eq!(got, reference(&x, &h), "{rows}x{cols}");
        }
        // Positive definite, as H is: nothing cancels.
        let (x, mut h) = (noise(F32, rows * cols, 18), upper(noise(F32, cols * cols, 19)));
        (0..cols).for_each(|i| h[i * cols + i] = 2.0 * cols as f32);
        let expected = reference(&x, &h);
        let got = norm(&Buffer::input(F32, &x, 0), Some(&Buffer::input(F32, &h, 0)), rows, cols);
        assert!((got - expected).abs() <= 1e-6 * expected, "{rows}x{cols}: {got} {expected}");
        let matrix = |r, c, data: &[f32]| Matrix::new(r, c, data.to_vec()).unwrap();
        let cpu = Cpu.weighted_squared_norm(&matrix(rows, cols, &x), &matrix(cols, cols, &h)).unwrap();
        assert!((got - cpu).abs() <= 1e-6 * cpu, "{rows}x{cols}: {got}, CPU {cpu}");
    }
}

#[test]
fn norms_refuse_bad_arguments() {
    let mut norm = f64::NAN;
    let (x, mut workspace) = ([1.0f32; 4], Buffer::workspace(32));
    let good = vlmq_squared_norm_args {
        x: x.as_ptr(),
        h: null(),
        norm: &raw mut norm,
        rows: 2,
        cols: 2,
        workspace: workspace.ptr_mut(),
        workspace_bytes: 8,
    };
    let bad: [fn(&mut vlmq_squared_norm_args); 6] = [
        |a| a.x = null(),
        |a| a.norm = null_mut(),
        |a| a.rows = -1,
        |a| (a.rows, a.cols) = (i64::MAX, 2),
        |a| a.workspace_bytes = 7,
        |a| a.workspace = null_mut(),
    ];
    refused_each("vlmq_squared_norm", &good, &bad);
    accepted("vlmq_squared_norm", &vlmq_squared_norm_args { rows: 0, x: null(), ..good });
    assert_eq!(norm, 0.0, "the sum of nothing");
}

#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn small_cases_pass_under_the_sanitizers() {
    if Variant::current() == Variant::Plain {
        let tests = [
            "products_of_integers_are_exact",
            "permutations_are_the_cpus",
            "norms_are_sums_in_float64",
            "weighted_norms_read_the_upper_triangle",
        ];
        kernels::pass_under_sanitizers(module_path!(), &tests, &[("vlmq_kernels", "kernels")]);
    }
}
