//! `H += Uᵀ·diag(g²)·U` and `C += (F−U)ᵀ·diag(g²)·U`.

use crate::device::LayerInputs;
use crate::device::cpu::gemm::{Strided, StridedMut, gemm, packing_bytes};
use crate::parallel::each_chunk;
use crate::tensor::Matrix;
use std::ops::Range;

/// Tokens that enter H and C with one rounding to float32. Their products are summed in float64, at half the speed:
/// codes hang on the digits of H. With the 316 tokens of the solver's goldens summed in float32 (2e-7 off instead of
/// 3e-8), 41 of the 565 cases differ somewhere from the float64 solve, instead of 19.
const TOKENS: usize = 1024;

/// Columns of the tiles that H and C are cut into.
const TILE: usize = 512;

/// Rows of the tiles: as tall as pays for packing the inputs anew, in more pieces than cores.
pub(in crate::device::cpu) fn tile(features: usize) -> usize {
    if features >= 2048 { 256 } else { 64 }
}

/// Bytes that [`accumulate`] takes: inputs of some tokens in float64, and, on each of `threads` threads, their scaled part of a
/// tile's width, a tile of sums and what is packed.
pub(in crate::device::cpu) fn workspace(tokens: usize, features: usize, threads: u64) -> u64 {
    let (tokens, height) = (tokens.min(TOKENS), tile(features).min(features));
    let one = 8 * (tokens * height + height * TILE) as u64 + packing_bytes(tokens, TILE, 8);
    8 * (tokens * features) as u64 + threads * one
}

/// Adds some tokens to statistics, see [`SolveOps::accumulate_statistics`](crate::device::SolveOps::accumulate_statistics).
pub(super) fn accumulate(hessian: &mut Matrix, mut cross: Option<&mut Matrix>, inputs: &LayerInputs<'_, Matrix>) {
    let &LayerInputs { u, f, g } = inputs;
    let features = u.cols();
    let live: Vec<usize> = match g {
        Some(g) => (0..u.rows()).filter(|&token| g[token] != 0.0).collect(),
        None => (0..u.rows()).collect(),
    };
    for tokens in live.chunks(TOKENS) {
        let weights: Vec<f64> = tokens.iter().map(|&token| g.map_or(1.0, |g| f64::from(g[token]).powi(2))).collect();
        let mut inputs = vec![0.0f64; tokens.len() * features];
        each_chunk(&mut inputs, features, |i, row| {
            row.iter_mut().zip(u.row(tokens[i])).for_each(|(value, &u)| *value = f64::from(u));
        });
        add_outer(hessian, &inputs, true, |token, columns, row| {
            let from = &inputs[token * features..][columns];
            row.iter_mut().zip(from).for_each(|(value, u)| *value = weights[token] * u);
        });
        if let (Some(cross), Some(f)) = (cross.as_deref_mut(), f) {
            add_outer(cross, &inputs, false, |token, columns, row| {
                let (f, u) = (&f.row(tokens[token])[columns.clone()], &inputs[token * features..][columns]);
                row.iter_mut()
                    .zip(f.iter().zip(u))
                    .for_each(|(value, (&f, u))| *value = weights[token] * (f64::from(f) - u));
            });
        }
    }
}

/// `out += Leftᵀ·Right`, `left` writing some columns of one token's row of Left: row of tiles by row of tiles, from the
/// diagonal on where only the `upper` triangle is wanted.
fn add_outer<L>(out: &mut Matrix, right: &[f64], upper: bool, left: L)
where
    L: Fn(usize, Range<usize>, &mut [f64]) + Sync,
{
    let features = out.cols();
    let tokens = right.len() / features;
    let height = tile(features);
    each_chunk(out.data_mut(), height * features, |index, out| {
        let rows = out.len() / features;
        let first = index * height;
        let mut scaled = vec![0.0; tokens * rows];
        for (token, row) in scaled.chunks_mut(rows).enumerate() {
            left(token, first..first + rows, row);
        }
        let mut sum = vec![0.0; rows * TILE];
        let from = if upper { first } else { 0 };
        for columns in (from..features).step_by(TILE).map(|first| first..(first + TILE).min(features)) {
            gemm(
                1.0,
                Strided::new(&scaled, tokens, rows, rows).t(),
                Strided::new(&right[columns.start..], tokens, columns.len(), features),
                0.0,
                StridedMut::new(&mut sum, rows, columns.len(), TILE),
            );
            for (row, sum) in out.chunks_mut(features).zip(sum.chunks(TILE)) {
                for (value, &sum) in row[columns.clone()].iter_mut().zip(sum) {
                    *value = (f64::from(*value) + sum) as f32;
                }
            }
        }
    });
}
