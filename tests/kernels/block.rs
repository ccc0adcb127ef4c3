//! Norms, rotary embedding, nonlinearities and sums of `kernels/decoder`, against the CPU device.

use crate::activations::{assert_rounded_once, lengths, matrix};
use crate::buffers::{BF16, Buffer, DTYPES, F32, integers, noise, rounded};
use crate::calls::{accepted, every_schedule, refused};
use crate::support::kernels::{Variant, pass_under_sanitizers};
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::bindings::*;
use vlmq::device::{Activation, ModelOps, Rotary};

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
}

impl Norm<'_> {
    fn run(&self, dtype: vlmq_dtype, shift: usize) -> Vec<f32> {
        let cols = self.weight.len();
        let x = Buffer::input(dtype, self.x, shift);
        let weight = Buffer::input(dtype, self.weight, 0);
        let bias = self.bias.map(|bias| Buffer::input(dtype, bias, 0));
        let outputs = every_schedule(|| {
            let mut y = Buffer::output(dtype, self.x.len(), shift);
            accepted(
                "vlmq_norm",
                &vlmq_norm_args {
                    x: x.ptr(),
                    weight: weight.ptr(),
                    bias: bias.as_ref().map_or(std::ptr::null(), Buffer::ptr),
                    y: y.ptr_mut(),
                    rows: (self.x.len() / cols) as i64,
                    cols: cols as i64,
                    eps: self.eps,
                    dtype,
                },
            );
            vec![y]
        });
        outputs[0].values()
    }
}

#[test]
fn norms() {
    for dtype in DTYPES {
        for &cols in lengths() {
            for (rows, shift) in [(1, 0), (5, 0), (5, 1)] {
                let x: Vec<f32> = noise(dtype, rows * cols, 1).iter().map(|x| rounded(dtype, x * 3.0 + 1.0)).collect();
                let (weight, bias) = (noise(dtype, cols, 2), noise(dtype, cols, 3));
                let what = format!("{dtype:?} {rows}x{cols} shift {shift}");
                let (xm, wm, bm) = (matrix(rows, cols, &x), matrix(1, cols, &weight), matrix(1, cols, &bias));
                let rms = Norm { x: &x, weight: &weight, bias: None, eps: 1e-6 }.run(dtype, shift);
                assert_rounded_once(dtype, &rms, Cpu.rms_norm(&xm, &wm, 1e-6).unwrap().data(), 1e-6, &what);
                let layer = Norm { x: &x, weight: &weight, bias: Some(&bias), eps: 1e-5 }.run(dtype, shift);
                assert_rounded_once(dtype, &layer, Cpu.layer_norm(&xm, &wm, &bm, 1e-5).unwrap().data(), 2e-6, &what);
            }
        }
    }
}

fn norm_backward([x, weight, d_y]: [&[f32]; 3], eps: f32, dtype: vlmq_dtype, shift: usize) -> Vec<f32> {
    let cols = weight.len();
    let [x_buffer, d_y_buffer] = [x, d_y].map(|values| Buffer::input(dtype, values, shift));
    let weight = Buffer::input(dtype, weight, 0);
    let outputs = every_schedule(|| {
        let mut d_x = Buffer::output(dtype, x.len(), shift);
        accepted(
            "vlmq_norm_backward",
            &vlmq_norm_backward_args {
                x: x_buffer.ptr(),
                weight: weight.ptr(),
                d_y: d_y_buffer.ptr(),
                d_x: d_x.ptr_mut(),
                rows: (x.len() / cols) as i64,
                cols: cols as i64,
                eps,
                dtype,
            },
        );
        vec![d_x]
    });
    outputs[0].values()
}

