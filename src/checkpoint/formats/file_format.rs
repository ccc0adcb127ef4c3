//! What a file format is.

use super::served::{FamilySupport, InTransformers, Served};
use super::specs::{LinearSpec, TensorSpec};
use super::stored::StoredLayer;
use crate::checkpoint::config::Packing;
use crate::codes::{CodeLayout, QuantizedLinear};
use crate::tensor::Float;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt;

/// How a quantized checkpoint is stored: one file of this folder each, and a line in [`Format::ALL`].
pub trait FileFormat: fmt::Debug + Send + Sync {
    /// The name in reports.
    fn name(&self) -> &'static str;

    /// Storage type of scales, for a checkpoint whose weights are of type `weights`.
    fn scale_type(&self, weights: Float) -> Float {
        weights
    }

    /// Smallest zero that survives the format.
    fn smallest_zero(&self) -> u8 {
        0
    }

    /// Refuses layers and layouts that this format cannot hold, though others can, naming the layers and the sizes that work.
    fn check(&self, linears: &[LinearSpec], layout: &CodeLayout) -> Result<()>;

    /// The tensors that take the place of `{module}.weight`, in the order of [`encode`](Self::encode).
    fn specs(&self, linear: &LinearSpec, layout: &CodeLayout) -> Vec<TensorSpec>;

    /// Bytes of the tensors of [`specs`](Self::specs), in the same order, of a layer that is what `linear` and `layout` announced.
    ///
    /// Errors, naming the layer, where a zero does not fit its field.
    fn encode(&self, linear: &LinearSpec, layout: &CodeLayout, quantized: &QuantizedLinear) -> Result<Vec<Vec<u8>>>;

    /// How transformers loads the file; `None` where it is not known to.
    fn in_transformers(&self, layout: &CodeLayout, family: FamilySupport) -> Option<InTransformers>;

    /// What vLLM does with the file.
    fn in_vllm(&self, layout: &CodeLayout) -> Served;

    /// What SGLang does with the file, where it knows the model.
    fn in_sglang(&self, layout: &CodeLayout) -> Served;

    /// What a format has that stores codes; `None` where weights are plain numbers that stand on the grid.
    fn codes(&self) -> Option<&dyn CodeFormat>;
}

/// What a format that stores codes adds: an entry in config.json, which is read back, and the way back to codes.
pub trait CodeFormat {
    /// The method that config.json names.
    fn method(&self) -> QuantMethod;

    /// `quantization_config`. `left_alone` are regular expressions for the linear layers that are not quantized.
    fn config(&self, quantized: &[LinearSpec], left_alone: &[String], layout: &CodeLayout) -> Value;

    /// The file beside config.json that holds `quantization_config` once more, where loaders look for one.
    fn config_file(&self) -> Option<&'static str> {
        None
    }

    /// What an entry of config.json with this [`method`](Self::method) says. Errors, naming what is not supported, for every width
    /// or strategy that is not read here.
    fn announced(&self, entry: &Value) -> Result<Quantization>;

    /// Errors as [`decode`](Self::decode) does of tensors that are missing, or of another shape or type, without reading one.
    fn check_headers(&self, layer: &StoredLayer<'_>) -> Result<()>;

    /// Reads a layer back.
    fn decode(&self, layer: &StoredLayer<'_>) -> Result<QuantizedLinear>;

    /// Whether there are zeros in the file, packed along the outputs.
    fn stores_zeros(&self, symmetric: bool) -> bool;
}

/// A method as config.json names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantMethod {
    /// `quant_method`.
    pub name: &'static str,
    /// What of the method is read, in messages.
    pub told: &'static str,
    /// The key that names the [`Format`], for a method of several.
    pub variant_key: Option<&'static str>,
}

/// A [`FileFormat`] as a value of settings, by its name.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(into = "&'static str", try_from = "String")]
pub struct Format(pub(super) &'static dyn FileFormat);

impl PartialEq for Format {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Format {}

impl Format {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        self.0.name()
    }
}

impl From<Format> for &'static str {
    fn from(format: Format) -> Self {
        format.name()
    }
}

/// How a quantized checkpoint stores its linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// The format that config.json names.
    pub format: Format,
    /// The codes as config.json describes them.
    pub packing: Packing,
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { format, packing } = self;
        let group = packing.group_size.map_or_else(|| "whole rows".to_owned(), |size| format!("groups of {size}"));
        let grid = if packing.symmetric { "symmetric" } else { "asymmetric" };
        write!(f, "{}, {} bits, {group}, {grid}", format.name(), packing.bits)
    }
}
