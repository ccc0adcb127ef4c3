//! What the C API offers beyond the operations of a run: packing, the full inverse's factor, conversion.

use super::Cuda;
use super::bindings::{vlmq_cholesky_inverse_args, vlmq_convert_args, vlmq_pack_args, vlmq_unpack_args};
use super::memory::Memory;
use super::tensor::{CudaTensor, dtype_of};
use crate::device::checks::Header;
use crate::device::{WIDTHS, told_widths};
use crate::tensor::Float;
use anyhow::{Result, ensure};
use std::ptr;

/// The way through a matrix of codes that consecutive bits run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodesAlong {
    /// Along a row: words `[rows, ⌈cols · bits / 32⌉]`, as `weight_packed` of compressed-tensors.
    Rows,
    /// Down a column: words `[⌈rows · bits / 32⌉, cols]`, as `qweight` of GPTQ files (of the transposed layer).
    Columns,
}

/// A matrix of codes and how it is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeMatrix {
    /// Rows of codes.
    pub rows: usize,
    /// Columns of codes.
    pub cols: usize,
    /// Width of a code, one of [`WIDTHS`].
    pub bits: u32,
    /// Direction.
    pub along: CodesAlong,
    /// Taken off every code modulo `2^bits` before it is packed, and added again when it is unpacked: 1 for the zeros of
    /// GPTQ files.
    pub offset: u8,
}

impl CodeMatrix {
    /// Runs of codes, and codes of a run.
    fn runs(&self) -> (usize, usize) {
        match self.along {
            CodesAlong::Rows => (self.rows, self.cols),
            CodesAlong::Columns => (self.cols, self.rows),
        }
    }

    /// Words of all codes.
    pub fn words(&self) -> usize {
        let (runs, count) = self.runs();
        runs * (count * self.bits as usize).div_ceil(32)
    }

    /// Strides from code to code and from run to run, and the same of words.
    fn strides(&self) -> [i64; 4] {
        let words = (self.cols * self.bits as usize).div_ceil(32);
        match self.along {
            CodesAlong::Rows => [1, self.cols as i64, 1, words as i64],
            CodesAlong::Columns => [self.cols as i64, 1, self.cols as i64, 1],
        }
    }

    fn check(&self, codes: usize, words: usize) -> Result<()> {
        ensure!(WIDTHS.contains(&self.bits), "codes of {} bits; known are {}", self.bits, told_widths("and"));
        ensure!(
            codes == self.rows * self.cols && words == self.words(),
            "{codes} codes and {words} words for a matrix of {}x{} codes of {} bits",
            self.rows,
            self.cols,
            self.bits
        );
        Ok(())
    }
}

impl Cuda {
    /// Packs codes `[rows, cols]`, each below `2^bits`, on the device. Errors where sizes disagree.
    pub fn pack(&self, codes: &[u8], matrix: &CodeMatrix) -> Result<Vec<u32>> {
        matrix.check(codes.len(), matrix.words())?;
        let codes = Memory::of(&self.runtime, codes)?;
        let mut words = Memory::new(&self.runtime, matrix.words() * size_of::<u32>())?;
        let (runs, count) = matrix.runs();
        let [code_stride, code_run_stride, word_stride, word_run_stride] = matrix.strides();
        self.launch(&vlmq_pack_args {
            codes: codes.at(0),
            words: words.at_mut(0),
            runs: runs as i64,
            count: count as i64,
            code_stride,
            code_run_stride,
            word_stride,
            word_run_stride,
            bits: matrix.bits as i32,
            subtract: matrix.offset.into(),
        })?;
        words.read(0, matrix.words())
    }

    /// The inverse of [`pack`](Self::pack).
    pub fn unpack(&self, words: &[u32], matrix: &CodeMatrix) -> Result<Vec<u8>> {
        let count_of_codes = matrix.rows * matrix.cols;
        matrix.check(count_of_codes, words.len())?;
        let words = Memory::of(&self.runtime, words)?;
        let mut codes = Memory::new(&self.runtime, count_of_codes)?;
        let (runs, count) = matrix.runs();
        let [code_stride, code_run_stride, word_stride, word_run_stride] = matrix.strides();
        self.launch(&vlmq_unpack_args {
            words: words.at(0),
            codes: codes.at_mut(0),
            runs: runs as i64,
            count: count as i64,
            code_stride,
            code_run_stride,
            word_stride,
            word_run_stride,
            bits: matrix.bits as i32,
            add: matrix.offset.into(),
        })?;
        codes.read(0, count_of_codes)
    }

    /// U with `H⁻¹ = UᵀU`, upper triangular, of H damped by `damp · mean(diagonal)`: what solvers of the GPTQ family read
    /// (method section 3, step 4). `h` `[n, n]` float32 by its upper triangle. Errors, naming the pivot, where the damped
    /// matrix is not positive definite.
    pub fn cholesky_inverse(&self, mut h: CudaTensor, damp: f32) -> Result<CudaTensor> {
        let n = h.cols;
        ensure!(h.rows == n, "{} is not square", h.describe());
        let mut status = Memory::of(&self.runtime, &[-1i32])?;
        self.launch_with_workspace(vlmq_cholesky_inverse_args {
            h: self.floats_mut(&mut h)?,
            damp,
            n: n as i64,
            status: status.at_mut(0),
            workspace: ptr::null_mut(),
            workspace_bytes: 0,
        })?;
        let pivot = status.read::<i32>(0, 1)?[0];
        ensure!(pivot < 0, "H is not positive definite with damping {damp}: pivot {pivot}; damp more");
        Ok(h)
    }

    /// A tensor of the same numbers in another precision, rounded to nearest.
    pub fn convert(&self, x: &CudaTensor, precision: Float) -> Result<CudaTensor> {
        let mut out = self.tensor(x.rows, x.cols, precision)?;
        self.launch(&vlmq_convert_args {
            x: self.read(x)?,
            out: self.write(&mut out)?,
            count: (x.rows * x.cols) as i64,
            from: dtype_of(x.precision),
            to: dtype_of(precision),
        })?;
        Ok(out)
    }
}
