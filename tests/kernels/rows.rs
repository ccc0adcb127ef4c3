//! Rows by index, magnitudes of rows, values that are not finite, and conversions of `kernels/decoder`, against the CPU
//! device.

use crate::activations::{assert_rounded_once, lengths, matrix};
use crate::buffers::{BF16, Buffer, DTYPES, Element, F16, F32, integers, noise, rounded};
use crate::calls::{accepted, every_schedule, refused};
use crate::support::kernels::{Variant, pass_under_sanitizers};
use half::{bf16, f16};
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::bindings::*;
use vlmq::device::{Device, ModelOps, SolveOps};

#[test]
fn rows_by_index() {
    // Rows of 2 to 7168 bytes: each width of access, and rows longer than a block.
    for dtype in DTYPES {
        for &cols in lengths() {
            for (scatter, shift) in [(false, 0), (true, 0), (false, 1), (true, 1)] {
                let (small, large) = (5, 9);
                let indices: Vec<u32> = if scatter { vec![7, 0, 3, 8, 1] } else { vec![8, 8, 0, 3, 5] };
                let (from, to) = if scatter { (small, large) } else { (large, small) };
                let table = noise(dtype, from * cols, 15);
                let before = noise(dtype, to * cols, 16);
                let table_buffer = Buffer::input(dtype, &table, shift);
                let outputs = every_schedule(|| {
                    let mut out = Buffer::in_out(dtype, &before, shift);
                    accepted(
                        "vlmq_gather_rows",
                        &vlmq_gather_rows_args {
                            table: table_buffer.ptr(),
                            indices: indices.as_ptr(),
                            out: out.ptr_mut(),
                            rows: small as i64,
                            row_bytes: (cols * dtype.size()) as i64,
                            scatter: scatter.into(),
                        },
                    );
                    vec![out]
                });
                let expected = if scatter {
                    let mut target = matrix(to, cols, &before);
                    Cpu.scatter_rows(&mut target, &indices, &matrix(from, cols, &table)).unwrap();
                    target
                } else {
                    Cpu.gather_rows(&matrix(from, cols, &table), &indices).unwrap()
                };
                assert_eq!(outputs[0].values(), expected.data(), "{dtype:?} {cols} scatter {scatter} shift {shift}");
            }
        }
    }
}

#[test]
fn columns_in_processing_order() {
    for dtype in DTYPES {
        for &cols in lengths() {
            for (rows, shift, dead) in [(1, 0, vec![]), (11, 0, vec![0, cols - 1]), (5, 1, vec![cols / 2])] {
                let x = noise(dtype, rows * cols, 31);
                // A step that shares no factor with the columns visits each of them once.
                let step = [7, 11, 13].into_iter().find(|step| !cols.is_multiple_of(*step)).unwrap();
                let order: Vec<u32> = (0..cols).map(|place| ((place * step + 3) % cols) as u32).collect();
                let from: Vec<i32> =
                    order.iter().map(|&c| if dead.contains(&(c as usize)) { -1 } else { c as i32 }).collect();
                let x_buffer = Buffer::input(dtype, &x, shift);
                let outputs = every_schedule(|| {
                    let mut out = Buffer::output(F32, rows * cols, shift);
                    let args = vlmq_permute_columns_args {
                        x: x_buffer.ptr(),
                        order: from.as_ptr(),
                        out: out.ptr_mut(),
                        rows: rows as i64,
                        cols: cols as i64,
                        dtype,
                    };
                    accepted("vlmq_permute_columns", &args);
                    vec![out]
                });
                let expected = Cpu.permute_columns(&matrix(rows, cols, &x), &order, &dead).unwrap();
                assert_eq!(outputs[0].values(), expected.data(), "{dtype:?} {rows}x{cols} shift {shift}");
            }
        }
    }
}

#[test]
fn mean_magnitudes() {
    for dtype in DTYPES {
        for &cols in lengths() {
            for (rows, shift, exact) in [(1, 0, true), (6, 0, false), (3, 1, true)] {
                let x = if exact { integers(rows * cols, 17, 28) } else { noise(dtype, rows * cols, 17) };
                let x_buffer = Buffer::input(dtype, &x, shift);
                let outputs = every_schedule(|| {
                    let mut means = Buffer::output(F32, rows, 0);
                    let args = vlmq_mean_abs_rows_args {
                        x: x_buffer.ptr(),
                        means: means.ptr_mut(),
                        rows: rows as i64,
                        cols: cols as i64,
                        dtype,
                    };
                    accepted("vlmq_mean_abs_rows", &args);
                    vec![means]
                });
                let expected = Cpu.mean_abs_rows(&matrix(rows, cols, &x)).unwrap().into_data();
                let slack = if exact { 0.0 } else { 1e-6 };
                assert_rounded_once(F32, &outputs[0].values(), &expected, slack, &format!("{dtype:?} {rows}x{cols}"));
            }
        }
    }
}