/// The gradient in float64, from the derivative of `weight ∘ x · (mean(x²) + eps)^-½` term by term.
fn exact_norm_gradient([x, weight, d_y]: [&[f32]; 3], eps: f32) -> Vec<f32> {
    let cols = weight.len();
    let wide = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
    let weight = wide(weight);
    let rows = x.chunks(cols).zip(d_y.chunks(cols)).flat_map(|(x, d_y)| {
        let (x, d_y) = (wide(x), wide(d_y));
        let power = x.iter().map(|x| x * x).sum::<f64>() / cols as f64 + f64::from(eps);
        let along: f64 = (0..cols).map(|j| weight[j] * d_y[j] * x[j]).sum();
        let gradient = (0..cols)
            .map(|i| weight[i] * d_y[i] * power.powf(-0.5) - along * x[i] / cols as f64 * power.powf(-1.5))
            .map(|value| value as f32);
        gradient.collect::<Vec<_>>()
    });
    rows.collect()
}

#[test]
fn norm_gradients() {
    for dtype in DTYPES {
        for &cols in lengths() {
            for (rows, shift) in [(1, 0), (5, 0), (5, 1)] {
                let x: Vec<f32> = noise(dtype, rows * cols, 1).iter().map(|x| rounded(dtype, x * 3.0 + 1.0)).collect();
                let (weight, d_y) = (noise(dtype, cols, 2), noise(dtype, rows * cols, 3));
                let found = norm_backward([&x, &weight, &d_y], 0.5, dtype, shift);
                let what = format!("{dtype:?} {rows}x{cols} shift {shift}");
                let exact = exact_norm_gradient([&x, &weight, &d_y], 0.5);
                // Rows of one or two elements are nearly constant under the norm: what is left of their gradients cancels.
                let slack = if cols <= 2 { 1e-5 } else { 2e-6 };
                assert_rounded_once(dtype, &found, &exact, slack, &what);
                let (xm, dm) = (matrix(rows, cols, &x), matrix(rows, cols, &d_y));
                let twin = Cpu.rms_norm_backward(&xm, &matrix(1, cols, &weight), &dm, 0.5).unwrap();
                assert_rounded_once(F32, twin.data(), &exact, slack, &what);
            }
        }
    }
}

/// Of signs the mean square is 1; where weight and gradient are whole and their sum along x is a multiple of the row's
/// length, nothing rounds.
#[test]
fn norm_gradients_of_signs_are_exact() {
    for dtype in DTYPES {
        let (rows, cols) = (3, 64);
        let x: Vec<f32> = (0..rows * cols).map(|i| if i % 3 == 0 { 1.0 } else { -1.0 }).collect();
        let weight: Vec<f32> = (0..cols).map(|i| (i % 5) as f32 - 2.0).collect();
        let d_y = integers(rows * cols, 5, 28);
        let found = norm_backward([&x, &weight, &d_y], 0.0, dtype, 0);
        let expected = (0..rows * cols).map(|i| {
            let row = i / cols * cols;
            let along: f32 = (0..cols).map(|j| weight[j] * d_y[row + j] * x[row + j]).sum();
            rounded(dtype, weight[i % cols] * d_y[i] - x[i] * along / cols as f32)
        });
        assert_eq!(found, expected.collect::<Vec<_>>(), "{dtype:?}");
    }
}

/// Signs have mean square 1, and as many of each mean 0: nothing rounds.
#[test]
fn norms_of_signs_are_exact() {
    for dtype in DTYPES {
        let x: Vec<f32> = (0..3 * 48).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let weight: Vec<f32> = (0..48).map(|i| i as f32 - 20.0).collect();
        let rms = Norm { x: &x, weight: &weight, bias: None, eps: 0.0 }.run(dtype, 0);
        let layer = Norm { x: &x, weight: &weight, bias: Some(&weight), eps: 0.0 }.run(dtype, 0);
        for (i, x) in x.iter().enumerate() {
            assert_eq!(rms[i], x * weight[i % 48]);
            assert_eq!(layer[i], x * weight[i % 48] + weight[i % 48]);
        }
    }
}

