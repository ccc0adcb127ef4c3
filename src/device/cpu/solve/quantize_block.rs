//! One block of columns, quantized column by column (method section 3, steps 6 and 7).

use super::SLAB;
use super::lanes::{LANES, Lane};
use super::product::{part, part_of, scaled_square_sum};
use super::search::{LossTerms, Part};
use super::tile::{GridOf, Slab, Weights, check, gather, groups_of, quantize_tile};
use crate::device::cpu::gemm::{Strided, StridedMut, gemm};
use crate::device::cpu::strips::{Rows, RowsMut, Strips};
use crate::device::{BLOCK, BlockCodes, ColumnBlock, Factor, Group, GroupGrid, SolveState};
use crate::tensor::Matrix;
use anyhow::Result;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// Quantizes a block of columns, see [`SolveOps::quantize_block`](crate::device::SolveOps::quantize_block).
pub(super) fn quantize_block(block: &ColumnBlock<'_, Matrix>, state: &mut SolveState<Matrix>) -> Result<BlockCodes> {
    let (rows, features) = (state.residual.rows(), state.residual.cols());
    let (width, groups, span) = (block.columns.len(), groups_of(block), state.error.cols());
    let mut out = BlockCodes {
        codes: vec![0; rows * width],
        grid: GroupGrid { scales: vec![0.0; rows * groups], zeros: vec![0; rows * groups] },
        error: 0.0,
    };
    let mut carried = state.carried.as_mut().map(|x| x.data_mut().chunks_mut(SLAB * features));
    let mut shift = state.shift.as_mut().map(|x| x.data_mut().chunks_mut(SLAB * features));
    let mut error = state.error.data_mut().chunks_mut((SLAB * span).max(1));
    let mut codes = out.codes.chunks_mut(SLAB * width);
    let mut scales = out.grid.scales.chunks_mut(SLAB * groups);
    let mut zeros = out.grid.zeros.chunks_mut(SLAB * groups);
    let mut slabs = Vec::new();
    for (index, residual) in state.residual.data_mut().chunks_mut(SLAB * features).enumerate() {
        slabs.push(Slab {
            first: index * SLAB,
            features,
            rows: residual.len() / features,
            residual,
            carried: carried.as_mut().and_then(Iterator::next),
            shift: shift.as_mut().and_then(Iterator::next),
            error: error.next().unwrap_or_default(),
            codes: codes.next().unwrap_or_default(),
            scales: scales.next().unwrap_or_default(),
            zeros: zeros.next().unwrap_or_default(),
        });
    }
    let cross = state.cross.as_ref();
    let products = block.factor.map(|factor| Products {
        inverse: Strips::new(&factor.inverses, block.columns.clone(), 0..width),
        root: Strips::new(&factor.root, block.columns.clone(), block.columns.clone()),
        shift: block.cross.map(|term| Strips::new(&term.blocks, block.columns.clone(), 0..width)),
        diagonal: &factor.diagonal.data()[block.columns.clone()],
    });
    let products = products.as_ref();
    let errors: Vec<f64> = slabs
        .into_par_iter()
        .map(|slab| Arch::new().dispatch(QuantizeSlab { block, slab, products, cross, span }))
        .collect::<Result<_>>()?;
    out.error = errors.iter().sum();
    Ok(out)
}

/// A block's triangles, packed once for all slabs.
struct Products<'a> {
    /// The block Ū_BB of the inverse's factor.
    inverse: Strips,
    /// The block R̄_BB of the factor.
    root: Strips,
    /// P_BB, for GPTAQ.
    shift: Option<Strips>,
    /// Diagonal of R.
    diagonal: &'a [f32],
}

/// The arguments of [`quantize_slab`], which is compiled for the widest vectors that the CPU has.
struct QuantizeSlab<'a, 'b> {
    block: &'a ColumnBlock<'a, Matrix>,
    slab: Slab<'b>,
    products: Option<&'a Products<'a>>,
    cross: Option<&'a Matrix>,
    span: usize,
}

impl WithSimd for QuantizeSlab<'_, '_> {
    type Output = Result<f64>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Result<f64> {
        quantize_slab(simd, self)
    }
}

