//! Matrix products over fixed row tiles.

use crate::device::cpu::gemm::{View, ViewMut, gemm};
use crate::device::cpu::vector::{dispatch, dot};
use crate::tensor::Matrix;
use anyhow::{Result, ensure};
use rayon::prelude::*;

/// Rows a thread takes at a time. The right operand is packed again for each tile, so the taller the better, as long as
/// there are enough tiles for many cores.
fn tile_rows(rows: usize) -> usize {
    (rows / 16).next_multiple_of(64).clamp(64, 256)
}

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
        y.data_mut().par_chunks_mut(outputs.max(1)).for_each(|row| row.copy_from_slice(bias.data()));
    }
    if x.rows() <= FEW_ROWS {
        few_rows(x, weight, &mut y);
    } else {
        row_tiles(x, View::from(weight).t(), &mut y);
    }
    Ok(y)
}

/// `a · b`.
pub(super) fn matmul(a: &Matrix, b: &Matrix) -> Result<Matrix> {
    ensure!(a.cols() == b.rows(), "{}x{} times {}x{}", a.rows(), a.cols(), b.rows(), b.cols());
    let mut y = Matrix::zeros(a.rows(), b.cols());
    row_tiles(a, View::from(b), &mut y);
    Ok(y)
}

/// `y += a · b`, threads over tiles of rows.
fn row_tiles(a: &Matrix, b: View<'_>, y: &mut Matrix) {
    let (inner, outputs) = (a.cols(), y.cols());
    if outputs == 0 || inner == 0 {
        return;
    }
    let tile = tile_rows(a.rows());
    y.data_mut().par_chunks_mut(tile * outputs).zip(a.data().par_chunks(tile * inner)).for_each(|(y, a)| {
        let rows = y.len() / outputs;
        gemm(1.0, View::new(a, rows, inner, inner), b, 1.0, ViewMut::new(y, rows, outputs, outputs));
    });
}

/// `y += x · weightᵀ` for a handful of rows, threads over tiles of outputs.
fn few_rows(x: &Matrix, weight: &Matrix, y: &mut Matrix) {
    let (rows, inner, outputs) = (x.rows(), x.cols(), weight.rows());
    if inner == 0 {
        return;
    }
    let tiles: Vec<Vec<f32>> = weight
        .data()
        .par_chunks(FEW_ROWS_TILE * inner)
        .map(|tile| {
            let mut sums = Vec::with_capacity(tile.len() / inner * rows);
            dispatch(|| {
                for w in tile.chunks_exact(inner) {
                    for row in 0..rows {
                        sums.push(dot(x.row(row), w));
                    }
                }
            });
            sums
        })
        .collect();
    for (output, sums) in tiles.iter().flat_map(|tile| tile.chunks_exact(rows)).enumerate() {
        for (row, sum) in sums.iter().enumerate() {
            y.data_mut()[row * outputs + output] += sum;
        }
    }
}
