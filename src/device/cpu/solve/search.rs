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
    #[inline]
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
    let mut columns = vec![Column([0.0; LANES]); now.len()];
    let mut best = lanes::candidate(lo, hi, 1.0, rule);
    // Weights that the storage type cannot hold are an error, not clipped until it can.
    let mut least: Lane = array::from_fn(|l| if best.scale[l].is_finite() { f32::INFINITY } else { f32::NEG_INFINITY });
    let mut from = best;
    let shifts = if rule.symmetric { 0 } else { 2 * LOSS_STRETCHES.len() };
    for k in 0..LOSS_SHRINKS + shifts {
        if k == LOSS_SHRINKS {
            from = best;
        }
        let grid = candidate(k, range, &from, rule);
        // A quotient a weight and candidate would cost more than all else.
        let inverse = array::from_fn(|l| 1.0 / grid.scale[l]);
        let scored = Scored { grid: &grid, inverse, unit: &unit, largest: rule.largest_code() };
        for (column, now) in columns.iter_mut().zip(now) {
            column.0 = *now;
        }
        let loss = loss(simd, &mut columns, &scored, terms);
        for l in 0..LANES {
            if loss[l] < least[l] {
                least[l] = loss[l];
                best.scale[l] = grid.scale[l];
                best.zero[l] = grid.zero[l];
            }
        }
    }
    best
}

/// Candidate `k`; from [`LOSS_SHRINKS`] on, `from` is the best of those before.
#[inline(always)]
fn candidate(k: usize, (lo, hi): (&Lane, &Lane), from: &LaneGrid, rule: &GridRule) -> LaneGrid {
    let Some(shift) = k.checked_sub(LOSS_SHRINKS) else {
        return lanes::candidate(lo, hi, GridRule::loss_shrink(k), rule);
    };
    let (stretch, step) = (LOSS_STRETCHES[shift / 2], if shift % 2 == 0 { -1.0 } else { 1.0 });
    let mut grid = *from;
    for l in 0..LANES {
        (grid.scale[l], grid.zero[l]) = rule.shifted((from.scale[l], from.zero[l]), stretch, step);
    }
    grid
}

/// A grid a row whose loss is asked for.
struct Scored<'a> {
    grid: &'a LaneGrid,
    /// One over the scales.
    inverse: Lane,
    /// One over the unit that errors are measured in.
    unit: &'a Lane,
    /// The largest code.
    largest: f32,
}

/// The loss of one grid a row. `columns` are the weights, and spoiled.
///
/// Nothing here is a closure: one that the compiler does not inline has none of the vectors that its caller was compiled for.
#[inline(always)]
fn loss<S: Simd>(simd: S, columns: &mut [Column], scored: &Scored<'_>, terms: Option<&LossTerms<'_>>) -> Lane {
    let mut total = [0.0f32; LANES];
    let Some(terms) = terms else {
        for column in columns.iter() {
            settle(&column.0, scored, 1.0, &mut total);
        }
        return total;
    };
    let diagonal = terms.factor.diagonal.data();
    let mut start = 0;
    for part in terms.parts {
        let width = part.columns.len();
        let columns = &mut columns[start..start + width];
        start += width;
        for first in (0..width).step_by(PANEL) {
            let end = (first + PANEL).min(width);
            let (mut errors, mut settled) = ([Column([0.0; LANES]); PANEL], [Column([0.0; LANES]); PANEL]);
            for i in first..end {
                let (k, d) = (i - first, diagonal[part.columns.start + i]);
                settled[k] = columns[i];
                errors[k].0 = settle(&columns[i].0, scored, d * d, &mut total);
                // What is not carried on as a panel has no column behind it.
                let column = Panel {
                    errors: &[errors[k]],
                    settled: &[settled[k]],
                    inverses: [&part.row(&terms.factor.inverses, i)[i + 1..end]],
                    products: terms.cross.map(|cross| [&part.row(&cross.blocks, i)[i + 1..end]]),
                };
                carry(simd, &mut columns[i + 1..end], &column);
            }
            if end == first + PANEL {
                let panel = Panel {
                    errors: &errors,
                    settled: &settled,
                    inverses: array::from_fn(|k| &part.row(&terms.factor.inverses, first + k)[end..]),
                    products: terms.cross.map(|cross| array::from_fn(|k| &part.row(&cross.blocks, first + k)[end..])),
                };
                carry(simd, &mut columns[end..], &panel);
            }
        }
    }
    total
}

/// The errors of a column on the grid; their weighted squares are added to `total`.
#[inline(always)]
fn settle(column: &Lane, scored: &Scored<'_>, weight: f32, total: &mut Lane) -> Lane {
    let Scored { grid, inverse, unit, largest } = scored;
    let mut error = [0.0; LANES];
    for l in 0..LANES {
        let level = lanes::level(column[l] * inverse[l], grid.zero[l], *largest);
        error[l] = column[l] - grid.scale[l] * level;
        let e = error[l] * unit[l];
        total[l] += e * e * weight;
    }
    error
}

/// `N` columns that have their codes, and what they are carried on by: their rows of the triangles, from the first later column on.
struct Panel<'a, const N: usize> {
    errors: &'a [Column; N],
    settled: &'a [Column; N],
    inverses: [&'a [f32]; N],
    /// Slab of the cross term.
    products: Option<[&'a [f32]; N]>,
}

/// Brings `later` columns up to date with those of a panel.
#[inline(always)]
fn carry<S: Simd, const N: usize>(simd: S, later: &mut [Column], panel: &Panel<'_, N>) {
    let &Panel { errors, settled, mut inverses, mut products } = panel;
    // Of one length: no place in them is checked inside the loop.
    for row in &mut inverses {
        *row = &row[..later.len()];
    }
    if let Some(products) = &mut products {
        for row in products {
            *row = &row[..later.len()];
        }
    }
    for (j, column) in later.iter_mut().enumerate() {
        for (v, value) in S::as_mut_simd_f32s(&mut column.0).0.iter_mut().enumerate() {
            let mut sum = *value;
            for k in 0..N {
                let error = S::as_simd_f32s(&errors[k].0).0[v];
                sum = simd.sub_f32s(sum, simd.mul_f32s(error, simd.splat_f32s(inverses[k][j])));
                if let Some(products) = &products {
                    let weight = S::as_simd_f32s(&settled[k].0).0[v];
                    sum = simd.add_f32s(sum, simd.mul_f32s(weight, simd.splat_f32s(products[k][j])));
                }
            }
            *value = sum;
        }
    }
}
