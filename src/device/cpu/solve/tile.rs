//! Sixteen rows of a block, column by column.

use super::lanes::{self, LANES, Lane, LaneGrid};
use super::quantize_block::Slab;
use crate::device::{Block, GridRule, GroupGrid};
use crate::tensor::Matrix;
use anyhow::{Result, bail};
use pulp::{Simd, WithSimd};

/// The column loop on up to sixteen rows. `current` `[rows, width]` brings the corrections of earlier blocks and comes
/// back with each weight as it was just before rounding, `rounded` with the weight it became.
pub(super) struct Tile<'a, 'b> {
    pub(super) block: &'a Block<'a, Matrix>,
    pub(super) slab: &'a mut Slab<'b>,
    pub(super) first: usize,
    pub(super) features: usize,
    pub(super) current: &'a mut [f32],
    pub(super) rounded: &'a mut [f32],
}

impl WithSimd for Tile<'_, '_> {
    type Output = Result<()>;

    /// Plain loops, compiled for the widest vectors that the CPU has.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Result<()> {
        let Tile { block, slab, first, features, current, rounded } = self;
        quantize_tile(simd, block, slab, first, features, current, rounded)
    }
}

#[inline(always)]
fn quantize_tile<S: Simd>(
    simd: S,
    block: &Block<'_, Matrix>,
    slab: &mut Slab<'_>,
    first: usize,
    features: usize,
    current: &mut [f32],
    rounded: &mut [f32],
) -> Result<()> {
    let (width, groups, largest) = (block.columns.len(), groups_of(block), block.rule.largest_code());
    let rows = (slab.rows - first).min(LANES);
    let mut w = gather(&slab.residual[block.columns.start..], features, width, first, rows);
    let mut corrections = gather(current, width, width, first, rows);
    let mut grid = match block.grid {
        Some(given) => given_grid(given, slab.first + first, rows),
        None => LaneGrid { scale: [1.0; LANES], zero: [0.0; LANES] },
    };
    for i in 0..width {
        if block.grid.is_none() && i % block.group == 0 {
            let group = i..i + block.group;
            let now: Vec<Lane> = w[group.clone()].iter().zip(&corrections[group]).map(|(w, d)| sum(w, d)).collect();
            grid = lanes::grid_of(&now, &block.rule);
            check(&grid, rows, slab.first + first, &block.rule)?;
        }
        if i % block.group == 0 || i == 0 {
            let group = if block.grid.is_some() { 0 } else { i / block.group };
            for l in 0..rows {
                slab.scales[(first + l) * groups + group] = grid.scale[l];
                slab.zeros[(first + l) * groups + group] = grid.zero[l] as u8;
            }
        }
        w[i] = sum(&w[i], &corrections[i]);
        let column = w[i];
        let (level, value) = lanes::round(&column, &grid, largest);
        let codes = lanes::codes(&level, &grid);
        for l in 0..rows {
            slab.codes[(first + l) * width + i] = codes[l];
            rounded[(first + l) * width + i] = value[l];
        }
        let Some(factor) = block.factor else { continue };
        let error: Lane = std::array::from_fn(|l| column[l] - value[l]);
        let place = block.columns.start + i;
        let later = &mut corrections[i + 1..];
        propagate(simd, later, &error, &factor.inverses.row(place)[i + 1..width], -1.0);
        if let Some(cross) = block.cross {
            propagate(simd, later, &column, &cross.blocks.row(place)[i + 1..width], 1.0);
        }
    }
    for (i, w) in w.iter().enumerate() {
        for l in 0..rows {
            current[(first + l) * width + i] = w[l];
        }
    }
    Ok(())
}

/// `later[k] += sign · lane · factors[k]`, product and sum rounded apart. Spelled out: left to itself the compiler
/// vectorizes along k and gathers.
#[inline(always)]
fn propagate<S: Simd>(simd: S, later: &mut [Lane], lane: &Lane, factors: &[f32], sign: f32) {
    let lane = S::as_simd_f32s(lane).0;
    for (d, &factor) in later.iter_mut().zip(factors) {
        let factor = simd.splat_f32s(sign * factor);
        for (d, &x) in S::as_mut_simd_f32s(d).0.iter_mut().zip(lane) {
            *d = simd.add_f32s(*d, simd.mul_f32s(x, factor));
        }
    }
}

#[inline(always)]
fn sum(a: &Lane, b: &Lane) -> Lane {
    std::array::from_fn(|l| a[l] + b[l])
}

/// The grid of one group, compiled for the widest vectors that the CPU has.
pub(super) struct GridOf<'a> {
    pub(super) group: &'a [Lane],
    pub(super) rule: &'a GridRule,
}

impl WithSimd for GridOf<'_> {
    type Output = LaneGrid;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> LaneGrid {
        lanes::grid_of(self.group, self.rule)
    }
}

/// Rows `first..first + rows` of `x`, `stride` apart, one lane a column; lanes without a row stay 0.
#[inline(always)]
pub(super) fn gather(x: &[f32], stride: usize, width: usize, first: usize, rows: usize) -> Vec<Lane> {
    let mut lanes = vec![[0.0; LANES]; width];
    for l in 0..rows {
        for (lane, &value) in lanes.iter_mut().zip(&x[(first + l) * stride..][..width]) {
            lane[l] = value;
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
        bail!(
            "the scale of a group of weights in output row {} does not fit {:?}: weights too large or not finite",
            first + l,
            rule.scale_type
        );
    }
    Ok(())
}

/// Groups that a block brings scales for.
pub(super) fn groups_of(block: &Block<'_, Matrix>) -> usize {
    if block.grid.is_some() { 1 } else { block.columns.len() / block.group }
}
