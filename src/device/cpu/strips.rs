//! Product of a tall matrix by one that is read again and again, packed once.
//!
//! A layer's weight multiplies every token, and a layer's factor every row of its weight. A general product packs both
//! operands anew for each slab and loses a third to a half of its speed to that; here strips of the right operand's
//! columns are laid out once, and the left one is read where it lies, a value at a time, six rows side by side.

use crate::parallel::each_chunk;
use crate::tensor::Matrix;
use pulp::{Arch, Simd, WithSimd};
use std::ops::Range;

/// Columns of a strip: four AVX-512 vectors.
const STRIP: usize = 64;

/// Bytes of a row of a strip.
pub(crate) const STRIP_BYTES: usize = STRIP * size_of::<f32>();

/// Rows whose sums stand in registers together: with four vectors of columns 24 sums, of 32 registers with AVX-512;
/// with two vectors 12, of 16 without.
const ROWS: usize = 6;

/// Rows that one task takes.
const TILE: usize = 16 * ROWS;

/// Products that are summed in one go: a strip this deep (32 KiB) stays in the first cache, and longer sums lose digits.
const DEPTH: usize = 256;

/// Side of the squares in which a matrix is transposed: rows of a large one lie powers of two apart, and reading down a
/// whole column would throw every cache line out before its next value is wanted.
const SIDE: usize = 16;

/// A row of a strip, on cache lines of its own: a vector that straddles two costs two loads.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([f32; STRIP]);

/// Rows of a row-major matrix: each begins `stride` values behind the one before.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
}

/// [`Rows`] to write to.
pub(crate) struct RowsMut<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) stride: usize,
}

/// A matrix `[inner, columns]`, strip by strip: element (k, c) is `data[c / STRIP · inner + k].0[c % STRIP]`, zeros in what
/// the last strip lacks.
pub(crate) struct Strips {
    data: Vec<Line>,
    inner: usize,
    columns: usize,
}

impl Strips {
    /// Rows and columns of `b`.
    pub(crate) fn new(b: &Matrix, rows: Range<usize>, columns: Range<usize>) -> Self {
        Self::fill(rows.len(), columns.len(), |strip, out| {
            let from = columns.start + strip.start..columns.start + strip.end;
            for (to, row) in out.iter_mut().zip(rows.clone()) {
                to.0[..from.len()].copy_from_slice(&b.row(row)[from.clone()]);
            }
        })
    }

    /// Some columns of the upper triangle of `b`, down to the last of them that holds a value.
    pub(crate) fn upper_triangle(b: &Matrix, columns: Range<usize>) -> Self {
        Self::fill(columns.end, columns.len(), |strip, out| {
            let from = columns.start + strip.start..columns.start + strip.end;
            for (row, to) in out.iter_mut().enumerate().take(from.end) {
                let below = row.saturating_sub(from.start);
                to.0[below..from.len()].copy_from_slice(&b.row(row)[from.start + below..from.end]);
            }
        })
    }

    /// Rows and columns of `b`, transposed: `columns` run along the inner dimension.
    pub(crate) fn transposed(b: &Matrix, rows: Range<usize>, columns: Range<usize>) -> Self {
        Self::fill(columns.len(), rows.len(), |strip, out| {
            for (index, out) in out.chunks_mut(SIDE).enumerate() {
                let inner = columns.start + index * SIDE..columns.start + index * SIDE + out.len();
                for first in strip.clone().step_by(SIDE) {
                    let square = rows.start + first..rows.start + (first + SIDE).min(strip.end);
                    for (c, row) in square.enumerate() {
                        for (to, &value) in out.iter_mut().zip(&b.row(row)[inner.clone()]) {
                            to.0[first % STRIP + c] = value;
                        }
                    }
                }
            }
        })
    }

    fn fill(inner: usize, columns: usize, strip: impl Fn(Range<usize>, &mut [Line]) + Sync) -> Self {
        let mut data = vec![Line([0.0; STRIP]); columns.div_ceil(STRIP) * inner];
        if inner > 0 {
            each_chunk(&mut data, inner, |index, out| {
                let first = index * STRIP;
                strip(first..(first + STRIP).min(columns), out);
            });
        }
        Self { data, inner, columns }
    }

