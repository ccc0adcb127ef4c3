//! Rotary position embedding: frequencies, and tables of cosines and sines.

use crate::device::{ModelOps, Rotary};
use crate::parallel::each_chunk;
use crate::tensor::Matrix;
use anyhow::Result;

/// Inverse frequencies `base^(−2j / dim)` for `j` in `0..dim / 2`, in float32 as the models compute them.
pub fn inverse_frequencies(base: f64, dim: usize) -> Vec<f32> {
    (0..dim / 2).map(|j| (1.0 / base.powf(2.0 * j as f64 / dim as f64)) as f32).collect()
}

/// The axis of a token's position (temporal, row, column) that each rotary frequency turns with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeAxes {
    /// One axis: plain rotary embedding.
    Text,
    /// So many frequencies in a row for each axis (M-RoPE, arXiv 2409.12191, section 2.1).
    Sections([usize; 3]),
    /// Frequencies take turns: `3 i + 1` is of the row and `3 i + 2` of the column as long as `i` is below their count, all
    /// others are temporal (Qwen3-VL, arXiv 2511.21631).
    Interleaved([usize; 3]),
}

impl RopeAxes {
    /// The axis of frequency `j`: 0 temporal, 1 row, 2 column.
    pub fn axis(self, j: usize) -> usize {
        match self {
            Self::Text => 0,
            Self::Sections([temporal, row, _]) => usize::from(j >= temporal) + usize::from(j >= temporal + row),
            Self::Interleaved(sections) => match j % 3 {
                0 => 0,
                axis => {
                    if j / 3 < sections[axis] {
                        axis
                    } else {
                        0
                    }
                }
            },
        }
    }
}

/// Tables for the decoder's positions (t, h, w): frequency `j` turns with the axis that `axes` gives it. With three equal
/// positions a token has, this is the plain embedding.
pub fn multimodal<D: ModelOps>(
    device: &D,
    positions: &[[u32; 3]],
    frequencies: &[f32],
    axes: RopeAxes,
) -> Result<Rotary<D::Tensor>> {
    tables(device, positions.len(), frequencies.len(), |token, j| {
        positions[token][axes.axis(j)] as f32 * frequencies[j]
    })
}

/// Tables for two-dimensional positions (row, column) of image patches: the first half of the columns turns with the
/// row, the second with the column, over the same frequencies.
pub fn axial<D: ModelOps>(device: &D, positions: &[[u32; 2]], frequencies: &[f32]) -> Result<Rotary<D::Tensor>> {
    let per_axis = frequencies.len();
    tables(device, positions.len(), 2 * per_axis, |patch, j| {
        positions[patch][j / per_axis] as f32 * frequencies[j % per_axis]
    })
}

/// Rows of a table that a thread computes at a time.
const ROWS: usize = 64;

fn tables<D: ModelOps>(
    device: &D,
    rows: usize,
    cols: usize,
    angle: impl Fn(usize, usize) -> f32 + Sync,
) -> Result<Rotary<D::Tensor>> {
    let table = |f: fn(f32) -> f32| {
        device.upload_with((rows, cols), || {
            let mut table = Matrix::zeros(rows, cols);
            each_chunk(table.data_mut(), ROWS * cols, |i, values| {
                for (row, values) in values.chunks_exact_mut(cols).enumerate() {
                    values.iter_mut().enumerate().for_each(|(j, value)| *value = f(angle(i * ROWS + row, j)));
                }
            });
            Ok(table)
        })
    };
    Ok(Rotary { cos: table(f32::cos)?, sin: table(f32::sin)? })
}

#[cfg(test)]
mod tests {
    use super::RopeAxes;

    fn axes(axes: RopeAxes, count: usize) -> Vec<usize> {
        (0..count).map(|j| axes.axis(j)).collect()
    }

    #[test]
    fn sections_follow_each_other_and_interleave() {
        assert_eq!(axes(RopeAxes::Text, 4), [0; 4]);
        assert_eq!(axes(RopeAxes::Sections([2, 3, 1]), 6), [0, 0, 1, 1, 1, 2]);
        assert_eq!(axes(RopeAxes::Interleaved([4, 2, 1]), 7), [0, 1, 2, 0, 1, 0, 0]);
        // Qwen3-VL: 64 frequencies, 24, 20, 20.
        let counts = |axis| axes(RopeAxes::Interleaved([24, 20, 20]), 64).iter().filter(|&&a| a == axis).count();
        assert_eq!([counts(0), counts(1), counts(2)], [24, 20, 20]);
    }
}
