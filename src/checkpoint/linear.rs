//! Linear layers of a checkpoint, stored as plain numbers or as codes.

use super::formats::{CodeFormat, Quantization, StoredLayer};
use super::read::Checkpoint;
use crate::codes::QuantizedLinear;
use crate::tensor::Matrix;
use anyhow::{Context, Result};

impl Checkpoint {
    /// How the linear layers are stored, `None` when they are plain floats.
    ///
    /// Errors, naming what it is, when config.json announces a quantization that is not read here.
    pub fn quantization(&self) -> Result<Option<Quantization>> {
        let parse = |entry| {
            Quantization::parse(entry)
                .with_context(|| format!("cannot use {}", self.folder().join("config.json").display()))
        };
        self.quantization_entry().map(parse).transpose()
    }

    /// What [`linear`](Self::linear) finds wrong with headers.
    #[cfg(feature = "run")]
    pub(crate) fn check_linear(&self, module: &str, out_features: usize, in_features: usize) -> Result<()> {
        if self.is_plain(module) {
            return self.check_matrix(&format!("{module}.weight"), out_features, in_features);
        }
        let (format, layer) = self.stored(module, out_features, in_features)?;
        format.check_headers(&layer)
    }

    /// Codes, scales and zeros of the linear layer `module` (its name on disk, without `.weight`).
    ///
    /// Errors when the layer is stored as plain floats, in a way that is not read here, or with tensors of wrong shape,
    /// dtype or content.
    pub fn packed(&self, module: &str, out_features: usize, in_features: usize) -> Result<QuantizedLinear> {
        let (format, layer) = self.stored(module, out_features, in_features)?;
        format.decode(&layer)
    }

    /// A layer of codes, and the format that they are in. Errors where nothing is quantized.
    fn stored<'a>(
        &'a self,
        module: &'a str,
        out_features: usize,
        in_features: usize,
    ) -> Result<(&'static dyn CodeFormat, StoredLayer<'a>)> {
        let known = self.quantization()?.and_then(|found| Some((found.format.codes()?, found.packing)));
        let (format, packing) =
            known.with_context(|| format!("{} is not quantized; {module} has no codes", self.folder().display()))?;
        Ok((format, StoredLayer { checkpoint: self, module, out_features, in_features, packing }))
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
