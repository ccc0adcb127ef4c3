//! Linear layers of a checkpoint, stored as plain numbers or as codes.

use super::config::Quantization;
use super::formats::{compressed_tensors, gptq};
use super::read::Checkpoint;
use crate::codes::QuantizedLinear;
use crate::tensor::Matrix;
use anyhow::{Result, bail};

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
    pub(crate) fn is_plain(&self, module: &str) -> bool {
        self.contains(&format!("{module}.weight")) || !self.is_quantized()
    }

    /// The weight of the linear layer `module` (its name on disk, without `.weight`) in float32, `[out, in]`: as stored,
    /// or what its codes stand for. Errors as [`stored_matrix`](Self::stored_matrix) and [`packed`](Self::packed) do.
    pub fn linear(&self, module: &str, out_features: usize, in_features: usize) -> Result<Matrix> {
        if self.is_plain(module) {
            return self.matrix(&format!("{module}.weight"), out_features, in_features);
        }
        self.packed(module, out_features, in_features)?.dequantize()
    }
}
