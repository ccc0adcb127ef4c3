//! The grid of a group by what it does to the layer: candidates are solved with, and the one of least loss is taken.

use super::lanes::{self, Column, LANES, Lane, LaneGrid};
use crate::device::{CrossFactor, Factor, GridRule, LOSS_SHRINKS, LOSS_STRETCHES};
use crate::tensor::Matrix;
use pulp::Simd;
use std::array;
use std::ops::Range;

/// Columns whose errors are carried on to later ones in one go: each later column is read and written once for all of
/// them. Any number gives the same bits.
const PANEL: usize = 8;

/// Candidates that are solved with side by side: a column waits for the one before it, and others' fill the time.
const TOGETHER: usize = 4;

/// What the loss of a group's solve is made of.
pub(super) struct LossTerms<'a> {
    pub(super) factor: &'a Factor<Matrix>,
    pub(super) cross: Option<&'a CrossFactor<Matrix>>,
    /// The group's columns, cut where blocks end: errors are not carried from one part to the next.
    pub(super) parts: &'a [Part],
}

/// Columns of a group that lie in one block.
pub(super) struct Part {
    /// First column of the block.
    pub(super) block: usize,
    /// The columns.
    pub(super) columns: Range<usize>,
}

impl Part {
    /// The part's columns of row `i` of its own in a matrix of diagonal blocks.
    fn row<'a>(&self, blocks: &'a Matrix, i: usize) -> &'a [f32] {
        &blocks.row(self.columns.start + i)[self.columns.start - self.block..self.columns.end - self.block]
    }
}

/// The candidate of least loss, see [`Grid::Loss`](crate::device::Grid::Loss), for each of sixteen rows. `now`: the group's
/// weights as they are before its first column is quantized. Without terms, the loss is `Σ(w − q)²`.
#[inline(always)]
pub(super) fn least_loss<S: Simd>(
    simd: S,
    now: &[Lane],
    range: (&Lane, &Lane),
    rule: &GridRule,
    terms: Option<&LossTerms<'_>>,
) -> LaneGrid {
    let (lo, hi) = range;
    // Errors in units of the range: squares of tiny weights would underflow.
    let unit: Lane = array::from_fn(|l| 1.0 / hi[l].max(-lo[l]).max(f32::MIN_POSITIVE));
    let mut columns: [Vec<Column>; TOGETHER] = array::from_fn(|_| vec![Column([0.0; LANES]); now.len()]);
    let mut best = lanes::candidate(lo, hi, 1.0, rule);
    // Weights that the storage type cannot hold are an error, not clipped until it can.
    let mut least: Lane = array::from_fn(|l| if best.scale[l].is_finite() { f32::INFINITY } else { f32::NEG_INFINITY });
    let mut attempt = |grids: &[LaneGrid; TOGETHER], best: &mut LaneGrid| {
        for columns in &mut columns {
            columns.iter_mut().zip(now).for_each(|(column, now)| column.0 = *now);
        }
        let losses = losses(simd, &mut columns, grids, &unit, rule.largest_code(), terms);
        for (loss, grid) in losses.iter().zip(grids) {
            for l in 0..LANES {
                if loss[l] < least[l] {
                    least[l] = loss[l];
                    best.scale[l] = grid.scale[l];
                    best.zero[l] = grid.zero[l];
                }
            }
        }
    };
    for k in (0..LOSS_SHRINKS).step_by(TOGETHER) {
        let grids = array::from_fn(|c| lanes::candidate(lo, hi, GridRule::loss_shrink(k + c as u32), rule));
        attempt(&grids, &mut best);
    }
    if !rule.symmetric {
        let from = best;
        for stretches in LOSS_STRETCHES.chunks(TOGETHER / 2) {
            let grids = array::from_fn(|c| {
                let (stretch, step) = (stretches[c / 2], if c % 2 == 0 { -1.0 } else { 1.0 });
                let mut grid = from;
                for l in 0..LANES {
                    (grid.scale[l], grid.zero[l]) = rule.shifted((from.scale[l], from.zero[l]), stretch, step);
                }
                grid
            });
            attempt(&grids, &mut best);
        }
    }
    best
}

