//! `H = R·Rᵀ` from the last index backwards, and the GPTAQ term in its coordinates.

use crate::device::cpu::strips::{Rows, RowsMut, Strips};
use crate::device::cpu::vector::dispatch;
use crate::device::{BLOCK, CrossFactor, Factor, Factored};
use crate::parallel::each_chunk;
use crate::tensor::Matrix;
use std::ops::Range;

/// Blocked left-looking factorization: a block of columns is brought up to date with all columns to its right by one
/// product, its diagonal block is factored in float64 (where cancellation bites), and its inverse finishes the rest.
pub(super) fn factor(mut h: Matrix, blocks: &[Range<usize>]) -> Factored<Matrix> {
    let n = h.cols();
    let mut diagonal = vec![0.0f32; n];
    let mut inverses = Matrix::zeros(n, BLOCK);
    for block in blocks.iter().rev() {
        let width = block.len();
        let panel = updated_panel(&h, &h, block);
        let mut root: Vec<f64> = panel[block.start * width..].iter().map(|&v| f64::from(v)).collect();
        if let Err(pivot) = dispatch(|| factor_block(&mut root, width)) {
            return Factored::NotPositive { pivot: block.start + pivot };
        }
        for (i, d) in diagonal[block.clone()].iter_mut().enumerate() {
            *d = root[i * width + i] as f32;
        }
        let inverse = dispatch(|| unit_inverse(&root, width));
        // R_BB⁻ᵀ = Ū_BBᵀ·diag(R_BB)⁻¹ finishes the rows above the block.
        let mut finish = Matrix::zeros(width, width);
        for i in 0..width {
            for j in i..width {
                finish.row_mut(j)[i] = (inverse[i * width + j] / root[i * width + i]) as f32;
                inverses.row_mut(block.start + i)[j] = inverse[i * width + j] as f32;
                h.row_mut(block.start + i)[block.start + j] = root[i * width + j] as f32;
            }
        }
        write_panel(&mut h, &panel, block, &Strips::new(&finish, 0..width, 0..width));
    }
    let scale: Vec<f32> = diagonal.iter().map(|d| 1.0 / d).collect();
    each_chunk(h.data_mut(), n, |i, row| {
        row[..i].fill(0.0);
        row[i..].iter_mut().zip(&scale[i..]).for_each(|(value, s)| *value *= s);
        row[i] = 1.0;
    });
    Factored::Done(Factor { root: h, inverses, diagonal: Matrix::row_vector(diagonal) })
}

/// `M = α·triu(Y, 1)·diag(R)⁻²` with `Y·R̄ᵀ = C`, and `P_BB = M_BB·Ū_BB`.
pub(super) fn cross_factor(
    mut c: Matrix,
    factor: &Factor<Matrix>,
    blocks: &[Range<usize>],
    alpha: f32,
) -> CrossFactor<Matrix> {
    let n = c.cols();
    for block in blocks.iter().rev() {
        let panel = updated_panel(&c, &factor.root, block);
        let width = block.len();
        let right = Strips::transposed(&factor.inverses, block.clone(), 0..width);
        write_panel(&mut c, &panel, block, &right);
        let mut corner = vec![0.0; width * width];
        let last = Rows { data: &panel[block.start * width..], stride: width };
        right.add_to(1.0, last, RowsMut { data: &mut corner, stride: width }, width);
        for (i, row) in corner.chunks(width).enumerate() {
            c.row_mut(block.start + i)[block.clone()].copy_from_slice(row);
        }
    }
    let scale: Vec<f32> = factor.diagonal.data().iter().map(|d| alpha / (d * d)).collect();
    each_chunk(c.data_mut(), n, |i, row| {
        row[..=i].fill(0.0);
        row[i + 1..].iter_mut().zip(&scale[i + 1..]).for_each(|(value, s)| *value *= s);
    });
    let mut products = Matrix::zeros(n, BLOCK);
    for block in blocks {
        let inverse = Strips::new(&factor.inverses, block.clone(), 0..block.len());
        let to = &mut products.data_mut()[block.start * BLOCK..];
        let from = Rows { data: &c.data()[block.start * n + block.start..], stride: n };
        inverse.add_to(1.0, from, RowsMut { data: to, stride: BLOCK }, block.len());
    }
    CrossFactor { scaled: c, blocks: products }
}

/// `A = R·Rᵀ` in place on the upper triangle, from the last column backwards. Errs with the first pivot that is not
/// positive.
#[inline(always)]
fn factor_block(a: &mut [f64], width: usize) -> Result<(), usize> {
    let mut column = vec![0.0; width];
    for j in (0..width).rev() {
        let pivot = a[j * width + j];
        // Also refuses NaN.
        if !(pivot > 0.0 && pivot.is_finite()) {
            return Err(j);
        }
        let root = pivot.sqrt();
        a[j * width + j] = root;
        for i in 0..j {
            a[i * width + j] /= root;
            column[i] = a[i * width + j];
        }
        for i in 0..j {
            let r = column[i];
            for (value, c) in a[i * width + i..i * width + j].iter_mut().zip(&column[i..j]) {
                *value -= r * c;
            }
        }
    }
    Ok(())
}

/// Inverse of `R·diag(R)⁻¹`, R upper triangular.
#[inline(always)]
fn unit_inverse(r: &[f64], width: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; width * width];
    for i in (0..width).rev() {
        let (above, below) = inverse.split_at_mut((i + 1) * width);
        let row = &mut above[i * width..];
        row[i] = 1.0;
        for k in i + 1..width {
            let factor = r[i * width + k] / r[k * width + k];
            let from = &below[(k - i - 1) * width..][..width];
            for (value, v) in row[k..].iter_mut().zip(&from[k..]) {
                *value -= factor * v;
            }
        }
    }
    inverse
}

/// Rows `0..block.end` of `x`'s columns `block`, less the part that the columns to the right account for:
/// `x[:, block] − x[:, later]·r[block, later]ᵀ`.
fn updated_panel(x: &Matrix, r: &Matrix, block: &Range<usize>) -> Vec<f32> {
    let (n, width) = (x.cols(), block.len());
    let strips = Strips::transposed(r, block.clone(), block.end..n);
    let mut panel = vec![0.0; block.end * width];
    each_chunk(&mut panel, width, |i, row| row.copy_from_slice(&x.row(i)[block.clone()]));
    let later = Rows { data: x.data().get(block.end..).unwrap_or_default(), stride: n };
    strips.add_product(-1.0, later, RowsMut { data: &mut panel, stride: width }, 0);
    panel
}

/// `x[..block.start, block] = panel·right`.
fn write_panel(x: &mut Matrix, panel: &[f32], block: &Range<usize>, right: &Strips) {
    let (n, width) = (x.cols(), block.len());
    let above = &mut x.data_mut()[..block.start * n];
    each_chunk(above, n, |_, row| row[block.clone()].fill(0.0));
    right.add_product(1.0, Rows { data: panel, stride: width }, RowsMut { data: above, stride: n }, block.start);
}
