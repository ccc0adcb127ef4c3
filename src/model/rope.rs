//! Rotary position embedding: frequencies, and tables of cosines and sines.

use crate::device::{ModelOps, Rotary};
use crate::tensor::Matrix;
use anyhow::Result;

/// Inverse frequencies `base^(−2j / dim)` for `j` in `0..dim / 2`, in float32 as the models compute them.
pub fn inverse_frequencies(base: f64, dim: usize) -> Vec<f32> {
    (0..dim / 2).map(|j| (1.0 / base.powf(2.0 * j as f64 / dim as f64)) as f32).collect()
}

/// Tables for multimodal positions (t, h, w): frequency `j` turns with the axis whose section holds `j`
/// (arXiv 2409.12191, section 2.1). With three equal positions a token has, this is the plain embedding.
pub fn multimodal<D: ModelOps>(
    device: &D,
    positions: &[[u32; 3]],
    frequencies: &[f32],
    sections: [usize; 3],
) -> Result<Rotary<D::Tensor>> {
    let axes: Vec<usize> = sections.iter().enumerate().flat_map(|(axis, &n)| std::iter::repeat_n(axis, n)).collect();
    tables(device, positions.len(), frequencies.len(), |token, j| positions[token][axes[j]] as f32 * frequencies[j])
}

/// Tables for two-dimensional positions (row, column) of image patches: the first half of the columns turns with the
/// row, the second with the column, over the same frequencies.
pub fn axial<D: ModelOps>(device: &D, positions: &[[u32; 2]], frequencies: &[f32]) -> Result<Rotary<D::Tensor>> {
    let per_axis = frequencies.len();
    tables(device, positions.len(), 2 * per_axis, |patch, j| {
        positions[patch][j / per_axis] as f32 * frequencies[j % per_axis]
    })
}

fn tables<D: ModelOps>(
    device: &D,
    rows: usize,
    cols: usize,
    angle: impl Fn(usize, usize) -> f32,
) -> Result<Rotary<D::Tensor>> {
    let angles: Vec<f32> = (0..rows * cols).map(|i| angle(i / cols, i % cols)).collect();
    let table = |f: fn(f32) -> f32| Matrix::new(rows, cols, angles.iter().copied().map(f).collect());
    Ok(Rotary { cos: device.upload(table(f32::cos)?)?, sin: device.upload(table(f32::sin)?)? })
}