    /// `c[:, first..] += alpha·a·b`, tiles of rows on all threads. Of each of `a`'s rows as many values as the inner dimension are
    /// read; `c` has as many rows as fill its slice.
    pub(crate) fn add_product(&self, alpha: f32, a: Rows<'_>, c: RowsMut<'_>, first: usize) {
        if self.inner == 0 || self.columns == 0 {
            return;
        }
        let stride = c.stride;
        each_chunk(c.data, TILE * stride, |tile, c| {
            let rows = c.len() / stride;
            let a = Rows { data: &a.data[tile * TILE * a.stride..], ..a };
            self.add_to(alpha, a, RowsMut { data: &mut c[first..], stride }, rows);
        });
    }

    /// Adds the product of `rows` rows on this thread, from the first column of `c`.
    pub(crate) fn add_to(&self, alpha: f32, a: Rows<'_>, c: RowsMut<'_>, rows: usize) {
        Arch::new().dispatch(Tile { strips: self, alpha, a, c, rows });
    }
}

/// The arguments of [`Strips::add_to`].
struct Tile<'a> {
    strips: &'a Strips,
    alpha: f32,
    a: Rows<'a>,
    c: RowsMut<'a>,
    rows: usize,
}

impl WithSimd for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Tile {
            strips,
            alpha,
            a: Rows { data: a, stride: a_stride },
            c: RowsMut { data: c, stride: c_stride },
            rows,
        } = self;
        for first in (0..strips.inner).step_by(DEPTH) {
            let inner = first..(first + DEPTH).min(strips.inner);
            for (index, strip) in strips.data.chunks_exact(strips.inner).enumerate() {
                let strip = &strip[inner.clone()];
                let columns = index * STRIP..((index + 1) * STRIP).min(strips.columns);
                for top in (0..rows).step_by(ROWS) {
                    // Rows past the last repeat it, and their sums are dropped.
                    let mut left = [a; ROWS];
                    for (r, row) in left.iter_mut().enumerate() {
                        *row = &a[(top + r).min(rows - 1) * a_stride..][inner.clone()];
                    }
                    let mut sums = [[0.0; STRIP]; ROWS];
                    if S::F32_LANES == 16 {
                        multiply::<S, 4>(simd, left, strip, &mut sums);
                    } else {
                        multiply::<S, 2>(simd, left, strip, &mut sums);
                    }
                    for (row, sums) in (top..rows).zip(&sums) {
                        let out = &mut c[row * c_stride..][columns.clone()];
                        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += alpha * sum);
                    }
                }
            }
        }
    }
}

/// `sums[r][c] = Σ_k left[r][k]·strip[k][c]`.
#[inline(always)]
fn multiply<S: Simd, const VECTORS: usize>(
    simd: S,
    mut left: [&[f32]; ROWS],
    strip: &[Line],
    out: &mut [[f32; STRIP]; ROWS],
) {
    for row in &mut left {
        *row = &row[..strip.len()];
    }
    for first in (0..STRIP / S::F32_LANES).step_by(VECTORS) {
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        for (k, columns) in strip.iter().enumerate() {
            let columns = &S::as_simd_f32s(&columns.0).0[first..first + VECTORS];
            for r in 0..ROWS {
                let factor = simd.splat_f32s(left[r][k]);
                for v in 0..VECTORS {
                    sums[r][v] = simd.mul_add_e_f32s(columns[v], factor, sums[r][v]);
                }
            }
        }
        for r in 0..ROWS {
            let out = &mut S::as_mut_simd_f32s(&mut out[r]).0[first..first + VECTORS];
            #[expect(
                clippy::manual_memcpy,
                reason = "a copy of a row wants it in memory, and there the sums would stand all along"
            )]
            for v in 0..VECTORS {
                out[v] = sums[r][v];
            }
        }
    }
}
