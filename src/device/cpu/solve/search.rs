//! The grid of a group by what it does to the layer: candidates are solved with, and the one of least loss is taken.

use super::lanes::{self, Column, LANES, Lane, LaneGrid};
use crate::device::{CrossFactor, Factor, GridRule, LOSS_SHRINKS, LOSS_STRETCHES};
use crate::tensor::Matrix;
use pulp::Simd;
use std::ops::Range;

/// Columns whose errors are carried on to later ones in one go: each later column is read and written once for all of
/// them. Any number gives the same bits.
const PANEL: usize = 8;

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
    let unit: Lane = std::array::from_fn(|l| 1.0 / hi[l].max(-lo[l]).max(f32::MIN_POSITIVE));
    let mut columns = vec![Column([0.0; LANES]); now.len()];
    let mut best = lanes::candidate(lo, hi, 1.0, rule);
    // Weights that the storage type cannot hold are an error, not clipped until it can.
    let mut least: Lane =
        std::array::from_fn(|l| if best.scale[l].is_finite() { f32::INFINITY } else { f32::NEG_INFINITY });
    let mut attempt = |grid: &LaneGrid, best: &mut LaneGrid| {
        columns.iter_mut().zip(now).for_each(|(column, now)| column.0 = *now);
        let loss = loss(simd, &mut columns, grid, &unit, rule.largest_code(), terms);
        for l in 0..LANES {
            if loss[l] < least[l] {
                least[l] = loss[l];
                best.scale[l] = grid.scale[l];
                best.zero[l] = grid.zero[l];
            }
        }
    };
    for k in 0..LOSS_SHRINKS {
        attempt(&lanes::candidate(lo, hi, GridRule::loss_shrink(k), rule), &mut best);
    }
    if !rule.symmetric {
        let from = best;
        for stretch in LOSS_STRETCHES {
            for step in [-1.0, 1.0] {
                let mut grid = from;
                for l in 0..LANES {
                    (grid.scale[l], grid.zero[l]) = rule.shifted((from.scale[l], from.zero[l]), stretch, step);
                }
                attempt(&grid, &mut best);
            }
        }
    }
    best
}

/// The loss of one grid a row. `columns` are the weights, and spoiled.
#[inline(always)]
fn loss<S: Simd>(
    simd: S,
    columns: &mut [Column],
    grid: &LaneGrid,
    unit: &Lane,
    largest: f32,
    terms: Option<&LossTerms<'_>>,
) -> Lane {
    // A quotient a weight and candidate would cost more than all else.
    let inverse: Lane = std::array::from_fn(|l| 1.0 / grid.scale[l]);
    let mut total = [0.0f32; LANES];
    let mut settle = |column: &Lane, weight: f32| -> Lane {
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
        columns.iter().for_each(|column| {
            settle(&column.0, 1.0);
        });
        return total;
    };
    let diagonal = terms.factor.diagonal.data();
    let mut rest = columns;
    for part in terms.parts {
        let (columns, after) = std::mem::take(&mut rest).split_at_mut(part.columns.len());
        rest = after;
        let local = part.columns.start - part.block..part.columns.end - part.block;
        for first in (0..columns.len()).step_by(PANEL) {
            let end = (first + PANEL).min(columns.len());
            let (mut errors, mut settled) = ([Column([0.0; LANES]); PANEL], [Column([0.0; LANES]); PANEL]);
            let mut inverses: [&[f32]; PANEL] = [&[]; PANEL];
            let mut products: [&[f32]; PANEL] = [&[]; PANEL];
            for i in first..end {
                let place = part.columns.start + i;
                let d = diagonal[place];
                let k = i - first;
                settled[k] = columns[i];
                errors[k].0 = settle(&columns[i].0, d * d);
                inverses[k] = &terms.factor.inverses.row(place)[local.clone()];
                if let Some(cross) = terms.cross {
                    products[k] = &cross.blocks.row(place)[local.clone()];
                }
                carry(
                    simd,
                    &mut columns[i + 1..end],
                    i + 1,
                    &errors[k..=k],
                    &settled[k..=k],
                    &inverses[k..=k],
                    terms.cross.map(|_| &products[k..=k]),
                );
            }
            let n = end - first;
            carry(
                simd,
                &mut columns[end..],
                end,
                &errors[..n],
                &settled[..n],
                &inverses[..n],
                terms.cross.map(|_| &products[..n]),
            );
        }
    }
    total
}

/// Brings `later` columns, the first of them at place `at` of the part, up to date with some that have their codes.
#[inline(always)]
fn carry<S: Simd>(
    simd: S,
    later: &mut [Column],
    at: usize,
    errors: &[Column],
    settled: &[Column],
    inverses: &[&[f32]],
    products: Option<&[&[f32]]>,
) {
    for (j, column) in (at..).zip(later) {
        for (v, value) in S::as_mut_simd_f32s(&mut column.0).0.iter_mut().enumerate() {
            let mut sum = *value;
            for k in 0..errors.len() {
                let error = S::as_simd_f32s(&errors[k].0).0[v];
                sum = simd.add_f32s(sum, simd.mul_f32s(error, simd.splat_f32s(-inverses[k][j])));
                if let Some(products) = products {
                    let weight = S::as_simd_f32s(&settled[k].0).0[v];
                    sum = simd.add_f32s(sum, simd.mul_f32s(weight, simd.splat_f32s(products[k][j])));
                }
            }
            *value = sum;
        }
    }
}
