//! Model operations on the CPU.

mod attention;
mod elementwise;
mod product;

pub(super) use attention::QUERY_BLOCK;

use super::Cpu;
use crate::device::{Activation, AttentionOperands, ModelOps, QuantizedWeight, Rotary};
use crate::parallel::each_chunk;
use crate::tensor::{Float, Matrix};
use anyhow::{Result, ensure};
use std::ops::Range;

impl ModelOps for Cpu {
    fn upload_model(&self, matrix: Matrix) -> Result<Matrix> {
        Ok(matrix)
    }

    fn dequantize(&self, weight: &QuantizedWeight<'_>) -> Result<Matrix> {
        weight.groups()?;
        let mut out = Matrix::zeros(weight.rows, weight.cols);
        each_chunk(out.data_mut(), weight.cols, |row, out| weight.row(row, out));
        Ok(out)
    }

    fn element_type(&self) -> Float {
        Float::F32
    }

    fn gather_rows(&self, table: &Matrix, indices: &[u32]) -> Result<Matrix> {
        let mut data = Vec::with_capacity(indices.len() * table.cols());
        for &index in indices {
            let index = index as usize;
            ensure!(index < table.rows(), "row {index} asked of a table of {} rows", table.rows());
            data.extend_from_slice(table.row(index));
        }
        Matrix::new(indices.len(), table.cols(), data)
    }

    fn scatter_rows(&self, target: &mut Matrix, indices: &[u32], source: &Matrix) -> Result<()> {
        ensure!(
            indices.len() == source.rows() && target.cols() == source.cols(),
            "{} rows of {} columns do not go into {} places of {} columns",
            source.rows(),
            source.cols(),
            indices.len(),
            target.cols()
        );
        for (i, &index) in indices.iter().enumerate() {
            target.row_mut(index as usize).copy_from_slice(source.row(i));
        }
        Ok(())
    }

    fn slice_rows(&self, x: &Matrix, rows: Range<usize>) -> Result<Matrix> {
        Matrix::new(rows.len(), x.cols(), x.data()[rows.start * x.cols()..rows.end * x.cols()].to_vec())
    }

    fn append_rows(&self, x: &mut Matrix, more: &Matrix) -> Result<()> {
        ensure!(x.cols() == more.cols(), "rows of {} columns do not append to rows of {}", more.cols(), x.cols());
        let rows = x.rows() + more.rows();
        let cols = x.cols();
        let mut data = std::mem::take(x).into_data();
        if data.capacity() < rows * cols {
            // With room for some more, but not for as many again.
            data.reserve_exact(more.data().len().max(data.len() / 8));
        }
        data.extend_from_slice(more.data());
        *x = Matrix::new(rows, cols, data)?;
        Ok(())
    }

    fn reshape(&self, x: Matrix, rows: usize, cols: usize) -> Result<Matrix> {
        x.reshaped(rows, cols)
    }

    fn linear(&self, x: &Matrix, weight: &Matrix, bias: Option<&Matrix>) -> Result<Matrix> {
        product::linear(x, weight, bias)
    }

    fn matmul(&self, a: &Matrix, b: &Matrix) -> Result<Matrix> {
        product::matmul(a, b)
    }

    fn add_assign(&self, x: &mut Matrix, y: &Matrix) -> Result<()> {
        elementwise::add_assign(x, y)
    }

    fn scaled_difference(&self, a: &Matrix, b: &Matrix, factor: f32) -> Result<Matrix> {
        elementwise::scaled_difference(a, b, factor)
    }

    fn rms_norm(&self, x: &Matrix, weight: &Matrix, eps: f32) -> Result<Matrix> {
        elementwise::rms_norm(x, weight, eps)
    }

    fn rms_norm_backward(&self, x: &Matrix, weight: &Matrix, d_out: &Matrix, eps: f32) -> Result<Matrix> {
        elementwise::rms_norm_backward(x, weight, d_out, eps)
    }

    fn layer_norm(&self, x: &Matrix, weight: &Matrix, bias: &Matrix, eps: f32) -> Result<Matrix> {
        elementwise::layer_norm(x, weight, bias, eps)
    }

    fn rotate(&self, x: &mut Matrix, rotary: &Rotary<Matrix>, transposed: bool) -> Result<()> {
        elementwise::rotate(x, rotary, transposed)
    }

    fn attention(&self, operands: &AttentionOperands<'_, Matrix>) -> Result<Matrix> {
        attention::forward(operands)
    }

    fn attention_backward(
        &self,
        operands: &AttentionOperands<'_, Matrix>,
        d_out: &Matrix,
    ) -> Result<(Matrix, Matrix, Matrix)> {
        attention::backward(operands, d_out)
    }

    fn activate(&self, x: &Matrix, activation: Activation) -> Result<Matrix> {
        Ok(elementwise::activate(x, activation))
    }

    fn gated(&self, gate: &Matrix, up: &Matrix, activation: Activation) -> Result<Matrix> {
        elementwise::gated(gate, up, activation)
    }

    fn mean_abs_rows(&self, x: &Matrix) -> Result<Matrix> {
        Matrix::new(x.rows(), 1, elementwise::mean_abs_rows(x))
    }
}
