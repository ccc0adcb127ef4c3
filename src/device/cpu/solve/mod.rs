//! Solver operations on the CPU: rows of a layer are independent, so every operation hands fixed slabs of rows to
//! rayon and single-thread products do the rest.

mod factor;
mod lanes;
mod product;
mod quantize_block;
mod search;
mod statistics;
mod tile;

pub(super) use statistics::{tile as statistics_tile, workspace as statistics_workspace};

use super::Cpu;
use crate::device::{
    BlockCodes, BlockShape, ColumnBlock, CrossFactor, Factor, Factored, GridRule, Group, GroupGrid, LayerInputs,
    PermuteSymmetric, ProductRange, SolveOps, SolveState,
};
use crate::parallel::each_chunk;
use crate::tensor::Matrix;
use anyhow::Result;
use std::ops::Range;

/// Rows that one task takes. Fixed, because the products' rounding may depend on it; 128 rows are enough to pay for
/// packing the other operand and few enough to feed many cores.
const SLAB: usize = 128;

impl SolveOps for Cpu {
    type Codes = Vec<BlockCodes>;

    fn room_for_codes(&self, _: usize, blocks: &[BlockShape]) -> Result<Vec<BlockCodes>> {
        Ok(Vec::with_capacity(blocks.len()))
    }

    fn take_codes(&self, codes: Vec<BlockCodes>, _: &GridRule) -> Result<Vec<BlockCodes>> {
        Ok(codes)
    }

    fn permute_columns(&self, weight: &Matrix, order: &[u32], dead: &[usize]) -> Result<Matrix> {
        let mut alive = vec![true; order.len()];
        dead.iter().for_each(|&i| alive[i] = false);
        let mut out = Matrix::zeros(weight.rows(), weight.cols());
        each_chunk(out.data_mut(), order.len(), |r, row| {
            for (value, &column) in row.iter_mut().zip(order) {
                let column = column as usize;
                *value = if alive[column] { weight.row(r)[column] } else { 0.0 };
            }
        });
        Ok(out)
    }

    fn accumulate_statistics(
        &self,
        hessian: &mut Matrix,
        cross: Option<&mut Matrix>,
        inputs: &LayerInputs<'_, Matrix>,
    ) -> Result<()> {
        statistics::accumulate(hessian, cross, inputs);
        Ok(())
    }

    fn diagonal(&self, x: &Matrix) -> Result<Vec<f32>> {
        Ok((0..x.rows()).map(|i| x.row(i)[i]).collect())
    }

    fn permute_symmetric(&self, x: &Matrix, how: PermuteSymmetric<'_>) -> Result<Matrix> {
        // Where the order turns a pair around, the value is read down a column: sixteen rows at a time take neighbours of
        // it from the same cache lines.
        const ROWS: usize = 16;
        let (n, order) = (x.cols(), how.order);
        let mut out = Matrix::zeros(n, n);
        each_chunk(out.data_mut(), ROWS * n, |tile, rows| {
            let first = tile * ROWS;
            for j in first..n {
                let b = order[j] as usize;
                for (row, &a) in rows.chunks_mut(n).zip(&order[first..=j]) {
                    let a = a as usize;
                    row[j] = x.row(a.min(b))[a.max(b)];
                }
            }
            for (i, row) in (first..).zip(rows.chunks_mut(n)) {
                row[i] = how.diagonal[order[i] as usize];
            }
        });
        Ok(out)
    }

    fn permute(&self, x: &Matrix, order: &[u32]) -> Result<Matrix> {
        let mut out = Matrix::zeros(x.rows(), x.cols());
        each_chunk(out.data_mut(), x.cols(), |i, row| {
            let from = x.row(order[i] as usize);
            for (value, &b) in row[i..].iter_mut().zip(&order[i..]) {
                *value = from[b as usize];
            }
        });
        Ok(out)
    }

    fn factor(&self, h: Matrix, blocks: &[Range<usize>]) -> Result<Factored<Matrix>> {
        Ok(factor::factor(h, blocks))
    }

    fn cross_factor(
        &self,
        c: Matrix,
        factor: &Factor<Matrix>,
        blocks: &[Range<usize>],
        alpha: f32,
    ) -> Result<CrossFactor<Matrix>> {
        Ok(factor::cross_factor(c, factor, blocks, alpha))
    }

    fn add_product(&self, c: &mut Matrix, a: &Matrix, b: &Matrix, range: &ProductRange) -> Result<()> {
        product::add_product(c, a, b, range);
        Ok(())
    }

    fn squared_norm(&self, x: &Matrix) -> Result<f64> {
        Ok(product::squared_norm(x))
    }

    fn weighted_squared_norm(&self, x: &Matrix, h: &Matrix) -> Result<f64> {
        Ok(product::weighted_squared_norm(x, h))
    }

    fn group_grid(&self, state: &SolveState<Matrix>, group: &Group<'_, Matrix>) -> Result<GroupGrid> {
        quantize_block::group_grid(state, group)
    }

    fn quantize_block(
        &self,
        block: &ColumnBlock<'_, Matrix>,
        state: &mut SolveState<Matrix>,
        codes: &mut Vec<BlockCodes>,
    ) -> Result<()> {
        codes.push(quantize_block::quantize_block(block, state)?);
        Ok(())
    }
}
