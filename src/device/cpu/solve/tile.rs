//! Sixteen rows of a block, column by column.

use super::lanes::{self, Column, LANES, Lane, LaneGrid};
use super::search::{LossTerms, Part, least_loss};
use crate::device::{ColumnBlock, Grid, GridRule, GroupGrid};
use crate::tensor::Matrix;
use anyhow::Result;
use pulp::{Simd, WithSimd};
use std::slice;

/// One task's rows of everything that the block reads and writes.
pub(super) struct Slab<'a> {
    pub(super) first: usize,
    pub(super) rows: usize,
    /// Columns of the whole layer: values from a row of `residual`, `carried` and `shift` to the next.
    pub(super) features: usize,
    pub(super) residual: &'a mut [f32],
    pub(super) carried: Option<&'a mut [f32]>,
    pub(super) shift: Option<&'a mut [f32]>,
    pub(super) error: &'a mut [f32],
    pub(super) codes: &'a mut [u8],
    pub(super) scales: &'a mut [f32],
    pub(super) zeros: &'a mut [u8],
}

/// A slab's weights of the block, `[rows, width]` each.
pub(super) struct Weights {
    /// Before a tile is quantized the corrections of earlier blocks; behind it each weight as it was just before rounding.
    pub(super) current: Vec<f32>,
    /// What each weight became.
    pub(super) rounded: Vec<f32>,
}

/// The column loop on up to sixteen rows of a slab, from its row `first`.
#[inline(always)]
pub(super) fn quantize_tile<S: Simd>(
    simd: S,
    block: &ColumnBlock<'_, Matrix>,
    slab: &mut Slab<'_>,
    first: usize,
    weights: &mut Weights,
) -> Result<()> {
    let Weights { current, rounded } = weights;
    let (width, groups, largest) = (block.columns.len(), groups_of(block), block.rule.largest_code());
    let rows = (slab.rows - first).min(LANES);
    let mut w = gather(&slab.residual[block.columns.start..], slab.features, width, first, rows);
    let mut corrections = gather(current, width, width, first, rows);
    let mut grid = match block.grid {
        Some(given) => given_grid(given, slab.first + first, rows),
        None => LaneGrid { scale: [1.0; LANES], zero: [0.0; LANES] },
    };
    for i in 0..width {
        if block.grid.is_none() && i % block.group == 0 {
            let group = i..i + block.group;
            let now: Vec<Lane> =
                w[group.clone()].iter().zip(&corrections[group]).map(|(w, d)| sum(&w.0, &d.0)).collect();
            let part = Part {
                block: block.columns.start,
                columns: block.columns.start + i..block.columns.start + i + block.group,
            };
            let terms =
                block.factor.map(|factor| LossTerms { factor, cross: block.cross, parts: slice::from_ref(&part) });
            grid = grid_of(simd, &now, &block.rule, terms.as_ref());
            check(&grid, rows, slab.first + first, &block.rule)?;
        }
        if i % block.group == 0 || i == 0 {
            let group = if block.grid.is_some() { 0 } else { i / block.group };
            for l in 0..rows {
                slab.scales[(first + l) * groups + group] = grid.scale[l];
                slab.zeros[(first + l) * groups + group] = grid.zero[l] as u8;
            }
        }
        let column = sum(&w[i].0, &corrections[i].0);
        w[i].0 = column;
        let (level, value) = lanes::round(&column, &grid, largest);
        let codes = lanes::codes(&level, &grid);
        for l in 0..rows {
            slab.codes[(first + l) * width + i] = codes[l];
            rounded[(first + l) * width + i] = value[l];
        }
        let Some(factor) = block.factor else { continue };
        let error = difference(&column, &value);
        let place = block.columns.start + i;
        let later = &mut corrections[i + 1..];
        let inverse = &factor.inverses.row(place)[i + 1..width];
        match block.cross {
            Some(cross) => {
                let blocks = &cross.blocks.row(place)[i + 1..width];
                for ((d, &u), &p) in later.iter_mut().zip(inverse).zip(blocks) {
                    propagate(simd, &mut d.0, &error, -u);
                    propagate(simd, &mut d.0, &column, p);
                }
            }
            None => later.iter_mut().zip(inverse).for_each(|(d, &u)| propagate(simd, &mut d.0, &error, -u)),
        }
    }
    for (i, w) in w.iter().enumerate() {
        for l in 0..rows {
            current[(first + l) * width + i] = w.0[l];
        }
    }
    Ok(())
}

