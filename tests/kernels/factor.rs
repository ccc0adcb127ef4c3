//! kernels/factor: the factorization, the GPTAQ term and the inverse, on the emulator.

use crate::buffers::{Bits, Buffer, Element, F32, noise};
use crate::calls::{accepted, every_schedule, refused, refused_each};
use crate::factors::{blocks, by_blocks, exact_root, hessian, ranges, reference_inverse, reference_root, upper};
use crate::support::golden::{relative_error, widened};
use crate::support::kernels::{self, Variant};
use std::ptr::{null, null_mut};
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::bindings::*;
use vlmq::device::{BLOCK, Factor, Factored, SolveOps};
use vlmq::tensor::Matrix;

/// Sizes and blocks: odd ones, uneven ones, and one of more than a span of 512 columns.
fn cases() -> Vec<(usize, Vec<i32>)> {
    let mut cases: Vec<_> = [1, 5, 17, 33, 127, 128, 129, 300].map(|n| (n, blocks(n, 128))).to_vec();
    cases.extend([(300, blocks(300, 96)), (70, vec![1, 33, 70]), (530, blocks(530, 96))]);
    match Variant::current() {
        Variant::Plain => cases,
        Variant::Address => vec![(17, vec![17]), (70, vec![1, 33, 70]), (150, blocks(150, 96))],
        Variant::Thread => vec![(5, vec![5]), (40, vec![17, 40])],
    }
}

