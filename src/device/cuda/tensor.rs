//! Matrices in device memory.

use super::bindings::vlmq_dtype;
use super::memory::Memory;
use crate::device::checks::Header;
use crate::parallel::each_chunk;
use crate::tensor::{Float, Matrix};
use anyhow::Result;
use bytemuck::Pod;
use half::{bf16, f16};
use std::borrow::Cow;

/// The bytes of `values` in this type, rounded to nearest, ties to even.
pub(super) fn encode(float: Float, values: &[f32]) -> Cow<'_, [u8]> {
    match float {
        Float::F32 => Cow::Borrowed(bytemuck::cast_slice(values)),
        Float::Bf16 => Cow::Owned(narrow(values, bf16::from_f32)),
        Float::F16 => Cow::Owned(narrow(values, f16::from_f32)),
    }
}

/// The float type as the C API names it.
pub(super) fn dtype_of(float: Float) -> vlmq_dtype {
    match float {
        Float::F32 => vlmq_dtype::VLMQ_F32,
        Float::Bf16 => vlmq_dtype::VLMQ_BF16,
        Float::F16 => vlmq_dtype::VLMQ_F16,
    }
}

/// Values that a thread converts at a time, at least.
const TILE: usize = 1 << 15;

fn narrow<T: Pod + Send + Sync>(values: &[f32], one: fn(f32) -> T) -> Vec<u8> {
    let mut bytes = vec![0; size_of_val(values) / size_of::<f32>() * size_of::<T>()];
    each_chunk(&mut bytes, TILE * size_of::<T>(), |i, bytes| {
        for (bytes, &value) in bytes.chunks_exact_mut(size_of::<T>()).zip(&values[i * TILE..]) {
            bytes.copy_from_slice(bytemuck::bytes_of(&one(value)));
        }
    });
    bytes
}

/// A dense row-major matrix `[rows, cols]` in the memory of a [`Cuda`](super::Cuda) device.
pub struct CudaTensor {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) precision: Float,
    /// At least `rows · cols` elements: more where rows are appended.
    pub(super) memory: Memory,
}

impl CudaTensor {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element type.
    pub fn precision(&self) -> Float {
        self.precision
    }

    /// Bytes of a row.
    pub(super) fn row_bytes(&self) -> usize {
        self.cols * self.precision.bytes()
    }

    /// Bytes of all rows.
    pub(super) fn bytes(&self) -> usize {
        self.rows * self.row_bytes()
    }

    /// All values, on the host.
    pub(super) fn to_host(&self) -> Result<Matrix> {
        let values = match self.precision {
            Float::F32 => self.memory.read(0, self.rows * self.cols)?,
            half => half.widen(&self.memory.read(0, self.bytes())?),
        };
        Matrix::new(self.rows, self.cols, values)
    }
}

impl Header for CudaTensor {
    fn header(&self) -> (usize, usize, Float) {
        (self.rows, self.cols, self.precision)
    }
}
