//! The CPU device: float32, threads over fixed tiles, so that results do not depend on the number of threads.

pub(crate) mod gemm;
mod model;
mod solve;
pub(crate) mod strips;
pub(crate) mod vector;
mod workspace;

use super::{Device, Work};
use crate::parallel::{each_chunk, map};
use crate::tensor::Matrix;
use anyhow::{Result, ensure};
use std::borrow::Cow;

/// The CPU. Threads come from the surrounding rayon pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Device for Cpu {
    type Tensor = Matrix;

    fn name(&self) -> String {
        "cpu".into()
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(Matrix::zeros(rows, cols))
    }

    fn clear(&self, tensor: &mut Matrix) -> Result<()> {
        each_chunk(tensor.data_mut(), 1 << 16, |_, chunk| chunk.fill(0.0));
        Ok(())
    }

    fn upload(&self, matrix: Matrix) -> Result<Matrix> {
        Ok(matrix)
    }

    fn download(&self, tensor: &Matrix) -> Result<Matrix> {
        Ok(tensor.clone())
    }

    fn bytes<'a>(&self, tensor: &'a Matrix) -> Result<Cow<'a, [u8]>> {
        Ok(Cow::Borrowed(bytemuck::cast_slice(tensor.data())))
    }

    fn first_non_finite_row(&self, tensor: &Matrix) -> Result<Option<usize>> {
        Ok(tensor.first_non_finite().map(|(row, _)| row))
    }

    fn scaled_squares_rows(&self, tensor: &Matrix, scales: &[f32]) -> Result<Vec<f32>> {
        ensure!(tensor.cols() == scales.len(), "{} scales for {} columns", scales.len(), tensor.cols());
        Ok(map(tensor.rows(), |row| vector::scaled_squares(tensor.row(row), scales)))
    }

    fn workspace(&self, work: Work) -> u64 {
        workspace::bytes(work, rayon::current_num_threads() as u64)
    }

    fn triangle_bytes(&self, features: usize) -> u64 {
        workspace::triangle(features as u64, solve::statistics_tile(features) as u64, workspace::page_bytes())
    }

    fn shape(&self, tensor: &Matrix) -> (usize, usize) {
        (tensor.rows(), tensor.cols())
    }
}
