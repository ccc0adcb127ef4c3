//! `H += Uᵀ·diag(g²)·U` and `C += (F−U)ᵀ·diag(g²)·U`.

use crate::device::cpu::gemm::{View, ViewMut, gemm};
use crate::tensor::Matrix;
use rayon::prelude::*;

/// Tokens whose products are summed in one go. Sums of more would lose digits; fewer would only cost traffic.
const TOKENS: usize = 512;

/// Rows of H and C that one task takes: as tall as pays for packing U anew, short enough to feed many cores.
fn slab_rows(features: usize) -> usize {
    if features >= 2048 { 256 } else { 64 }
}

/// See [`SolveOps::accumulate_statistics`](crate::device::SolveOps::accumulate_statistics).
pub(super) fn accumulate(
    hessian: &mut Matrix,
    mut cross: Option<&mut Matrix>,
    u: &Matrix,
    f: Option<&Matrix>,
    g: Option<&[f32]>,
) {
    let features = u.cols();
    let live: Vec<usize> = match g {
        Some(g) => (0..u.rows()).filter(|&token| g[token] != 0.0).collect(),
        None => (0..u.rows()).collect(),
    };
    for tokens in live.chunks(TOKENS) {
        let weights: Option<Vec<f32>> = g.map(|g| tokens.iter().map(|&token| g[token] * g[token]).collect());
        let gathered: Vec<f32>;
        // Tokens that follow each other are read where they lie.
        let inputs = if tokens[tokens.len() - 1] - tokens[0] + 1 == tokens.len() {
            &u.data()[tokens[0] * features..(tokens[0] + tokens.len()) * features]
        } else {
            gathered = tokens.iter().flat_map(|&token| u.row(token)).copied().collect();
            &gathered
        };
        let weight = |token: usize| weights.as_ref().map_or(1.0, |weights| weights[token]);
        add_outer(hessian, inputs, true, |token, columns, row| {
            let from = &inputs[token * features..][columns];
            row.iter_mut().zip(from).for_each(|(value, u)| *value = weight(token) * u);
        });
        if let (Some(cross), Some(f)) = (cross.as_deref_mut(), f) {
            add_outer(cross, inputs, false, |token, columns, row| {
                let (f, u) = (&f.row(tokens[token])[columns.clone()], &inputs[token * features..][columns]);
                row.iter_mut().zip(f.iter().zip(u)).for_each(|(value, (f, u))| *value = weight(token) * (f - u));
            });
        }
    }
}

/// `out += Leftᵀ·Right`, `left` writing some columns of one token's row of Left: slab by slab of `out`'s rows, from the
/// diagonal on where only the `upper` triangle is wanted.
fn add_outer<L>(out: &mut Matrix, right: &[f32], upper: bool, left: L)
where
    L: Fn(usize, std::ops::Range<usize>, &mut [f32]) + Sync,
{
    let features = out.cols();
    let tokens = right.len() / features;
    let slab = slab_rows(features);
    out.data_mut().par_chunks_mut(slab * features).enumerate().for_each(|(index, out)| {
        let rows = out.len() / features;
        let first = index * slab;
        let mut scaled = vec![0.0; tokens * rows];
        for (token, row) in scaled.chunks_mut(rows).enumerate() {
            left(token, first..first + rows, row);
        }
        let from = if upper { first } else { 0 };
        gemm(
            1.0,
            View::new(&scaled, tokens, rows, rows).t(),
            View::new(&right[from..], tokens, features - from, features),
            1.0,
            ViewMut::new(&mut out[from..], rows, features - from, features),
        );
    });
}
