//! Products over slabs of rows.

use super::SLAB;
use crate::device::cpu::gemm::{View, ViewMut, gemm};
use crate::device::{Factor, ProductRange};
use crate::tensor::Matrix;
use rayon::prelude::*;
use std::ops::Range;

/// Rows that one task takes of a product over many columns. The other operand is packed anew for each task, so the
/// taller the better (a fifth of the time at 128 rows), as long as there are enough tasks for many cores.
fn slab_rows(rows: usize) -> usize {
    (rows / 16).next_multiple_of(64).clamp(SLAB, 512)
}

/// Columns of a product that are squared and summed at a time.
const STRIP: usize = 512;

/// View of `rows` and `columns` of a matrix.
pub(super) fn part(x: &Matrix, rows: Range<usize>, columns: Range<usize>) -> View<'_> {
    part_of(x.data(), x.cols(), rows, columns)
}

/// The same of a row-major slice, rows `stride` apart.
pub(super) fn part_of(data: &[f32], stride: usize, rows: Range<usize>, columns: Range<usize>) -> View<'_> {
    if rows.is_empty() || columns.is_empty() {
        return View::new(&[], rows.len(), columns.len(), stride);
    }
    View::new(&data[rows.start * stride + columns.start..], rows.len(), columns.len(), stride)
}

/// `c = beta·c + a·b` on the columns and rows of `range`.
pub(super) fn add_product(c: &mut Matrix, a: &Matrix, b: &Matrix, range: &ProductRange, beta: f32) {
    let (cols, height) = (c.cols(), slab_rows(c.rows()));
    c.data_mut().par_chunks_mut(height * cols).enumerate().for_each(|(slab, out)| {
        let rows = out.len() / cols;
        let first = slab * height;
        gemm(
            1.0,
            part(a, first..first + rows, range.inner.clone()),
            part(b, range.inner.clone(), range.columns.clone()),
            beta,
            ViewMut::new(&mut out[range.target..], rows, range.columns.len(), cols),
        );
    });
}

/// `‖x·R‖²`, or `‖x‖²` without a factor. The product is made strip by strip and never stored.
pub(super) fn squared_norm(x: &Matrix, factor: Option<&Factor<Matrix>>) -> f64 {
    let height = slab_rows(x.rows());
    let slabs = x.rows().div_ceil(height);
    let sums: Vec<f64> = (0..slabs)
        .into_par_iter()
        .map(|slab| {
            let rows = slab * height..((slab + 1) * height).min(x.rows());
            let Some(factor) = factor else {
                return x.data()[rows.start * x.cols()..rows.end * x.cols()]
                    .iter()
                    .map(|&v| f64::from(v) * f64::from(v))
                    .sum();
            };
            let mut product = vec![0.0; rows.len() * STRIP];
            let mut sum = 0.0;
            for first in (0..x.cols()).step_by(STRIP) {
                let strip = first..(first + STRIP).min(x.cols());
                gemm(
                    1.0,
                    part(x, rows.clone(), 0..strip.end),
                    part(&factor.root, 0..strip.end, strip.clone()),
                    0.0,
                    ViewMut::new(&mut product, rows.len(), strip.len(), STRIP),
                );
                for row in product.chunks(STRIP) {
                    sum += scaled_square_sum(&row[..strip.len()], &factor.diagonal[strip.clone()]);
                }
            }
            sum
        })
        .collect();
    sums.iter().sum()
}

/// `Σ (x_j · d_j)²`.
pub(super) fn scaled_square_sum(x: &[f32], d: &[f32]) -> f64 {
    x.iter().zip(d).map(|(&x, &d)| (f64::from(x) * f64::from(d)).powi(2)).sum()
}
