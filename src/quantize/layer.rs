//! A quantized linear layer: integer codes and what turns them back into weights.

use crate::tensor::Matrix;
use rayon::prelude::*;
use serde::Serialize;

/// Codes, scales and zeros of one linear layer, columns in the *original* order.
///
/// The weight it stands for is `scale · (code − zero)`, see [`dequantize`](Self::dequantize).
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedLinear {
    /// Output features (rows).
    pub out_features: usize,
    /// Input features (columns).
    pub in_features: usize,
    /// Width of a code: 2, 3, 4 or 8.
    pub bits: u32,
    /// Columns that share a scale; `in_features` when the whole row does.
    pub group_columns: usize,
    /// Whether every zero is `2^(bits − 1)`.
    pub symmetric: bool,
    /// `[out, in]`, each below `2^bits`.
    pub codes: Vec<u8>,
    /// `[out, groups]`, every value exact in the storage type it was made for.
    pub scales: Vec<f32>,
    /// `[out, groups]`, each below `2^bits`.
    pub zeros: Vec<u8>,
    /// Group of each input column, when groups are not consecutive runs of columns (`--order act`).
    pub group_index: Option<Vec<u32>>,
}

impl QuantizedLinear {
    /// Number of groups in a row.
    pub fn groups(&self) -> usize {
        self.in_features.div_ceil(self.group_columns)
    }

    /// Group of input column `column`.
    pub fn group_of(&self, column: usize) -> usize {
        self.group_index.as_ref().map_or(column / self.group_columns, |index| index[column] as usize)
    }

    /// The weights these codes stand for, `[out, in]`, in float32.
    pub fn dequantize(&self) -> Matrix {
        let groups = self.groups();
        let group_of: Vec<usize> = (0..self.in_features).map(|column| self.group_of(column)).collect();
        let mut weight = Matrix::zeros(self.out_features, self.in_features);
        weight.data_mut().par_chunks_mut(self.in_features.max(1)).enumerate().for_each(|(row, weight)| {
            let codes = &self.codes[row * self.in_features..(row + 1) * self.in_features];
            let scales = &self.scales[row * groups..(row + 1) * groups];
            let zeros = &self.zeros[row * groups..(row + 1) * groups];
            for ((value, &code), &group) in weight.iter_mut().zip(codes).zip(&group_of) {
                *value = scales[group] * (f32::from(code) - f32::from(zeros[group]));
            }
        });
        weight
    }
}

/// What one layer's solve has to say of itself.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SolveReport {
    /// `‖(Ŵ−W)‖²_H / ‖W‖²_H` with the undamped H; for round-to-nearest without statistics, in the Frobenius norm.
    pub relative_error: f64,
    /// Damping λ that the factorization succeeded with; `None` where none was made.
    pub damp: Option<f64>,
    /// Inputs that no calibration token excites.
    pub dead_inputs: usize,
    /// Calibration tokens behind the statistics.
    pub tokens: usize,
    /// Wall-clock seconds of the solve, factorization included where this layer caused it.
    pub seconds: f64,
}