#[test]
fn scaled_squares() {
    for dtype in DTYPES {
        for &cols in lengths() {
            for (rows, shift, exact) in [(1, 0, true), (6, 0, false), (3, 1, true)] {
                let x = if exact { integers(rows * cols, 3, 28) } else { noise(dtype, rows * cols, 17) };
                let scales: Vec<f32> = (0..cols).map(|col| [1.0, 0.0, 2.0, 0.5][col % 4]).collect();
                let (x_buffer, scale_buffer) = (Buffer::input(dtype, &x, shift), Buffer::input(F32, &scales, shift));
                let outputs = every_schedule(|| {
                    let mut sums = Buffer::output(F32, rows, 0);
                    let args = vlmq_scaled_squares_rows_args {
                        x: x_buffer.ptr(),
                        scales: scale_buffer.ptr(),
                        sums: sums.ptr_mut(),
                        rows: rows as i64,
                        cols: cols as i64,
                        dtype,
                    };
                    accepted("vlmq_scaled_squares_rows", &args);
                    vec![sums]
                });
                let expected = Cpu.scaled_squares_rows(&matrix(rows, cols, &x), &scales).unwrap();
                let slack = if exact { 0.0 } else { 1e-6 };
                assert_rounded_once(F32, &outputs[0].values(), &expected, slack, &format!("{dtype:?} {rows}x{cols}"));
            }
        }
    }
}

#[test]
fn first_row_that_is_not_finite() {
    for dtype in DTYPES {
        for &cols in lengths() {
            for (bad, shift) in
                [(vec![], 0), (vec![(6, f32::NAN), (4, f32::INFINITY)], 0), (vec![(0, f32::NEG_INFINITY)], 1)]
            {
                let mut x = noise(dtype, 7 * cols, 18);
                x[0] = if dtype == F16 { 65504.0 } else { 3.3e38 };
                for &(row, value) in &bad {
                    x[row * cols + (row * 31) % cols] = value;
                }
                let x_buffer = Buffer::input(dtype, &x, shift);
                for before in [i32::MAX, 2] {
                    let mut row = [before, -7];
                    let args = vlmq_first_non_finite_row_args {
                        x: x_buffer.ptr(),
                        row: row.as_mut_ptr(),
                        rows: 7,
                        cols: cols as i64,
                        dtype,
                    };
                    accepted("vlmq_first_non_finite_row", &args);
                    let found = bad.iter().map(|&(row, _)| row as i32).min().unwrap_or(i32::MAX);
                    assert_eq!(row, [found.min(before), -7], "{dtype:?} {cols} {bad:?}");
                }
            }
        }
    }
}

#[test]
fn conversions() {
    for from in DTYPES {
        for to in DTYPES {
            for &count in lengths() {
                for shift in [0, 1] {
                    let mut x: Vec<f32> = noise(from, count, 19).iter().map(|x| rounded(from, x * 3000.0)).collect();
                    // Beyond f16, below its normal numbers, a tie of bf16, infinity.
                    for (x, special) in x.iter_mut().skip(1).zip([70000.0, 3.1e-7, 257.0 / 256.0, f32::INFINITY]) {
                        *x = rounded(from, special);
                    }
                    let x_buffer = Buffer::input(from, &x, shift);
                    let mut out = Buffer::output(to, count, shift);
                    let args =
                        vlmq_convert_args { x: x_buffer.ptr(), out: out.ptr_mut(), count: count as i64, from, to };
                    accepted("vlmq_convert", &args);
                    let expected: Vec<f32> = x.iter().map(|&x| rounded(to, x)).collect();
                    assert_eq!(out.values(), expected, "{from:?} -> {to:?} {count}");
                }
            }
        }
    }
}

/// Every value of a 16-bit type survives the way to float32 and back.
#[test]
fn conversions_of_all_values() {
    let every: Vec<u16> = (0..=u16::MAX).collect();
    for (dtype, nan) in [
        (BF16, (|bits| bf16::from_bits(bits).is_nan()) as fn(u16) -> bool),
        (F16, |bits| f16::from_bits(bits).is_nan()),
    ] {
        let mut wide = vec![0f32; every.len()];
        let mut back = vec![0u16; every.len()];
        let count = every.len() as i64;
        let widen =
            vlmq_convert_args { x: every.as_ptr().cast(), out: wide.as_mut_ptr().cast(), count, from: dtype, to: F32 };
        accepted("vlmq_convert", &widen);
        let narrow =
            vlmq_convert_args { x: wide.as_ptr().cast(), out: back.as_mut_ptr().cast(), count, from: F32, to: dtype };
        accepted("vlmq_convert", &narrow);
        for (&bits, &back) in every.iter().zip(&back) {
            assert!(back == bits || (nan(bits) && nan(back)), "{dtype:?} {bits:#x} -> {back:#x}");
        }
    }
}

