//! Linear layers of a checkpoint, stored as plain numbers or as codes.

use super::config::Quantization;
use super::formats::{compressed_tensors, gptq};
use super::mapped::Mapped;
use super::read::Checkpoint;
use crate::codes::QuantizedLinear;
use crate::tensor::Matrix;
use anyhow::{Result, bail};

/// A linear layer's weight as a checkpoint holds it.
#[derive(Debug)]
pub enum LinearWeight<'a> {
    /// Plain numbers.
    Plain(Mapped<'a>),
    /// Codes, scales and zeros.
    Quantized(QuantizedLinear),
}

impl Checkpoint {
    /// What [`linear`](Self::linear) finds wrong with headers.
    #[cfg(feature = "run")]
    pub(crate) fn check_linear(&self, module: &str, out_features: usize, in_features: usize) -> Result<()> {
        if self.is_plain(module) {
            return self.check_matrix(&format!("{module}.weight"), out_features, in_features);
        }
        match self.quantization()? {
            Some(Quantization::CompressedTensors(packing)) => {
                compressed_tensors::headers(self, module, out_features, in_features, packing).map(drop)
            }
            Some(Quantization::Gptq(packing, _)) => {
                gptq::headers(self, module, out_features, in_features, packing).map(drop)
            }
            None => self.not_quantized(module),
        }
    }

    /// Codes, scales and zeros of the linear layer `module` (its name on disk, without `.weight`).
    ///
    /// Errors when the layer is stored as plain floats, in a way that is not read here, or with tensors of wrong shape,
    /// dtype or content.
    pub fn packed(&self, module: &str, out_features: usize, in_features: usize) -> Result<QuantizedLinear> {
        match self.quantization()? {
            Some(Quantization::CompressedTensors(packing)) => {
                compressed_tensors::decode(self, module, out_features, in_features, packing)
            }
            Some(Quantization::Gptq(packing, version)) => {
                gptq::decode(self, module, out_features, in_features, packing, version)
            }
            None => self.not_quantized(module),
        }
    }

    fn not_quantized<T>(&self, module: &str) -> Result<T> {
        bail!("{} is not quantized; {module} has no codes", self.folder().display())
    }

    /// Whether the weight of a linear layer is stored as plain numbers.
    fn is_plain(&self, module: &str) -> bool {
        self.contains(&format!("{module}.weight")) || !self.is_quantized()
    }

    /// The weight of the linear layer `module` (its name on disk, without `.weight`), `[out, in]`. Errors as
    /// [`stored_matrix`](Self::stored_matrix) and [`packed`](Self::packed) do.
    pub fn linear_weight(&self, module: &str, out_features: usize, in_features: usize) -> Result<LinearWeight<'_>> {
        Ok(match self.is_plain(module) {
            true => LinearWeight::Plain(self.stored_matrix(&format!("{module}.weight"), out_features, in_features)?),
            false => LinearWeight::Quantized(self.packed(module, out_features, in_features)?),
        })
    }

    /// [`linear_weight`](Self::linear_weight) in float32: as stored, or what its codes stand for.
    pub fn linear(&self, module: &str, out_features: usize, in_features: usize) -> Result<Matrix> {
        match self.linear_weight(module, out_features, in_features)? {
            LinearWeight::Plain(weight) => Ok(weight.to_matrix()),
            LinearWeight::Quantized(codes) => codes.dequantize(),
        }
    }
}