/// `d += lane · factor`, product and sum rounded apart. Spelled out: left to itself the compiler vectorizes along the
/// columns and gathers. Counted, not zipped: what makes a pair of iterators is a function that is not always inlined.
#[inline(always)]
fn propagate<S: Simd>(simd: S, d: &mut Lane, lane: &Lane, factor: f32) {
    let factor = simd.splat_f32s(factor);
    let (d, lane) = (S::as_mut_simd_f32s(d).0, S::as_simd_f32s(lane).0);
    for v in 0..d.len() {
        d[v] = simd.add_f32s(d[v], simd.mul_f32s(lane[v], factor));
    }
}

#[inline(always)]
fn sum(a: &Lane, b: &Lane) -> Lane {
    let mut sum = *a;
    for l in 0..LANES {
        sum[l] += b[l];
    }
    sum
}

#[inline(always)]
fn difference(a: &Lane, b: &Lane) -> Lane {
    let mut difference = *a;
    for l in 0..LANES {
        difference[l] -= b[l];
    }
    difference
}

/// Scale and zero of each row's group from the group's weights, one lane a column.
#[inline(always)]
fn grid_of<S: Simd>(simd: S, group: &[Lane], rule: &GridRule, terms: Option<&LossTerms<'_>>) -> LaneGrid {
    let (lo, hi) = lanes::range_of(group);
    match rule.grid {
        Grid::Minmax => lanes::candidate(&lo, &hi, 1.0, rule),
        Grid::Mse => lanes::least_power(group, &lo, &hi, rule),
        Grid::Loss => least_loss(simd, group, (&lo, &hi), rule, terms),
    }
}

/// The grid of one group, compiled for the widest vectors that the CPU has.
pub(super) struct GridOf<'a> {
    pub(super) group: &'a [Lane],
    pub(super) rule: &'a GridRule,
    pub(super) terms: Option<&'a LossTerms<'a>>,
}

impl WithSimd for GridOf<'_> {
    type Output = LaneGrid;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> LaneGrid {
        grid_of(simd, self.group, self.rule, self.terms)
    }
}

/// Rows `first..first + rows` of `x`, `stride` apart, one lane a column; lanes without a row stay 0.
#[inline(always)]
pub(super) fn gather(x: &[f32], stride: usize, width: usize, first: usize, rows: usize) -> Vec<Column> {
    let mut lanes = vec![Column([0.0; LANES]); width];
    for l in 0..rows {
        for (lane, &value) in lanes.iter_mut().zip(&x[(first + l) * stride..][..width]) {
            lane.0[l] = value;
        }
    }
    lanes
}

fn given_grid(grid: &GroupGrid, first: usize, rows: usize) -> LaneGrid {
    let mut lanes = LaneGrid { scale: [1.0; LANES], zero: [0.0; LANES] };
    for l in 0..rows {
        lanes.scale[l] = grid.scales[first + l];
        lanes.zero[l] = f32::from(grid.zeros[first + l]);
    }
    lanes
}

pub(super) fn check(grid: &LaneGrid, rows: usize, first: usize, rule: &GridRule) -> Result<()> {
    if let Some(l) = grid.scale[..rows].iter().position(|s| !s.is_finite()) {
        return Err(rule.misfit(first + l));
    }
    Ok(())
}

/// Groups that a block brings scales for.
pub(super) fn groups_of(block: &ColumnBlock<'_, Matrix>) -> usize {
    if block.grid.is_some() { 1 } else { block.columns.len() / block.group }
}
