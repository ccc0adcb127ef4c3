//! Products over slabs of rows.

use crate::device::ProductRange;
use crate::device::cpu::gemm::Strided;
use crate::device::cpu::strips::{Rows, RowsMut, Strips};
use crate::device::cpu::vector::{LANES, dispatch};
use crate::parallel::{each_chunk, map};
use crate::tensor::Matrix;
use std::ops::Range;

/// Columns of a product that are made and summed at a time.
const STRIP: usize = 512;

/// View of `rows` and `columns` of a matrix.
pub(super) fn part(x: &Matrix, rows: Range<usize>, columns: Range<usize>) -> Strided<'_> {
    part_of(x.data(), x.cols(), rows, columns)
}

/// Part of a row-major slice, rows `stride` apart.
pub(super) fn part_of(data: &[f32], stride: usize, rows: Range<usize>, columns: Range<usize>) -> Strided<'_> {
    if rows.is_empty() || columns.is_empty() {
        return Strided::new(&[], rows.len(), columns.len(), stride);
    }
    Strided::new(&data[rows.start * stride + columns.start..], rows.len(), columns.len(), stride)
}

/// `c += a·b` on the columns and rows of `range`.
pub(super) fn add_product(c: &mut Matrix, a: &Matrix, b: &Matrix, range: &ProductRange) {
    let cols = c.cols();
    let strips = Strips::new(b, range.inner.clone(), range.columns.clone());
    let a = Rows { data: &a.data()[range.inner.start..], stride: a.cols() };
    strips.add_product(1.0, a, RowsMut { data: c.data_mut(), stride: cols }, range.target);
}

/// The squared norm `‖x‖²`.
pub(super) fn squared_norm(x: &Matrix) -> f64 {
    let parts: Vec<&[f32]> = x.data().chunks(1 << 14).collect();
    map(parts.len(), |i| dispatch(|| dot_in_f64(parts[i], parts[i]))).iter().sum()
}

/// `tr(x·H·xᵀ) = Σ x ∘ (2·x·triu(H) − x·diag(H))`, from the upper triangle of H, strip by strip of its columns.
pub(super) fn weighted_squared_norm(x: &Matrix, h: &Matrix) -> f64 {
    let (rows, features) = (x.rows(), x.cols());
    let mut product = Matrix::zeros(rows, STRIP.min(features));
    let mut total = 0.0;
    for strip in (0..features).step_by(STRIP).map(|first| first..(first + STRIP).min(features)) {
        let width = product.cols();
        each_chunk(product.data_mut(), width, |_, row| row.fill(0.0));
        let to = RowsMut { data: product.data_mut(), stride: width };
        let strips = Strips::upper_triangle(h, strip.clone());
        strips.add_product(2.0, Rows { data: x.data(), stride: features }, to, 0);
        let diagonal: Vec<f32> = strip.clone().map(|i| h.row(i)[i]).collect();
        let sums = map(rows, |row| {
            let x = &x.row(row)[strip.clone()];
            let mut scaled = x.to_vec();
            scaled.iter_mut().zip(product.row(row)).zip(&diagonal).for_each(|((x, p), d)| *x = p - *x * d);
            dispatch(|| dot_in_f64(x, &scaled))
        });
        total += sums.iter().sum::<f64>();
    }
    total
}

/// `Σ (x_j · d_j)²`, in as many partial sums as a reduction has.
#[inline(always)]
pub(super) fn scaled_square_sum(x: &[f32], d: &[f32]) -> f64 {
    let mut sums = [0.0f64; LANES];
    for (x, d) in x.chunks(LANES).zip(d.chunks(LANES)) {
        for ((sum, &x), &d) in sums.iter_mut().zip(x).zip(d) {
            let scaled = f64::from(x) * f64::from(d);
            *sum += scaled * scaled;
        }
    }
    sums.iter().sum()
}

/// `Σ x_j · y_j` in float64.
#[inline(always)]
fn dot_in_f64(x: &[f32], y: &[f32]) -> f64 {
    let mut sums = [0.0f64; LANES];
    for (x, y) in x.chunks(LANES).zip(y.chunks(LANES)) {
        for ((sum, &x), &y) in sums.iter_mut().zip(x).zip(y) {
            *sum += f64::from(x) * f64::from(y);
        }
    }
    sums.iter().sum()
}
