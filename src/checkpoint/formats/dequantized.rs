//! Plain weights: what the codes stand for, rounded to the checkpoint's dtype. Loads anywhere, saves nothing.

use super::file_format::{CodeFormat, FileFormat};
use super::served::{FamilySupport, InTransformers, Served};
use super::specs::{LinearSpec, TensorSpec};
use crate::checkpoint::convert::{bytes_from_floats, dtype_of};
use crate::codes::{CodeLayout, QuantizedLinear};
use anyhow::Result;

/// The format of this file.
#[derive(Debug)]
pub(super) struct Dequantized;

impl FileFormat for Dequantized {
    fn name(&self) -> &'static str {
        "dequantized"
    }

    fn check(&self, _: &[LinearSpec], _: &CodeLayout) -> Result<()> {
        Ok(())
    }

    /// One tensor, `weight` `[out, in]` of the scales' type, which is the checkpoint's.
    fn specs(&self, linear: &LinearSpec, layout: &CodeLayout) -> Vec<TensorSpec> {
        let shape = [linear.out_features, linear.in_features];
        vec![TensorSpec::new(&linear.module, "weight", dtype_of(layout.scale_type), shape)]
    }

    fn encode(&self, _: &LinearSpec, layout: &CodeLayout, quantized: &QuantizedLinear) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes_from_floats(layout.scale_type, quantized.dequantize()?.data())])
    }

    fn in_transformers(&self, _: &CodeLayout, _: FamilySupport) -> Option<InTransformers> {
        Some(InTransformers { name: "transformers", arguments: String::new() })
    }

    fn in_vllm(&self, _: &CodeLayout) -> Served {
        Served::With("vLLM", "")
    }

    fn in_sglang(&self, _: &CodeLayout) -> Served {
        Served::With("SGLang", "")
    }

    fn codes(&self) -> Option<&dyn CodeFormat> {
        None
    }
}