/// The sizes alone, each once.
fn sizes() -> Vec<usize> {
    let mut sizes: Vec<usize> = cases().into_iter().map(|(n, _)| n).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// What vlmq_factor leaves of h, inverses and diagonal, one behind the other, and the status.
fn outputs(h: &[f32], n: usize, ends: &[i32]) -> (Vec<f32>, i32) {
    let mut status = 77;
    let (mut h, mut inverses) = (Buffer::in_out(F32, h, 0), Buffer::output(F32, n * BLOCK, 0));
    let mut diagonal = Buffer::output(F32, n, 0);
    let mut args = vlmq_factor_args {
        h: h.ptr_mut(),
        inverses: inverses.ptr_mut(),
        diagonal: diagonal.ptr_mut(),
        blocks: ends.as_ptr(),
        block_count: ends.len() as i64,
        n: n as i64,
        status: &raw mut status,
        workspace: null_mut(),
        workspace_bytes: 0,
    };
    args.workspace_bytes = kernels::workspace_bytes("vlmq_factor", &args);
    let mut workspace = Buffer::workspace(args.workspace_bytes);
    args.workspace = workspace.ptr_mut();
    accepted("vlmq_factor", &args);
    workspace.bytes();
    ([h.values(), inverses.values(), diagonal.values()].concat(), status)
}

/// The factor, or the pivot that is named.
fn factor(h: &[f32], n: usize, ends: &[i32]) -> Result<Factor<Matrix>, usize> {
    let mut got = every_schedule(|| {
        let (mut values, status) = outputs(h, n, ends);
        // After a failure the outputs are undefined.
        values.truncate(if status == -1 { values.len() } else { 0 });
        values.push(status as f32);
        values
    });
    let status = got.pop().unwrap();
    if status != -1.0 {
        return Err(status as usize);
    }
    let diagonal = got.split_off(n * n + n * BLOCK);
    let inverses = Matrix::new(n, BLOCK, got.split_off(n * n)).unwrap();
    Ok(Factor { root: Matrix::new(n, n, got).unwrap(), inverses, diagonal: Matrix::row_vector(diagonal) })
}

/// ‖R·Rᵀ − H‖ / ‖H‖ with R = root·diag.
fn backward_error(factor: &Factor<Matrix>, h: &[f32], n: usize) -> f64 {
    let r: Vec<f64> = factor
        .root
        .data()
        .iter()
        .enumerate()
        .map(|(i, &v)| f64::from(v) * f64::from(factor.diagonal.data()[i % n]))
        .collect();
    let (mut difference, mut size) = (0.0, 0.0);
    for i in 0..n {
        for j in i..n {
            let product: f64 = (j..n).map(|k| r[i * n + k] * r[j * n + k]).sum();
            let weight = if i == j { 1.0 } else { 2.0 };
            difference += weight * (product - f64::from(h[i * n + j])).powi(2);
            size += weight * f64::from(h[i * n + j]).powi(2);
        }
    }
    (difference / size).sqrt()
}

fn cpu_factor(h: &[f32], n: usize, ends: &[i32]) -> Factored<Matrix> {
    Cpu.factor(Matrix::new(n, n, h.to_vec()).unwrap(), &ranges(ends)).unwrap()
}

#[test]
fn factors_match_float64_and_the_cpu() {
    for (n, ends) in cases() {
        let h = hessian(n, 1e-3);
        let got = factor(&upper(&h, n), n, &ends).unwrap();
        let error = backward_error(&got, &h, n);
        assert!(error <= 1e-6, "n {n}: H is off by {error:.1e}");

        let r = reference_root(&h, n);
        let unit: Vec<f64> = (0..n * n).map(|i| r[i] / r[i % n * n + i % n]).collect();
        let diagonal: Vec<f64> = (0..n).map(|i| r[i * n + i]).collect();
        let inverses = by_blocks(n, &ends, |block| reference_inverse(&unit, n, block));
        let parts = [
            ("root", got.root.data(), &unit),
            ("inverses", got.inverses.data(), &inverses),
            ("diagonal", got.diagonal.data(), &diagonal),
        ];
        for (name, values, expected) in parts {
            let error = relative_error(values, expected);
            assert!(error <= 1e-5, "n {n}: {name} is off by {error:.1e}");
        }
        let Factored::Done(cpu) = cpu_factor(&h, n, &ends) else { panic!("n {n}: the CPU refuses") };
        for (values, expected) in [(&got.root, &cpu.root), (&got.inverses, &cpu.inverses)] {
            let error = relative_error(values.data(), &widened(expected.data()));
            assert!(error <= 1e-5, "n {n}: {error:.1e} from the CPU");
        }
    }
}

#[test]
fn exact_factors_are_found_exactly() {
    for (n, ends) in cases() {
        let (root, diagonal) = exact_root(n);
        let r: Vec<f32> = root.iter().enumerate().map(|(i, v)| v * diagonal[i % n]).collect();
        let product = |i: usize, j: usize| (0..n).map(|k| r[i * n + k] * r[j * n + k]).sum::<f32>();
        let h: Vec<f32> = (0..n * n).map(|i| product(i / n, i % n)).collect();
        let got = factor(&upper(&h, n), n, &ends).unwrap();
        assert!(got.root.data() == root, "n {n}: root");
        assert!(got.diagonal.data() == diagonal, "n {n}: diagonal");
        let unit = widened(&root);
        let inverses = by_blocks(n, &ends, |block| reference_inverse(&unit, n, block));
        assert!(widened(got.inverses.data()) == inverses, "n {n}: inverses");
    }
}

#[test]
fn the_pivot_that_fails_is_the_cpus() {
    // Pivots at the ends of blocks and panels, and two of them; blocks; the value on the diagonal.
    let all: &[(usize, &[usize], usize, f32)] = &[
        (40, &[3, 30], 17, -1.0),
        (40, &[39], 40, 0.0),
        (70, &[69], 33, f32::NAN),
        (140, &[0], 128, 0.0),
        (140, &[12], 96, f32::INFINITY),
        (300, &[299], 128, -1.0),
        (300, &[255], 128, f32::NAN),
        (300, &[127, 200], 96, -1.0),
        (300, &[40, 41], 128, 0.0),
    ];
    let plain = Variant::current() == Variant::Plain;
    for &(n, places, width, value) in &all[..if plain { all.len() } else { 2 }] {
        let mut h = hessian(n, 1e-3);
        places.iter().for_each(|&i| h[i * n + i] = value);
        let ends = blocks(n, width);
        let Factored::NotPositive { pivot } = cpu_factor(&h, n, &ends) else { panic!("the CPU accepts {places:?}") };
        assert_eq!(pivot, *places.iter().max().unwrap());
        assert_eq!(factor(&upper(&h, n), n, &ends).err(), Some(pivot), "{places:?} {value}, blocks of {width}");
    }
}

#[test]
fn a_pivot_that_an_update_spoils_is_the_cpus() {
    let n = if Variant::current() == Variant::Plain { 200 } else { 40 };
    // Row 30 leans on the last column by more than its own size.
    let mut h = hessian(n, 1e-2);
    h[30 * n + n - 1] = 1.5 * (h[30 * n + 30] * h[n * n - 1]).sqrt();
    let ends = blocks(n, 128);
    let Factored::NotPositive { pivot } = cpu_factor(&h, n, &ends) else { panic!("the CPU accepts") };
    assert_eq!(pivot, 30);
    assert_eq!(factor(&upper(&h, n), n, &ends).err(), Some(30));
}

#[test]
fn nothing_is_done_after_a_failure() {
    let n = if Variant::current() == Variant::Plain { 300 } else { 40 };
    let mut h = hessian(n, 1e-3);
    h[n * n - 1] = -1.0;
    let h = upper(&h, n);
    let (after, status) = outputs(&h, n, &blocks(n, 128));
    assert_eq!(status, (n - 1) as i32);
    assert!(after[..n * n].bits() == h.bits());
    assert!(after[n * n..].iter().all(|v| v.to_bits() == F32.poison().to_bits()));
}

#[test]
fn cross_factors_match_float64_and_the_cpu() {
    for (n, ends) in cases() {
        let (h, c, alpha) = (hessian(n, 1e-3), noise(F32, n * n, 24), 0.25f32);
        let Factored::Done(of) = cpu_factor(&h, n, &ends) else { panic!("n {n}: the CPU refuses") };
        let got = every_schedule(|| {
            let (mut c, mut products) = (Buffer::in_out(F32, &upper(&c, n), 0), Buffer::output(F32, n * BLOCK, 0));
            let args = vlmq_cross_factor_args {
                c: c.ptr_mut(),
                root: of.root.data().as_ptr(),
                inverses: of.inverses.data().as_ptr(),
                diagonal: of.diagonal.data().as_ptr(),
                products: products.ptr_mut(),
                blocks: ends.as_ptr(),
                block_count: ends.len() as i64,
                n: n as i64,
                alpha,
                workspace: null_mut(),
                workspace_bytes: 0,
            };
            assert_eq!(kernels::workspace_bytes("vlmq_cross_factor", &args), 0);
            accepted("vlmq_cross_factor", &args);
            [c.values(), products.values()].concat()
        });
        let (scaled, products) = got.split_at(n * n);

        // The factor as given, so that its own rounding does not count: M = alpha triu(C R^-T, 1) diag(R)^-1.
        let d = widened(of.diagonal.data());
        let r: Vec<f64> = widened(of.root.data()).iter().enumerate().map(|(i, v)| v * d[i % n]).collect();
        let inverse = reference_inverse(&r, n, 0..n);
        let entry = |i: usize, j: usize| -> f64 {
            let sum: f64 = (j..n).map(|k| f64::from(c[i * n + k]) * inverse[j * n + k]).sum();
            if j > i { f64::from(alpha) * sum / d[j] } else { 0.0 }
        };
        let m: Vec<f64> = (0..n * n).map(|index| entry(index / n, index % n)).collect();
        let p = by_blocks(n, &ends, |block| {
            let unit = reference_inverse(&widened(of.root.data()), n, block.clone());
            let width = block.len();
            let at = |i: usize, k: usize| m[(block.start + i) * n + block.start + k];
            let entry = |i: usize, j: usize| (i..=j).map(|k| at(i, k) * unit[k * width + j]).sum();
            (0..width * width).map(|index| entry(index / width, index % width)).collect()
        });
        let cpu = Cpu.cross_factor(Matrix::new(n, n, c.clone()).unwrap(), &of, &ranges(&ends), alpha).unwrap();
        let parts = [("M", scaled, &m, cpu.scaled.data()), ("P", products, &p, cpu.blocks.data())];
        for (name, values, expected, cpu) in parts {
            if n == 1 {
                assert!(values.iter().all(|&v| v == 0.0), "{name} of one column");
                continue;
            }
            let error = relative_error(values, expected);
            assert!(error <= 1e-5, "n {n}: {name} is off by {error:.1e}");
            let error = relative_error(values, &widened(cpu));
            assert!(error <= 1e-5, "n {n}: {name} is {error:.1e} from the CPU's");
        }
    }
}

fn cholesky_inverse(h: &[f32], n: usize, damp: f32) -> (i32, Vec<f32>) {
    let mut status = 77;
    let mut args = vlmq_cholesky_inverse_args {
        h: null_mut(),
        damp,
        n: n as i64,
        status: &raw mut status,
        workspace: null_mut(),
        workspace_bytes: 0,
    };
    args.workspace_bytes = kernels::workspace_bytes("vlmq_cholesky_inverse", &args);
    let values = every_schedule(|| {
        let (mut h, mut workspace) = (Buffer::in_out(F32, h, 0), Buffer::workspace(args.workspace_bytes));
        let args = vlmq_cholesky_inverse_args { h: h.ptr_mut(), workspace: workspace.ptr_mut(), ..args };
        accepted("vlmq_cholesky_inverse", &args);
        workspace.bytes();
        h.values()
    });
    (status, values)
}

#[test]
fn inverse_factors_match_float64() {
    for n in sizes() {
        let (h, damp) = (hessian(n, 0.0), 0.01f32);
        let (status, u) = cholesky_inverse(&upper(&h, n), n, damp);
        assert_eq!(status, -1, "n {n}");
        let mean = (0..n).map(|i| f64::from(h[i * n + i])).sum::<f64>() / n as f64;
        let mut damped = h;
        (0..n).for_each(|i| damped[i * n + i] = (f64::from(damped[i * n + i]) + f64::from(damp) * mean) as f32);
        let expected = reference_inverse(&reference_root(&damped, n), n, 0..n);
        let error = relative_error(&u, &expected);
        assert!(error <= 1e-5, "n {n}: U is off by {error:.1e}");
        assert!((0..n * n).all(|i| i / n <= i % n || u[i] == 0.0), "n {n}: zeros below the diagonal");
    }
}

#[test]
fn exact_inverses_are_found_exactly_and_failures_told() {
    for n in sizes() {
        let (root, diagonal) = exact_root(n);
        let r: Vec<f32> = root.iter().enumerate().map(|(i, v)| v * diagonal[i % n]).collect();
        let product = |i: usize, j: usize| (0..n).map(|k| r[i * n + k] * r[j * n + k]).sum::<f32>();
        let mut h: Vec<f32> = (0..n * n).map(|i| product(i / n, i % n)).collect();
        let (status, u) = cholesky_inverse(&upper(&h, n), n, 0.0);
        assert_eq!(status, -1);
        let inverse = |i: usize| if i / n == i % n { 1.0 } else { -root[i] } / diagonal[i / n];
        assert!((0..n * n).all(|i| u[i] == inverse(i)), "n {n}");
        h[n / 2 * n + n / 2] = -4.0;
        assert_eq!(cholesky_inverse(&upper(&h, n), n, 0.0).0, (n / 2) as i32, "n {n}");
    }
}

#[test]
fn bad_arguments_are_refused() {
    let mut h = Buffer::output(F32, 4, 0);
    let (x, mut status) = ([1.0f32; 4 * BLOCK], 77);
    let mut inverses = Buffer::output(F32, 2 * BLOCK, 0);
    let mut workspace = Buffer::workspace(1 << 20);
    let ends = [1, 2];
    let good = vlmq_factor_args {
        h: h.ptr_mut(),
        inverses: inverses.ptr_mut(),
        diagonal: inverses.ptr_mut(),
        blocks: ends.as_ptr(),
        block_count: 2,
        n: 2,
        status: &raw mut status,
        workspace: workspace.ptr_mut(),
        workspace_bytes: 1 << 20,
    };
    let bad: [fn(&mut vlmq_factor_args); 7] = [
        |a| a.h = null_mut(),
        |a| a.inverses = null_mut(),
        |a| a.diagonal = null_mut(),
        |a| a.status = null_mut(),
        |a| a.workspace = null_mut(),
        |a| a.workspace_bytes = 100,
        |a| a.n = -1,
    ];
    refused_each("vlmq_factor", &good, &bad);
    // Blocks that do not cover the columns.
    for (ends, n) in [(vec![2], 3), (vec![1, 1], 1), (vec![2, 1], 1), (vec![129], 129), (vec![0, 2], 2), (vec![], 2)] {
        let blocks = if ends.is_empty() { null() } else { ends.as_ptr() };
        refused("vlmq_factor", &vlmq_factor_args { blocks, block_count: ends.len() as i64, n, ..good });
        let args = vlmq_cross_factor_args { blocks, block_count: ends.len() as i64, n, ..cross(&mut h, &x, &ends) };
        refused("vlmq_cross_factor", &args);
    }
    assert_eq!(status, 77);
    let good = cross(&mut h, &x, &ends);
    let bad: [fn(&mut vlmq_cross_factor_args); 6] = [
        |a| a.c = null_mut(),
        |a| a.root = null(),
        |a| a.inverses = null(),
        |a| a.diagonal = null(),
        |a| a.products = null_mut(),
        |a| a.n = -1,
    ];
    refused_each("vlmq_cross_factor", &good, &bad);
    accepted("vlmq_cross_factor", &vlmq_cross_factor_args { n: 0, c: null_mut(), ..good });
    let good = vlmq_cholesky_inverse_args {
        h: h.ptr_mut(),
        damp: 0.01,
        n: 2,
        status: &raw mut status,
        workspace: workspace.ptr_mut(),
        workspace_bytes: 1 << 20,
    };
    let bad: [fn(&mut vlmq_cholesky_inverse_args); 7] = [
        |a| a.h = null_mut(),
        |a| a.damp = -0.5,
        |a| a.damp = f32::NAN,
        |a| a.n = -1,
        |a| a.status = null_mut(),
        |a| a.workspace_bytes = 9,
        |a| a.workspace = null_mut(),
    ];
    refused_each("vlmq_cholesky_inverse", &good, &bad);
    accepted("vlmq_cholesky_inverse", &vlmq_cholesky_inverse_args { n: 0, h: null_mut(), ..good });
    assert_eq!(status, -1, "nothing to factor");
    assert!(h.is_untouched() && inverses.is_untouched());
}

fn cross(c: &mut Buffer, x: &[f32], ends: &[i32]) -> vlmq_cross_factor_args {
    vlmq_cross_factor_args {
        c: c.ptr_mut(),
        root: x.as_ptr(),
        inverses: x.as_ptr(),
        diagonal: x.as_ptr(),
        products: c.ptr_mut(),
        blocks: ends.as_ptr(),
        block_count: ends.len() as i64,
        n: 2,
        alpha: 1.0,
        workspace: null_mut(),
        workspace_bytes: 0,
    }
}

#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn small_cases_pass_under_the_sanitizers() {
    if Variant::current() == Variant::Plain {
        let tests = [
            "factors_match_float64_and_the_cpu",
            "the_pivot_that_fails_is_the_cpus",
            "cross_factors_match_float64_and_the_cpu",
            "inverse_factors_match_float64",
        ];
        kernels::pass_under_sanitizers(module_path!(), &tests, &[("vlmq_kernels", "kernels")]);
    }
}
