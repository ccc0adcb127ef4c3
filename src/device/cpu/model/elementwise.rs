//! Norms, rotary embedding, nonlinearities and row reductions, threads over rows.

use crate::device::cpu::vector::{dispatch, dot, erfc, exp, sum};
use crate::device::{Activation, Rotary};
use crate::parallel::{each_chunk, map};
use crate::tensor::Matrix;
use anyhow::{Result, ensure};

/// Values a thread takes at a time in elementwise work.
const TILE: usize = 16 * 1024;

pub(super) fn add_assign(x: &mut Matrix, y: &Matrix) -> Result<()> {
    same_shape(x, y)?;
    each_chunk(x.data_mut(), TILE, |i, x| {
        for (x, y) in x.iter_mut().zip(&y.data()[i * TILE..]) {
            *x += y;
        }
    });
    Ok(())
}

pub(super) fn scaled_difference(a: &Matrix, b: &Matrix, factor: f32) -> Result<Matrix> {
    same_shape(a, b)?;
    let mut y = a.clone();
    each_chunk(y.data_mut(), TILE, |i, a| {
        for (a, b) in a.iter_mut().zip(&b.data()[i * TILE..]) {
            *a = factor * (*a - b);
        }
    });
    Ok(y)
}

pub(super) fn rms_norm(x: &Matrix, weight: &Matrix, eps: f32) -> Result<Matrix> {
    ensure!(weight.cols() == x.cols(), "norm of {} channels on {}", weight.cols(), x.cols());
    let mut y = x.clone();
    each_row(&mut y, |_, row| {
        let scale = 1.0 / (dot(row, row) / row.len() as f32 + eps).sqrt();
        for (value, weight) in row.iter_mut().zip(weight.data()) {
            *value = *value * scale * weight;
        }
    });
    Ok(y)
}

pub(super) fn rms_norm_backward(x: &Matrix, weight: &Matrix, d_out: &Matrix, eps: f32) -> Result<Matrix> {
    ensure!(weight.cols() == x.cols(), "norm of {} channels on {}", weight.cols(), x.cols());
    same_shape(x, d_out)?;
    let mut d_x = d_out.clone();
    let cols = x.cols().max(1);
    each_row(&mut d_x, |i, row| {
        let x = x.row(i);
        for (value, weight) in row.iter_mut().zip(weight.data()) {
            *value *= weight;
        }
        let scale = 1.0 / (dot(x, x) / cols as f32 + eps).sqrt();
        let along = scale * scale * (dot(row, x) / cols as f32);
        for (value, x) in row.iter_mut().zip(x) {
            *value = scale * (*value - x * along);
        }
    });
    Ok(d_x)
}

pub(super) fn layer_norm(x: &Matrix, weight: &Matrix, bias: &Matrix, eps: f32) -> Result<Matrix> {
    ensure!(weight.cols() == x.cols() && bias.cols() == x.cols(), "norm of {} channels on {}", weight.cols(), x.cols());
    let mut y = x.clone();
    each_row(&mut y, |_, row| {
        let mean = sum(row, |x| x) / row.len() as f32;
        for value in row.iter_mut() {
            *value -= mean;
        }
        let scale = 1.0 / (dot(row, row) / row.len() as f32 + eps).sqrt();
        for ((value, weight), bias) in row.iter_mut().zip(weight.data()).zip(bias.data()) {
            *value = *value * scale * weight + bias;
        }
    });
    Ok(y)
}

/// Rotates pairs (i, i + head_dim/2) of every head; the transpose of a rotation turns the other way.
pub(super) fn rotate(x: &mut Matrix, rotary: &Rotary<Matrix>, transposed: bool) -> Result<()> {
    let half = rotary.cos.cols();
    ensure!(
        rotary.cos.rows() == x.rows() && half > 0 && x.cols().is_multiple_of(2 * half),
        "rotary table of {}x{half} on {}x{}",
        rotary.cos.rows(),
        x.rows(),
        x.cols()
    );
    let direction = if transposed { -1.0 } else { 1.0 };
    let cols = x.cols();
    each_chunk(x.data_mut(), cols, |token, row| {
        let (cos, sin) = (rotary.cos.row(token), rotary.sin.row(token));
        for head in row.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b, sin) = (low[i], high[i], direction * sin[i]);
                low[i] = a * cos[i] - b * sin;
                high[i] = b * cos[i] + a * sin;
            }
        }
    });
    Ok(())
}

pub(super) fn activate(x: &Matrix, activation: Activation) -> Matrix {
    let mut y = x.clone();
    each_chunk(y.data_mut(), TILE, |_, values| activate_tile(values, activation));
    y
}

pub(super) fn gated(gate: &Matrix, up: &Matrix, activation: Activation) -> Result<Matrix> {
    same_shape(gate, up)?;
    let mut y = gate.clone();
    each_chunk(y.data_mut(), TILE, |i, y| {
        activate_tile(y, activation);
        for (y, up) in y.iter_mut().zip(&up.data()[i * TILE..]) {
            *y *= up;
        }
    });
    Ok(y)
}

pub(super) fn mean_abs_rows(x: &Matrix) -> Vec<f32> {
    let cols = x.cols().max(1);
    map(x.rows(), |row| sum(x.row(row), f32::abs) / cols as f32)
}

fn activate_tile(values: &mut [f32], activation: Activation) {
    // One loop a nonlinearity, so that none has a choice inside.
    dispatch(|| match activation {
        Activation::Silu => each(values, |x| x / (1.0 + exp(-x))),
        Activation::QuickGelu => each(values, |x| x / (1.0 + exp(-1.702 * x))),
        // As 1 + erf a value near x = -4 would keep three digits.
        Activation::Gelu => each(values, |x| 0.5 * x * erfc(-x * std::f32::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => {
            // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), without the cancellation.
            const SCALE: f32 = -2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
            each(values, |x| x / (1.0 + exp(SCALE * (x + 0.044715 * x * x * x))))
        }
    });
}

#[inline(always)]
fn each(values: &mut [f32], f: impl Fn(f32) -> f32) {
    for value in values {
        *value = f(*value);
    }
}

fn each_row(x: &mut Matrix, work: impl Fn(usize, &mut [f32]) + Sync) {
    let cols = x.cols();
    each_chunk(x.data_mut(), cols, work);
}

fn same_shape(a: &Matrix, b: &Matrix) -> Result<()> {
    ensure!(
        a.rows() == b.rows() && a.cols() == b.cols(),
        "{}x{} against {}x{}",
        a.rows(),
        a.cols(),
        b.rows(),
        b.cols()
    );
    Ok(())
}
