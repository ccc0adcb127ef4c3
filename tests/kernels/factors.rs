//! Matrices to factor, and their factors in float64, for the tests of kernels/factor.

use crate::buffers::{F32, integers, noise};
use std::ops::Range;
use vlmq::device::BLOCK;

/// Ends of blocks of `width` columns, the last narrower.
pub(crate) fn blocks(n: usize, width: usize) -> Vec<i32> {
    (0..n.div_ceil(width)).map(|i| ((i + 1) * width).min(n) as i32).collect()
}

/// The same as ranges of columns.
pub(crate) fn ranges(ends: &[i32]) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts.zip(ends).map(|(start, &end)| start as usize..end as usize).collect()
}

/// The values on and above the diagonal, and below it what the kernels must not read.
pub(crate) fn upper(values: &[f32], n: usize) -> Vec<f32> {
    values.iter().enumerate().map(|(i, &v)| if i / n <= i % n { v } else { f32::NAN }).collect()
}

/// XᵀX/m of inputs whose columns differ in size and lean on one another, damped: condition number about 1e4.
pub(crate) fn hessian(n: usize, damp: f64) -> Vec<f32> {
    let tokens = n + n / 2 + 3;
    let x = noise(F32, tokens * n, 20);
    let size = noise(F32, n, 21);
    let column = |t: usize, j: usize| {
        let own = f64::from(x[t * n + j]);
        let first = f64::from(x[t * n]);
        (own + 0.7 * first) * f64::from(size[j]).exp()
    };
    let columns: Vec<Vec<f64>> = (0..n).map(|j| (0..tokens).map(|t| column(t, j)).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / tokens as f64;
    let mut h = vec![0.0; n * n];
    for i in 0..n {
        for j in i..n {
            h[i * n + j] = dot(&columns[i], &columns[j]);
        }
    }
    let mean = (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64;
    (0..n).for_each(|i| h[i * n + i] += damp * mean);
    h.into_iter().map(|v| v as f32).collect()
}

/// R with H = R·Rᵀ in float64, by the book: column by column from the last, from H's upper triangle.
pub(crate) fn reference_root(h: &[f32], n: usize) -> Vec<f64> {
    let mut r = vec![0.0f64; n * n];
    for j in (0..n).rev() {
        for i in (0..=j).rev() {
            let known: f64 = (j + 1..n).map(|k| r[i * n + k] * r[j * n + k]).sum();
            let left = f64::from(h[i * n + j]) - known;
            r[i * n + j] = if i == j { left.sqrt() } else { left / r[j * n + j] };
        }
    }
    r
}

/// Inverse of the upper triangle of rows and columns `range` of r.
pub(crate) fn reference_inverse(r: &[f64], n: usize, range: Range<usize>) -> Vec<f64> {
    let (width, first) = (range.len(), range.start);
    let at = |i: usize, j: usize| r[(first + i) * n + first + j];
    let mut inverse = vec![0.0; width * width];
    for j in 0..width {
        for i in (0..=j).rev() {
            let known: f64 = (i + 1..=j).map(|k| at(i, k) * inverse[k * width + j]).sum();
            inverse[i * width + j] = (f64::from(u8::from(i == j)) - known) / at(i, i);
        }
    }
    inverse
}

/// Rows of each block holding a matrix of the block, as `inverses` and `products` do.
pub(crate) fn by_blocks(n: usize, ends: &[i32], of: impl Fn(Range<usize>) -> Vec<f64>) -> Vec<f64> {
    let mut all = vec![0.0; n * BLOCK];
    for block in ranges(ends) {
        for (i, row) in of(block.clone()).chunks(block.len()).enumerate() {
            all[(block.start + i) * BLOCK..][..block.len()].copy_from_slice(row);
        }
    }
    all
}

/// R̄ = I + N with N integer, from even rows to odd columns, so that N² = 0, and diag(R) powers of two: all sums are
/// exact, whatever their order.
pub(crate) fn exact_root(n: usize) -> (Vec<f32>, Vec<f32>) {
    let draw = integers(n * n, 22, 12);
    let mut root = vec![0.0; n * n];
    for i in 0..n {
        root[i * n + i] = 1.0;
        for j in i + 1..n {
            if i % 2 == 0 && j % 2 == 1 && draw[i * n + j].abs() <= 2.0 {
                root[i * n + j] = draw[i * n + j];
            }
        }
    }
    let diagonal = integers(n, 23, 1).into_iter().map(f32::exp2).collect();
    (root, diagonal)
}
