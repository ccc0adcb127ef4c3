//! Product of a tall matrix by one that is read again and again, packed once.
//!
//! A layer's weight multiplies every token, and a layer's factor every row of its weight. A general product packs that
//! operand anew for each slab of the other and loses a third to a half of its speed to that; here strips of its columns
//! are laid out once, and sixty-four rows at a time run over them in registers.

use crate::tensor::Matrix;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// Columns of a strip: with four AVX-512 vectors of rows, 24 sums in registers.
const STRIP: usize = 6;

/// Rows that run over the strips together.
pub(crate) const TILE: usize = 64;

/// Products that are summed in one go: sums of more lose digits and leave the cache.
const DEPTH: usize = 256;

/// A matrix `[inner, columns]`, strip by strip: element (k, c) is `data[(c / STRIP · inner + k) · STRIP + c % STRIP]`.
pub(crate) struct Packed {
    data: Vec<f32>,
    inner: usize,
    columns: usize,
}

impl Packed {
    /// Rows and columns of `b`.
    pub(crate) fn new(b: &Matrix, rows: Range<usize>, columns: Range<usize>) -> Self {
        Self::fill(rows.len(), columns.len(), |first, strip| {
            let from = columns.start + first..(columns.start + first + STRIP).min(columns.end);
            for (to, row) in strip.chunks_mut(STRIP).zip(rows.clone()) {
                // Six values: a call of memmove would cost more than they do.
                to.iter_mut().zip(&b.row(row)[from.clone()]).for_each(|(to, &value)| *to = value);
            }
        })
    }

    /// The same part, transposed: `columns` run along the inner dimension.
    pub(crate) fn transposed(b: &Matrix, rows: Range<usize>, columns: Range<usize>) -> Self {
        Self::fill(columns.len(), rows.len(), |first, strip| {
            for (j, row) in (rows.start + first..(rows.start + first + STRIP).min(rows.end)).enumerate() {
                for (to, &value) in strip.chunks_mut(STRIP).zip(&b.row(row)[columns.clone()]) {
                    to[j] = value;
                }
            }
        })
    }

    fn fill(inner: usize, columns: usize, strip: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let mut data = vec![0.0; columns.div_ceil(STRIP) * STRIP * inner];
        if inner > 0 {
            data.par_chunks_mut(STRIP * inner).enumerate().for_each(|(index, out)| strip(index * STRIP, out));
        }
        Self { data, inner, columns }
    }

    /// `c = c + alpha·a·b` for up to [`TILE`] rows: `a` their values along the inner dimension, `a_stride` apart from
    /// row to row, `c` their results, `c_stride` apart.
    pub(crate) fn add_to(&self, alpha: f32, a: &[f32], a_stride: usize, c: &mut [f32], c_stride: usize, rows: usize) {
        Arch::new().dispatch(Tile { packed: self, alpha, a, a_stride, c, c_stride, rows });
    }
}

/// The arguments of [`Packed::add_to`].
struct Tile<'a> {
    packed: &'a Packed,
    alpha: f32,
    a: &'a [f32],
    a_stride: usize,
    c: &'a mut [f32],
    c_stride: usize,
    rows: usize,
}

impl WithSimd for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Tile { packed, alpha, a, a_stride, c, c_stride, rows } = self;
        let inner = packed.inner;
        let mut sums = vec![[[0.0f32; TILE]; STRIP]; packed.columns.div_ceil(STRIP)];
        let mut lanes = vec![[0.0f32; TILE]; DEPTH.min(inner)];
        for first in (0..inner).step_by(DEPTH) {
            let depth = DEPTH.min(inner - first);
            transpose(&a[first..], a_stride, rows, &mut lanes[..depth]);
            for (index, sums) in sums.iter_mut().enumerate() {
                let strip = &packed.data[(index * inner + first) * STRIP..][..depth * STRIP];
                // As many vectors as leave room for the operands: 32 registers with AVX-512, else 16.
                if S::F32_LANES == 16 {
                    multiply::<S, 4>(simd, &lanes[..depth], strip, sums);
                } else {
                    multiply::<S, 2>(simd, &lanes[..depth], strip, sums);
                }
            }
        }
        for (index, sums) in sums.iter().enumerate() {
            let columns = index * STRIP..((index + 1) * STRIP).min(packed.columns);
            for row in 0..rows {
                for (out, sum) in c[row * c_stride..][columns.clone()].iter_mut().zip(sums) {
                    *out += alpha * sum[row];
                }
            }
        }
    }
}

/// `lanes[k][row] = a[row · stride + k]`, square by square: rows of a large matrix lie powers of two apart, and reading
/// down a column would throw every cache line out before its next value is wanted.
#[inline(always)]
fn transpose(a: &[f32], stride: usize, rows: usize, lanes: &mut [[f32; TILE]]) {
    const SIDE: usize = 16;
    for (index, lanes) in lanes.chunks_mut(SIDE).enumerate() {
        for first in (0..rows).step_by(SIDE) {
            let mut square = [[0.0f32; SIDE]; SIDE];
            for (row, to) in (first..rows).zip(&mut square) {
                let from = &a[row * stride + index * SIDE..];
                match from.first_chunk::<SIDE>() {
                    Some(from) if lanes.len() == SIDE => *to = *from,
                    _ => to[..lanes.len()].copy_from_slice(&from[..lanes.len()]),
                }
            }
            for (k, lane) in lanes.iter_mut().enumerate() {
                let to: &mut [f32; SIDE] = (&mut lane[first..first + SIDE]).try_into().expect("a sixteenth of a tile");
                *to = std::array::from_fn(|l| square[l][k]);
            }
        }
    }
}

/// `sums[c][r] += Σ_k lanes[k][r]·strip[k][c]`.
#[inline(always)]
fn multiply<S: Simd, const VECTORS: usize>(
    simd: S,
    lanes: &[[f32; TILE]],
    strip: &[f32],
    out: &mut [[f32; TILE]; STRIP],
) {
    for first in (0..TILE / S::F32_LANES).step_by(VECTORS) {
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; STRIP];
        for (lane, factors) in lanes.iter().zip(strip.as_chunks::<STRIP>().0) {
            let lane = &S::as_simd_f32s(lane).0[first..first + VECTORS];
            for c in 0..STRIP {
                let factor = simd.splat_f32s(factors[c]);
                for v in 0..VECTORS {
                    sums[c][v] = simd.mul_add_e_f32s(lane[v], factor, sums[c][v]);
                }
            }
        }
        for c in 0..STRIP {
            let out = &mut S::as_mut_simd_f32s(&mut out[c]).0[first..first + VECTORS];
            for v in 0..VECTORS {
                out[v] = simd.add_f32s(out[v], sums[c][v]);
            }
        }
    }
}
