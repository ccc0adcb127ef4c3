//! A quantized linear layer: integer codes and what turns them back into weights.

use crate::device::cpu::Cpu;
use crate::device::{ModelOps, QuantizedWeight};
use crate::tensor::Matrix;
use anyhow::Result;

/// Codes, scales and zeros of one linear layer, columns in the *original* order.
///
/// The weight it stands for is `scale · (code − zero)`, see [`dequantize`](Self::dequantize).
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedLinear {
    /// Output features (rows).
    pub out_features: usize,
    /// Input features (columns).
    pub in_features: usize,
    /// Width of a code, one of [`WIDTHS`](crate::device::WIDTHS).
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

    /// What a device needs to turn the codes into weights.
    pub fn weight(&self) -> QuantizedWeight<'_> {
        QuantizedWeight {
            rows: self.out_features,
            cols: self.in_features,
            codes: &self.codes,
            scales: &self.scales,
            zeros: &self.zeros,
            group_index: self.group_index.as_deref(),
        }
    }

    /// The weights these codes stand for, `[out, in]`, in float32. Errors where codes, scales and zeros are not as many
    /// as the shape asks for.
    pub fn dequantize(&self) -> Result<Matrix> {
        Cpu.dequantize(&self.weight())
    }
}