#[inline(always)]
fn quantize_slab<S: Simd>(simd: S, job: QuantizeSlab<'_, '_>) -> Result<f64> {
    let QuantizeSlab { block, mut slab, products, cross, span } = job;
    let features = slab.features;
    let (rows, columns, width) = (slab.rows, block.columns.clone(), block.columns.len());
    let local = columns.start - block.span..columns.end - block.span;
    // Corrections acc·Ū_BB, kept apart from the weights until a column's turn comes: they are smaller, and so is their
    // rounding.
    let mut current = vec![0.0; rows * width];
    if let Some(products) = products {
        let mut acc = vec![0.0; rows * width];
        for (r, row) in acc.chunks_mut(width).enumerate() {
            row.copy_from_slice(&slab.error[r * span..][local.clone()]);
            if let Some(cross) = cross {
                add(row, &cross.row(slab.first + r)[local.clone()]);
            }
        }
        let acc = Rows { data: &acc, stride: width };
        products.inverse.add_to(1.0, acc, RowsMut { data: &mut current, stride: width }, rows);
    }

    let mut weights = Weights { current, rounded: vec![0.0; rows * width] };
    for first in (0..rows).step_by(LANES) {
        quantize_tile(simd, block, &mut slab, first, &mut weights)?;
    }
    let Weights { mut current, rounded } = weights;

    for (residual, rounded) in slab.residual.chunks_mut(features).zip(rounded.chunks(width)) {
        residual[columns.clone()].iter_mut().zip(rounded).for_each(|(w, q)| *w -= q);
    }
    if let Some(carried) = slab.carried.as_deref_mut() {
        let keep = if slab.shift.is_some() { &rounded } else { &current };
        for (row, from) in carried.chunks_mut(features).zip(keep.chunks(width)) {
            row[columns.clone()].copy_from_slice(from);
        }
    }
    let difference = &slab.residual[columns.start..];
    let Some(products) = products else {
        let ones = vec![1.0; width];
        return Ok(difference.chunks(features).map(|row| scaled_square_sum(&row[..width], &ones)).sum());
    };
    if let (Some(shift), Some(term)) = (slab.shift.as_deref_mut(), &products.shift) {
        current.iter_mut().zip(&rounded).for_each(|(w, q)| *w -= q);
        let shift = RowsMut { data: &mut shift[columns.start..], stride: features };
        term.add_to(1.0, Rows { data: &current, stride: width }, shift, rows);
    }
    let error = RowsMut { data: &mut slab.error[local.start..], stride: span };
    products.root.add_to(1.0, Rows { data: difference, stride: features }, error, rows);
    let error = |row: &[f32]| scaled_square_sum(&row[local.clone()], products.diagonal);
    Ok(slab.error.chunks(span).map(error).sum())
}

#[inline(always)]
fn add(to: &mut [f32], more: &[f32]) {
    to.iter_mut().zip(more).for_each(|(to, more)| *to += more);
}

/// The grids of a group wider than a block, see [`SolveOps::group_grid`](crate::device::SolveOps::group_grid).
pub(super) fn group_grid(state: &SolveState<Matrix>, group: &Group<'_, Matrix>) -> Result<GroupGrid> {
    let Group { columns, rule, .. } = group;
    let rows = state.residual.rows();
    let parts: Vec<Part> =
        group.blocks.iter().map(|block| Part { block: block.start, columns: block.clone() }).collect();
    let terms = group.factor.map(|factor| LossTerms { factor, cross: group.cross, parts: &parts });
    let corrections = group.factor.filter(|_| group.is_span);
    let (mut scales, mut zeros) = (vec![0.0f32; rows], vec![0u8; rows]);
    scales.par_chunks_mut(SLAB).zip(zeros.par_chunks_mut(SLAB)).enumerate().try_for_each(
        |(slab, (scales, zeros))| {
            let first = slab * SLAB;
            let weights = match corrections {
                Some(factor) => corrected(state, first..first + scales.len(), columns, factor, group.blocks),
                None => (first..first + scales.len())
                    .flat_map(|row| state.residual.row(row)[columns.clone()].iter().copied())
                    .collect(),
            };
            for tile in (0..scales.len()).step_by(LANES) {
                let rows = (scales.len() - tile).min(LANES);
                let weights = gather(&weights, columns.len(), columns.len(), tile, rows);
                let weights: Vec<Lane> = weights.iter().map(|column| column.0).collect();
                let grid = Arch::new().dispatch(GridOf { group: &weights, rule, terms: terms.as_ref() });
                check(&grid, rows, first + tile, rule)?;
                for l in 0..rows {
                    scales[tile + l] = grid.scale[l];
                    zeros[tile + l] = grid.zero[l] as u8;
                }
            }
            anyhow::Ok(())
        },
    )?;
    Ok(GroupGrid { scales, zeros })
}

/// `W + acc·R̄⁻¹` on the columns of a span, by substitution over its blocks.
fn corrected(
    state: &SolveState<Matrix>,
    rows: Range<usize>,
    columns: &Range<usize>,
    factor: &Factor<Matrix>,
    blocks: &[Range<usize>],
) -> Vec<f32> {
    let width = columns.len();
    let mut acc = Vec::with_capacity(rows.len() * width);
    let mut weights = Vec::with_capacity(rows.len() * width);
    for row in rows.clone() {
        weights.extend_from_slice(&state.residual.row(row)[columns.clone()]);
        acc.extend_from_slice(state.error.row(row));
        if let Some(cross) = &state.cross {
            let from = acc.len() - width;
            add(&mut acc[from..], cross.row(row));
        }
    }
    let mut solved = vec![0.0; rows.len() * BLOCK];
    for block in blocks {
        let local = block.start - columns.start..block.end - columns.start;
        let inverse = part(&factor.inverses, block.clone(), 0..block.len());
        gemm(
            1.0,
            part_of(&acc, width, 0..rows.len(), local.clone()),
            inverse,
            0.0,
            StridedMut::new(&mut solved, rows.len(), block.len(), BLOCK),
        );
        for (weights, solved) in weights.chunks_mut(width).zip(solved.chunks(BLOCK)) {
            add(&mut weights[local.clone()], &solved[..block.len()]);
        }
        if block.end < columns.end {
            gemm(
                -1.0,
                Strided::new(&solved, rows.len(), block.len(), BLOCK),
                part(&factor.root, block.clone(), block.end..columns.end),
                1.0,
                StridedMut::new(&mut acc[local.end..], rows.len(), width - local.end, width),
            );
        }
    }
    weights
}