/// Where the mean is a thousand deviations, sum(x²) − mean² would leave no digit of the variance.
#[test]
fn layer_norm_far_from_zero() {
    let dtype = F32;
    let x: Vec<f32> = noise(dtype, 2 * 1000, 4).iter().map(|x| x + 4096.0).collect();
    let (weight, bias) = (vec![1.0; 1000], vec![0.0; 1000]);
    let y = Norm { x: &x, weight: &weight, bias: Some(&bias), eps: 0.0 }.run(dtype, 0);
    for (row, y) in x.chunks(1000).zip(y.chunks(1000)) {
        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / 1000.0;
        let deviation = (row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 1000.0).sqrt();
        for (&x, &y) in row.iter().zip(y) {
            assert!(((f64::from(x) - mean) / deviation - f64::from(y)).abs() < 1e-3);
        }
    }
}

/// A norm is the longest row that one block walks: the widest layer of the models in use.
#[test]
fn norm_of_the_longest_row() {
    let (dtype, cols) = (BF16, 29568);
    let (x, weight) = (noise(dtype, cols, 5), noise(dtype, cols, 6));
    let y = Norm { x: &x, weight: &weight, bias: None, eps: 1e-6 }.run(dtype, 0);
    let expected = Cpu.rms_norm(&matrix(1, cols, &x), &matrix(1, cols, &weight), 1e-6).unwrap();
    assert_rounded_once(dtype, &y, expected.data(), 1e-6, "longest row");
}

#[test]
fn rotary_embedding() {
    for dtype in DTYPES {
        for (tokens, heads, head_dim) in [(1, 1, 2), (3, 2, 16), (17, 4, 64), (5, 3, 40), (2, 1, 72), (3, 28, 128)] {
            for (shift, transposed) in [(0, false), (0, true), (1, false)] {
                let half = head_dim / 2;
                let x = noise(dtype, tokens * heads * head_dim, 7);
                let angles = noise(F32, tokens * half, 8);
                let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
                let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
                let (cos_buffer, sin_buffer) = (Buffer::input(F32, &cos, 0), Buffer::input(F32, &sin, shift));
                let outputs = every_schedule(|| {
                    let mut y = Buffer::in_out(dtype, &x, shift);
                    accepted(
                        "vlmq_rotate",
                        &vlmq_rotate_args {
                            x: y.ptr_mut(),
                            cos: cos_buffer.ptr(),
                            sin: sin_buffer.ptr(),
                            tokens: tokens as i64,
                            heads: heads as i64,
                            head_dim: head_dim as i64,
                            transposed: transposed.into(),
                            dtype,
                        },
                    );
                    vec![y]
                });
                let rotary = Rotary { cos: matrix(tokens, half, &cos), sin: matrix(tokens, half, &sin) };
                let mut expected = matrix(tokens, heads * head_dim, &x);
                Cpu.rotate(&mut expected, &rotary, transposed).unwrap();
                let what = format!("{dtype:?} {tokens} x {heads} x {head_dim}");
                assert_rounded_once(dtype, &outputs[0].values(), expected.data(), 1e-7, &what);
            }
        }
    }
}

#[test]
fn activations() {
    let pairs = [
        (vlmq_activation::VLMQ_SILU, Activation::Silu),
        (vlmq_activation::VLMQ_GELU, Activation::Gelu),
        (vlmq_activation::VLMQ_GELU_TANH, Activation::GeluTanh),
        (vlmq_activation::VLMQ_QUICK_GELU, Activation::QuickGelu),
    ];
    for dtype in DTYPES {
        for &count in lengths() {
            for (activation, twin) in pairs {
                for (gated, in_place, shift) in [(false, false, 0), (true, true, 0), (true, false, 1)] {
                    // The first is near -4, where a GELU made of 1 + erf would have lost its digits.
                    let mut x: Vec<f32> = noise(dtype, count, 9).iter().map(|x| rounded(dtype, 4.0 * x)).collect();
                    if count > 1 {
                        x[1] = -60.0; // exp(60) is finite, exp(1.702 * 60) is not
                    }
                    let up = noise(dtype, count, 10);
                    let (x_buffer, up_buffer) = (Buffer::input(dtype, &x, shift), Buffer::input(dtype, &up, shift));
                    let outputs = every_schedule(|| {
                        let mut y = if in_place {
                            Buffer::in_out(dtype, &x, shift)
                        } else {
                            Buffer::output(dtype, count, shift)
                        };
                        let from = if in_place { y.ptr() } else { x_buffer.ptr() };
                        let up = if gated { up_buffer.ptr() } else { std::ptr::null() };
                        let args =
                            vlmq_activate_args { x: from, up, y: y.ptr_mut(), count: count as i64, activation, dtype };
                        accepted("vlmq_activate", &args);
                        vec![y]
                    });
                    let xm = matrix(1, count, &x);
                    let expected = if gated {
                        Cpu.gated(&xm, &matrix(1, count, &up), twin).unwrap()
                    } else {
                        Cpu.activate(&xm, twin).unwrap()
                    };
                    let what = format!("{dtype:?} {count} {twin:?} gated {gated}");
                    assert_rounded_once(dtype, &outputs[0].values(), expected.data(), 1e-6, &what);
                }
            }
        }
    }
}

