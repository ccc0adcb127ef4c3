//! Products of activations by weights.

use crate::device::cpu::strips::{Rows, RowsMut, Strips};
use crate::device::cpu::vector::{dispatch, dot};
use crate::parallel::{each_chunk, map};
use crate::tensor::Matrix;
use anyhow::{Result, ensure};
use std::ops::Range;

/// Columns of the right operand that are packed at a time: enough to pay for laying out the rows that run over them,
/// few enough for their sums to stay in cache.
const STRIP: usize = 512;

/// Up to this many rows (decoding steps) plain dot products that read each weight once beat packing the weights.
const FEW_ROWS: usize = 4;

/// Weight rows a thread takes at a time in that case.
const FEW_ROWS_TILE: usize = 64;

/// `x · weightᵀ + bias`.
pub(super) fn linear(x: &Matrix, weight: &Matrix, bias: Option<&Matrix>) -> Result<Matrix> {
    ensure!(
        x.cols() == weight.cols(),
        "input of {} channels meets a weight of {}x{}",
        x.cols(),
        weight.rows(),
        weight.cols()
    );
    if let Some(bias) = bias {
        ensure!(bias.cols() == weight.rows(), "bias of {} values for {} outputs", bias.cols(), weight.rows());
    }
    let outputs = weight.rows();
    let mut y = Matrix::zeros(x.rows(), outputs);
    if let Some(bias) = bias {
        each_chunk(y.data_mut(), outputs, |_, row| row.copy_from_slice(bias.data()));
    }
    if x.rows() <= FEW_ROWS {
        few_rows(x, weight, &mut y);
    } else {
        add_product(x, &mut y, |outputs| Strips::transposed(weight, outputs, 0..weight.cols()));
    }
    Ok(y)
}

/// `a · b`.
pub(super) fn matmul(a: &Matrix, b: &Matrix) -> Result<Matrix> {
    ensure!(a.cols() == b.rows(), "{}x{} times {}x{}", a.rows(), a.cols(), b.rows(), b.cols());
    let mut y = Matrix::zeros(a.rows(), b.cols());
    add_product(a, &mut y, |columns| Strips::new(b, 0..b.rows(), columns));
    Ok(y)
}

/// `y += a · b`, `strips` giving some columns of b; threads over tiles of rows.
fn add_product(a: &Matrix, y: &mut Matrix, strips: impl Fn(Range<usize>) -> Strips) {
    let (inner, outputs) = (a.cols(), y.cols());
    if outputs == 0 || inner == 0 {
        return;
    }
    for first in (0..outputs).step_by(STRIP) {
        let strips = strips(first..(first + STRIP).min(outputs));
        let (a, y) = (Rows { data: a.data(), stride: inner }, RowsMut { data: y.data_mut(), stride: outputs });
        strips.add_product(1.0, a, y, first);
    }
}

/// `y += x · weightᵀ` for a handful of rows, threads over tiles of outputs.
fn few_rows(x: &Matrix, weight: &Matrix, y: &mut Matrix) {
    let (rows, inner, outputs) = (x.rows(), x.cols(), weight.rows());
    if inner == 0 {
        return;
    }
    let tiles: Vec<&[f32]> = weight.data().chunks(FEW_ROWS_TILE * inner).collect();
    let tiles = map(tiles.len(), |i| {
        let mut sums = Vec::with_capacity(tiles[i].len() / inner * rows);
        dispatch(|| {
            for w in tiles[i].chunks_exact(inner) {
                for row in 0..rows {
                    sums.push(dot(x.row(row), w));
                }
            }
        });
        sums
    });
    for (output, sums) in tiles.iter().flat_map(|tile| tile.chunks_exact(rows)).enumerate() {
        for (row, sum) in sums.iter().enumerate() {
            y.data_mut()[row * outputs + output] += sum;
        }
    }
}
