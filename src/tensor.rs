//! Dense row-major matrices on the host, the currency between modules, and the float types that tensors are stored in.

use crate::parallel::each_chunk;
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
    #[inline]
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

    /// The little-endian bytes of some values of this type as float32, exactly.
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / self.bytes()];
        each_chunk(&mut values, TILE, |i, values| self.widen_to(&bytes[i * TILE * self.bytes()..], values));
        values
    }

    /// [`widen`](Self::widen) of as many values as there is room for.
    pub(crate) fn widen_to(self, bytes: &[u8], values: &mut [f32]) {
        match self {
            Self::F16 => widen::<2>(bytes, values, |b| f16::from_le_bytes(b).to_f32()),
            // Quieted, a NaN would be another one.
            Self::Bf16 => widen::<2>(bytes, values, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            Self::F32 => widen::<4>(bytes, values, f32::from_le_bytes),
        }
    }
}

/// Values that a thread widens at a time: large enough to hide the cost of a task, small enough to spread one embedding over
/// all cores.
const TILE: usize = 1 << 16;

#[inline(always)]
fn widen<const N: usize>(bytes: &[u8], values: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    // Tensors start at any byte of the file, so no cast: the compiler turns this into plain unaligned loads.
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = decode(*bytes);
    }
}

/// What lends a matrix as it is stored: a place in a file, whose pages it holds meanwhile, or a copy.
pub trait Stored {
    /// The matrix.
    fn stored(&self) -> StoredMatrix<'_>;
}

/// A dense row-major matrix as it is stored, of any float type: borrowed bytes, which a device of that type takes as they are.
///
/// A vector is a matrix of one row.
#[derive(Clone, Copy, Debug)]
pub struct StoredMatrix<'a> {
    float: Float,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

impl<'a> StoredMatrix<'a> {
    /// Wraps the little-endian `bytes`, of any alignment, of `rows * cols` values, row by row. Errors when their number disagrees
    /// with the shape.
    pub fn new(float: Float, rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self> {
        let wanted = rows.checked_mul(cols).and_then(|values| values.checked_mul(float.bytes()));
        ensure!(wanted == Some(bytes.len()), "{} bytes cannot form a {rows}x{cols} matrix of {float:?}", bytes.len());
        Ok(Self { float, rows, cols, bytes })
    }

    /// The type of the values.
    pub fn float(&self) -> Float {
        self.float
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The bytes of all values, row by row.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// A matrix of the same values in float32.
    pub fn to_matrix(&self) -> Matrix {
        Matrix { rows: self.rows, cols: self.cols, data: self.float.widen(self.bytes) }
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
    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, row by row.
    #[inline]
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All values, row by row, to write to.
    #[inline]
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// Gives the values up, row by row.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }

    /// Row `r`.
    #[inline]
    pub fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// Row `r`, to write to.
    #[inline]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_values_are_the_same_in_float32_at_any_alignment() {
        let values = [1.5f32, -0.0, 3.0e-5, -640.0, 0.25, 7.0];
        for float in [Float::F16, Float::Bf16, Float::F32] {
            // A byte before them, so that one of both starts is not aligned.
            let mut bytes = vec![0xaa];
            for &value in &values {
                match float {
                    Float::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                    Float::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                    Float::F32 => bytes.extend(value.to_le_bytes()),
                }
            }
            let rounded: Vec<u32> = values.iter().map(|&value| float.round(value).to_bits()).collect();
            let bits = |matrix: Matrix| matrix.data().iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            let stored = StoredMatrix::new(float, 2, 3, &bytes[1..]).unwrap();
            assert_eq!((stored.float(), stored.to_matrix().rows(), stored.to_matrix().cols()), (float, 2, 3));
            assert_eq!(bits(stored.to_matrix()), rounded, "{float:?}");
            assert!(StoredMatrix::new(float, 3, 3, &bytes[1..]).is_err());
            assert!(StoredMatrix::new(float, usize::MAX, 3, &bytes[1..]).is_err());
        }
    }
}