#[test]
fn sums() {
    for dtype in DTYPES {
        for &cols in lengths() {
            for (rows, b_rows, shift, in_place, float_a) in [
                (1, 1, 0, false, false),
                (3, 3, 0, true, false),
                (5, 1, 0, false, false),
                (3, 1, 1, true, false),
                (5, 1, 0, false, true),
                (3, 3, 1, false, true),
            ] {
                for (sign, factor) in [(1.0, 1.0), (-1.0, 0.5)] {
                    // Sums and halves of these no type rounds.
                    let (a, b) = (integers(rows * cols, 11, 28), integers(b_rows * cols, 12, 28));
                    let a_buffer = Buffer::input(if float_a { F32 } else { dtype }, &a, shift);
                    let b_buffer = Buffer::input(dtype, &b, shift);
                    let outputs = every_schedule(|| {
                        let mut out = if in_place {
                            Buffer::in_out(dtype, &a, shift)
                        } else {
                            Buffer::output(dtype, rows * cols, shift)
                        };
                        let from = if in_place { out.ptr() } else { a_buffer.ptr() };
                        accepted(
                            "vlmq_add",
                            &vlmq_add_args {
                                a: from,
                                b: b_buffer.ptr(),
                                out: out.ptr_mut(),
                                rows: rows as i64,
                                b_rows: b_rows as i64,
                                cols: cols as i64,
                                sign,
                                factor,
                                dtype,
                                float_a: float_a.into(),
                            },
                        );
                        vec![out]
                    });
                    let expected: Vec<f32> =
                        (0..rows * cols).map(|i| factor * (a[i] + sign * b[i % (b_rows * cols)])).collect();
                    assert_eq!(outputs[0].values(), expected, "{dtype:?} {rows}+{b_rows}x{cols}");
                }
            }
        }
    }
}

/// Against the CPU device on values that do round.
#[test]
fn sums_round_once() {
    for (a_dtype, dtype) in DTYPES.into_iter().flat_map(|dtype| [(dtype, dtype), (F32, dtype)]) {
        let (a, b) = (noise(a_dtype, 1000, 13), noise(dtype, 1000, 14));
        let (a_buffer, b_buffer) = (Buffer::input(a_dtype, &a, 0), Buffer::input(dtype, &b, 0));
        let mut out = Buffer::output(dtype, 1000, 0);
        accepted(
            "vlmq_add",
            &vlmq_add_args {
                a: a_buffer.ptr(),
                b: b_buffer.ptr(),
                out: out.ptr_mut(),
                rows: 10,
                b_rows: 10,
                cols: 100,
                sign: -1.0,
                factor: 0.3,
                dtype,
                float_a: (a_dtype == F32).into(),
            },
        );
        let expected = Cpu.scaled_difference(&matrix(10, 100, &a), &matrix(10, 100, &b), 0.3).unwrap();
        let expected: Vec<f32> = expected.data().iter().map(|&x| rounded(dtype, x)).collect();
        assert_eq!(out.values(), expected, "{dtype:?}");
    }
}

