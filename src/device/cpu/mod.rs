//! The CPU device: float32, threads over fixed tiles, so that results do not depend on the number of threads.

pub(crate) mod gemm;
mod model;
pub(crate) mod packed;
mod solve;
pub(crate) mod vector;

use super::Device;
use crate::tensor::Matrix;
use anyhow::Result;

/// The CPU. Threads come from the surrounding rayon pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Device for Cpu {
    type Tensor = Matrix;

    fn name(&self) -> String {
        "cpu".into()
    }

    fn upload(&self, matrix: Matrix) -> Result<Matrix> {
        Ok(matrix)
    }

    fn download(&self, tensor: &Matrix) -> Result<Matrix> {
        Ok(tensor.clone())
    }

    fn shape(&self, tensor: &Matrix) -> (usize, usize) {
        (tensor.rows(), tensor.cols())
    }
}