/// The losses of some grids a row. `columns` are the weights, once for each, and spoiled.
#[inline(always)]
fn losses<S: Simd>(
    simd: S,
    columns: &mut [Vec<Column>; TOGETHER],
    grids: &[LaneGrid; TOGETHER],
    unit: &Lane,
    largest: f32,
    terms: Option<&LossTerms<'_>>,
) -> [Lane; TOGETHER] {
    // A quotient a weight and candidate would cost more than all else.
    let inverses: [Lane; TOGETHER] = array::from_fn(|c| array::from_fn(|l| 1.0 / grids[c].scale[l]));
    let mut totals = [[0.0f32; LANES]; TOGETHER];
    let mut settle = |c: usize, column: &Lane, weight: f32| -> Lane {
        let (grid, inverse, total) = (&grids[c], &inverses[c], &mut totals[c]);
        let mut error = [0.0; LANES];
        for l in 0..LANES {
            let level = lanes::level(column[l] * inverse[l], grid.zero[l], largest);
            error[l] = column[l] - grid.scale[l] * level;
            let e = error[l] * unit[l];
            total[l] += e * e * weight;
        }
        error
    };
    let Some(terms) = terms else {
        for (c, columns) in columns.iter().enumerate() {
            columns.iter().for_each(|column| {
                settle(c, &column.0, 1.0);
            });
        }
        return totals;
    };
    let diagonal = terms.factor.diagonal.data();
    let mut start = 0;
    for part in terms.parts {
        let stop = start + part.columns.len();
        for first in (start..stop).step_by(PANEL) {
            let end = (first + PANEL).min(stop);
            let mut errors = [[Column([0.0; LANES]); PANEL]; TOGETHER];
            let mut settled = errors;
            for i in first..end {
                let (k, own, d) = (i - first, i - start, diagonal[part.columns.start + i - start]);
                let inverse = [&part.row(&terms.factor.inverses, own)[own + 1..end - start]];
                let product = terms.cross.map(|cross| [&part.row(&cross.blocks, own)[own + 1..end - start]]);
                for c in 0..TOGETHER {
                    settled[c][k] = columns[c][i];
                    errors[c][k].0 = settle(c, &columns[c][i].0, d * d);
                    // What is not carried on as a panel has no column behind it.
                    let later = &mut columns[c][i + 1..end];
                    carry(simd, later, &[errors[c][k]], &[settled[c][k]], &inverse, product.as_ref());
                }
            }
            if end == first + PANEL {
                let behind = end - start;
                let row = |blocks, k| &part.row(blocks, first - start + k)[behind..];
                let inverses: [&[f32]; PANEL] = array::from_fn(|k| row(&terms.factor.inverses, k));
                let products: Option<[&[f32]; PANEL]> =
                    terms.cross.map(|cross| array::from_fn(|k| row(&cross.blocks, k)));
                for c in 0..TOGETHER {
                    let later = &mut columns[c][end..stop];
                    carry(simd, later, &errors[c], &settled[c], &inverses, products.as_ref());
                }
            }
        }
        start = stop;
    }
    totals
}

/// Brings `later` columns up to date with `N` that have their codes, whose rows of the triangles begin with those columns.
#[inline(always)]
fn carry<S: Simd, const N: usize>(
    simd: S,
    later: &mut [Column],
    errors: &[Column; N],
    settled: &[Column; N],
    inverses: &[&[f32]; N],
    products: Option<&[&[f32]; N]>,
) {
    for v in 0..S::as_simd_f32s(&errors[0].0).0.len() {
        let error: [S::f32s; N] = array::from_fn(|k| S::as_simd_f32s(&errors[k].0).0[v]);
        let Some(products) = products else {
            for (j, column) in later.iter_mut().enumerate() {
                let value = &mut S::as_mut_simd_f32s(&mut column.0).0[v];
                for k in 0..N {
                    *value = simd.sub_f32s(*value, simd.mul_f32s(error[k], simd.splat_f32s(inverses[k][j])));
                }
            }
            continue;
        };
        let weight: [S::f32s; N] = array::from_fn(|k| S::as_simd_f32s(&settled[k].0).0[v]);
        for (j, column) in later.iter_mut().enumerate() {
            let value = &mut S::as_mut_simd_f32s(&mut column.0).0[v];
            let mut sum = *value;
            for k in 0..N {
                sum = simd.sub_f32s(sum, simd.mul_f32s(error[k], simd.splat_f32s(inverses[k][j])));
                sum = simd.add_f32s(sum, simd.mul_f32s(weight[k], simd.splat_f32s(products[k][j])));
            }
            *value = sum;
        }
    }
}