#[test]
fn bad_arguments() {
    let dtype = F32;
    let mut space: [f32; 64] = std::array::from_fn(|i| i as f32);
    let before = space;
    let (x, y) = (space.as_ptr().cast(), space.as_mut_ptr().cast());
    let null = std::ptr::null();
    // More than C++ may read as the enum.
    let unknown = vlmq_dtype(7);

    let norm = vlmq_norm_args { x, weight: x, bias: null, y, rows: 1, cols: 4, eps: 0.0, dtype };
    for bad in [
        vlmq_norm_args { rows: -1, ..norm },
        vlmq_norm_args { cols: -1, ..norm },
        vlmq_norm_args { dtype: unknown, ..norm },
        vlmq_norm_args { x: null, ..norm },
        vlmq_norm_args { weight: null, ..norm },
        vlmq_norm_args { y: std::ptr::null_mut(), ..norm },
    ] {
        refused("vlmq_norm", &bad);
    }
    accepted("vlmq_norm", &vlmq_norm_args { rows: 0, x: null, ..norm });

    let backward = vlmq_norm_backward_args { x, weight: x, d_y: x, d_x: y, rows: 1, cols: 4, eps: 0.0, dtype };
    for bad in [
        vlmq_norm_backward_args { rows: -1, ..backward },
        vlmq_norm_backward_args { cols: -1, ..backward },
        vlmq_norm_backward_args { dtype: unknown, ..backward },
        vlmq_norm_backward_args { x: null, ..backward },
        vlmq_norm_backward_args { weight: null, ..backward },
        vlmq_norm_backward_args { d_y: null, ..backward },
        vlmq_norm_backward_args { d_x: std::ptr::null_mut(), ..backward },
    ] {
        refused("vlmq_norm_backward", &bad);
    }
    accepted("vlmq_norm_backward", &vlmq_norm_backward_args { rows: 0, x: null, ..backward });

    let table = space.as_ptr();
    let rotate =
        vlmq_rotate_args { x: y, cos: table, sin: table, tokens: 1, heads: 1, head_dim: 4, transposed: 0, dtype };
    for bad in [
        vlmq_rotate_args { head_dim: 3, ..rotate },
        vlmq_rotate_args { tokens: -1, ..rotate },
        vlmq_rotate_args { heads: -1, ..rotate },
        vlmq_rotate_args { dtype: unknown, ..rotate },
        vlmq_rotate_args { cos: std::ptr::null(), ..rotate },
    ] {
        refused("vlmq_rotate", &bad);
    }
    accepted("vlmq_rotate", &vlmq_rotate_args { tokens: 0, x: std::ptr::null_mut(), ..rotate });

    let activate = vlmq_activate_args { x, up: null, y, count: 4, activation: vlmq_activation::VLMQ_SILU, dtype };
    for bad in [
        vlmq_activate_args { count: -1, ..activate },
        vlmq_activate_args { activation: vlmq_activation(4), ..activate },
        vlmq_activate_args { dtype: unknown, ..activate },
        vlmq_activate_args { x: null, ..activate },
    ] {
        refused("vlmq_activate", &bad);
    }
    accepted("vlmq_activate", &vlmq_activate_args { count: 0, x: null, ..activate });

    let (sign, factor) = (1.0, 1.0);
    let add = vlmq_add_args { a: x, b: x, out: y, rows: 4, b_rows: 4, cols: 4, sign, factor, dtype, float_a: 0 };
    for bad in [
        vlmq_add_args { b_rows: 2, ..add },
        vlmq_add_args { rows: -1, b_rows: -1, ..add },
        vlmq_add_args { dtype: unknown, ..add },
        vlmq_add_args { b: null, ..add },
    ] {
        refused("vlmq_add", &bad);
    }
    accepted("vlmq_add", &vlmq_add_args { rows: 0, b_rows: 0, a: null, ..add });
    assert_eq!(space, before);
}

#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn clean_under_sanitizers() {
    if Variant::current() == Variant::Plain {
        let tests = ["norms", "norm_gradients", "rotary_embedding", "activations", "sums", "bad_arguments"];
        pass_under_sanitizers(module_path!(), &tests, &[("vlmq_kernels", "kernels")]);
    }
}
