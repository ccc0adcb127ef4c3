//! Plain weights: what the codes stand for, rounded to the checkpoint's dtype.

use super::{LinearSpec, TensorSpec};
use crate::checkpoint::convert::{bytes_from_floats, dtype_of};
use crate::codes::{CodeLayout, QuantizedLinear};
use anyhow::Result;

/// One tensor, `weight` `[out, in]` of the scales' type, which is the checkpoint's.
pub(super) fn specs(linear: &LinearSpec, layout: &CodeLayout) -> Vec<TensorSpec> {
    let shape = [linear.out_features, linear.in_features];
    vec![TensorSpec::new(&linear.module, "weight", dtype_of(layout.scale_type), shape)]
}

/// Bytes of [`specs`].
pub(super) fn encode(layout: &CodeLayout, quantized: &QuantizedLinear) -> Result<Vec<Vec<u8>>> {
    Ok(vec![bytes_from_floats(layout.scale_type, quantized.dequantize()?.data())])
}