#[test]
fn bad_arguments() {
    let dtype = F32;
    let mut space: [f32; 64] = std::array::from_fn(|i| if i == 1 { f32::INFINITY } else { i as f32 });
    let before = space;
    let (x, y) = (space.as_ptr().cast(), space.as_mut_ptr().cast());
    let null = std::ptr::null();
    // More than C++ may read as the enum.
    let unknown = vlmq_dtype(7);

    let indices = [0u32];
    let gather =
        vlmq_gather_rows_args { table: x, indices: indices.as_ptr(), out: y, rows: 1, row_bytes: 8, scatter: 0 };
    for bad in [
        vlmq_gather_rows_args { row_bytes: 3, ..gather },
        vlmq_gather_rows_args { rows: -1, ..gather },
        vlmq_gather_rows_args { table: x.wrapping_byte_add(1), ..gather },
        vlmq_gather_rows_args { indices: std::ptr::null(), ..gather },
    ] {
        refused("vlmq_gather_rows", &bad);
    }
    accepted("vlmq_gather_rows", &vlmq_gather_rows_args { rows: 0, table: null, ..gather });

    let mean = vlmq_mean_abs_rows_args { x, means: y.cast(), rows: 1, cols: 4, dtype };
    for bad in [
        vlmq_mean_abs_rows_args { cols: -1, ..mean },
        vlmq_mean_abs_rows_args { dtype: unknown, ..mean },
        vlmq_mean_abs_rows_args { means: std::ptr::null_mut(), ..mean },
    ] {
        refused("vlmq_mean_abs_rows", &bad);
    }

    let squares = vlmq_scaled_squares_rows_args { x, scales: x.cast(), sums: y.cast(), rows: 1, cols: 4, dtype };
    for bad in [
        vlmq_scaled_squares_rows_args { cols: -1, ..squares },
        vlmq_scaled_squares_rows_args { dtype: unknown, ..squares },
        vlmq_scaled_squares_rows_args { scales: std::ptr::null(), ..squares },
        vlmq_scaled_squares_rows_args { sums: std::ptr::null_mut(), ..squares },
    ] {
        refused("vlmq_scaled_squares_rows", &bad);
    }

    let mut row = i32::MAX;
    let finite = vlmq_first_non_finite_row_args { x, row: &mut row, rows: 1, cols: 4, dtype };
    for bad in [
        vlmq_first_non_finite_row_args { rows: 1 << 31, ..finite },
        vlmq_first_non_finite_row_args { cols: -1, ..finite },
        vlmq_first_non_finite_row_args { dtype: unknown, ..finite },
        vlmq_first_non_finite_row_args { x: null, ..finite },
    ] {
        refused("vlmq_first_non_finite_row", &bad);
    }
    assert_eq!(row, i32::MAX);

    let convert = vlmq_convert_args { x, out: y, count: 4, from: dtype, to: F16 };
    for bad in [
        vlmq_convert_args { count: -1, ..convert },
        vlmq_convert_args { to: unknown, ..convert },
        vlmq_convert_args { from: unknown, ..convert },
        vlmq_convert_args { out: std::ptr::null_mut(), ..convert },
    ] {
        refused("vlmq_convert", &bad);
    }

    let order = [3, 2, 1, 0];
    let permute = vlmq_permute_columns_args { x, order: order.as_ptr(), out: y.cast(), rows: 1, cols: 4, dtype };
    for bad in [
        vlmq_permute_columns_args { rows: -1, ..permute },
        vlmq_permute_columns_args { cols: 1 << 31, ..permute },
        vlmq_permute_columns_args { dtype: unknown, ..permute },
        vlmq_permute_columns_args { dtype: vlmq_dtype(3), ..permute },
        vlmq_permute_columns_args { order: std::ptr::null(), ..permute },
    ] {
        refused("vlmq_permute_columns", &bad);
    }
    assert_eq!(space, before);
}

#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn clean_under_sanitizers() {
    if Variant::current() == Variant::Plain {
        let tests = [
            "rows_by_index",
            "mean_magnitudes",
            "scaled_squares",
            "first_row_that_is_not_finite",
            "conversions",
            "bad_arguments",
        ];
        pass_under_sanitizers(module_path!(), &tests, &[("vlmq_kernels", "kernels")]);
    }
}
