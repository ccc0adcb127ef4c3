//! Dense row-major matrices on the host, the currency between modules, and the float types that tensors are stored in.

use anyhow::{Result, ensure};
use half::{bf16, f16};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// A float type that tensors are stored in: weights and activations of a model, and scales, which are rounded to it before they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Float {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Single precision.
    F32,
}

impl Float {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// `value` rounded (to nearest, ties to even) to this type.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
            Self::F32 => value,
        }
    }

    /// Smallest positive value of this type.
    pub fn smallest(self) -> f32 {
        match self {
            Self::F16 => f16::from_bits(1).to_f32(),
            Self::Bf16 => bf16::from_bits(1).to_f32(),
            Self::F32 => f32::from_bits(1),
        }
    }
}

/// A dense row-major float32 matrix on the host: element (r, c) is `data[r * cols + c]`.
///
/// A vector is a matrix of one row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl Matrix {
    /// Wraps `data` (`rows * cols` values, row by row). Errors when the length disagrees with the shape.
    pub fn new(rows: usize, cols: usize, data: Vec<f32>) -> Result<Self> {
        ensure!(data.len() == rows * cols, "{} values cannot form a {rows}x{cols} matrix", data.len());
        Ok(Self { rows, cols, data })
    }

    /// A matrix of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// A matrix of one row.
    pub fn row_vector(data: Vec<f32>) -> Self {
        Self { rows: 1, cols: data.len(), data }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, row by row.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All values, row by row, to write to.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// Gives the values up, row by row.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }

    /// Row `r`.
    pub fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// Row `r`, to write to.
    pub fn row_mut(&mut self, r: usize) -> &mut [f32] {
        &mut self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// Row and column of the first value that is NaN or infinite.
    pub fn first_non_finite(&self) -> Option<(usize, usize)> {
        // Without a way out inside, the loop runs on vectors.
        let clean = |row: &[f32]| row.iter().fold(true, |all, v| all & v.is_finite());
        let row = self.data.par_chunks(self.cols.max(1)).position_first(|row| !clean(row))?;
        let column = self.row(row).iter().position(|v| !v.is_finite())?;
        Some((row, column))
    }

    /// A matrix of the same values under another shape. Errors when the sizes disagree.
    pub fn reshaped(self, rows: usize, cols: usize) -> Result<Self> {
        Self::new(rows, cols, self.data)
    }
}
