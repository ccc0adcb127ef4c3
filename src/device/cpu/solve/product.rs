//! Products over slabs of rows.

use crate::device::cpu::gemm::View;
use crate::device::cpu::packed::{Packed, TILE};
use crate::device::{Factor, ProductRange};
use crate::tensor::Matrix;
use rayon::prelude::*;
use std::ops::Range;

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

/// `c += a·b` on the columns and rows of `range`.
pub(super) fn add_product(c: &mut Matrix, a: &Matrix, b: &Matrix, range: &ProductRange) {
    let cols = c.cols();
    let packed = Packed::new(b, range.inner.clone(), range.columns.clone());
    c.data_mut().par_chunks_mut(TILE * cols).enumerate().for_each(|(tile, out)| {
        let rows = out.len() / cols;
        let from = &a.data()[tile * TILE * a.cols() + range.inner.start..];
        packed.add_to(1.0, from, a.cols(), &mut out[range.target..], cols, rows);
    });
}

/// `‖x·R‖²`, or `‖x‖²` without a factor. The product is made strip by strip and never stored.
pub(super) fn squared_norm(x: &Matrix, factor: Option<&Factor<Matrix>>) -> f64 {
    let Some(factor) = factor else {
        let sums: Vec<f64> =
            x.data().par_chunks(1 << 14).map(|part| part.iter().map(|&v| f64::from(v).powi(2)).sum()).collect();
        return sums.iter().sum();
    };
    let mut total = 0.0;
    for first in (0..x.cols()).step_by(STRIP) {
        let strip = first..(first + STRIP).min(x.cols());
        let packed = Packed::new(&factor.root, 0..strip.end, strip.clone());
        let tiles = x.data().par_chunks(TILE * x.cols());
        let sums: Vec<f64> = tiles
            .map(|tile| {
                let rows = tile.len() / x.cols();
                let mut product = vec![0.0; rows * strip.len()];
                packed.add_to(1.0, tile, x.cols(), &mut product, strip.len(), rows);
                let diagonal = &factor.diagonal[strip.clone()];
                product.chunks(strip.len()).map(|row| scaled_square_sum(row, diagonal)).sum()
            })
            .collect();
        total += sums.iter().sum::<f64>();
    }
    total
}

/// `Σ (x_j · d_j)²`.
pub(super) fn scaled_square_sum(x: &[f32], d: &[f32]) -> f64 {
    x.iter().zip(d).map(|(&x, &d)| (f64::from(x) * f64::from(d)).powi(2)).sum()
}
