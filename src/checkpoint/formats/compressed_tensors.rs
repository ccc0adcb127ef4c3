//! compressed-tensors `pack-quantized`: the layout of the package of that name, version 0.20.
//!
//! Per layer: `weight_packed` I32 `[out, ⌈in·bits/32⌉]`, rows packed along the input features; `weight_scale`
//! `[out, groups]`; `weight_zero_point` I32 `[⌈out·bits/32⌉, groups]`, columns packed along the output features, only when
//! asymmetric; `weight_shape` I64 `[2]`; `weight_g_idx` I32 `[in]` only when groups are not runs of columns. The package
//! thinks in signed codes and stores them plus `2^(bits−1)`, which is our unsigned code.

use super::{LinearSpec, TensorSpec, Words, group_index, words_of};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::Packing;
use crate::checkpoint::convert::{bytes_from_floats, bytes_from_words, dtype_of};
use crate::codes::Order;
use crate::codes::pack::{pack, packed_words, unpack};
use crate::codes::{CodeLayout, QuantizedLinear};
use anyhow::{Result, ensure};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};

/// Tensors of a layer.
pub(super) fn specs(linear: &LinearSpec, layout: &CodeLayout) -> Vec<TensorSpec> {
    let (out, inputs, bits) = (linear.out_features, linear.in_features, layout.bits);
    let groups = inputs.div_ceil(layout.group_columns(inputs));
    let spec = |suffix: &str, dtype, shape: &[usize]| TensorSpec::new(&linear.module, suffix, dtype, shape);
    let mut specs = vec![
        spec("weight_packed", Dtype::I32, &[out, packed_words(inputs, bits)]),
        spec("weight_scale", dtype_of(layout.scale_type), &[out, groups]),
        spec("weight_shape", Dtype::I64, &[2]),
    ];
    if !layout.symmetric {
        specs.push(spec("weight_zero_point", Dtype::I32, &[packed_words(out, bits), groups]));
    }
    if layout.group_index {
        specs.push(spec("weight_g_idx", Dtype::I32, &[inputs]));
    }
    specs
}

/// Bytes of [`specs`].
pub(super) fn encode(layout: &CodeLayout, quantized: &QuantizedLinear) -> Vec<Vec<u8>> {
    let (out, inputs, bits, groups) =
        (quantized.out_features, quantized.in_features, quantized.bits, quantized.groups());
    let row = packed_words(inputs, bits);
    let mut packed = vec![0; out * row];
    quantized.codes.par_chunks_exact(inputs).zip(packed.par_chunks_exact_mut(row)).for_each(|(codes, words)| {
        pack(codes, 1, inputs, bits, words, 1);
    });
    let shape = [out as i64, inputs as i64].iter().flat_map(|size| size.to_le_bytes()).collect();
    let mut tensors = vec![bytes_from_words(&packed), bytes_from_floats(layout.scale_type, &quantized.scales), shape];
    if !layout.symmetric {
        let mut zeros = vec![0; packed_words(out, bits) * groups];
        for group in 0..groups {
            pack(&quantized.zeros[group..], groups, out, bits, &mut zeros[group..], groups);
        }
        tensors.push(bytes_from_words(&zeros));
    }
    if let Some(index) = &quantized.group_index {
        tensors.push(bytes_from_words(index));
    }
    tensors
}

/// `quantization_config`. `left_alone` are regular expressions for the linear layers that are not quantized.
pub(super) fn config(left_alone: &[String], layout: &CodeLayout) -> Value {
    let ignore: Vec<String> = left_alone.iter().map(|pattern| format!("re:{pattern}")).collect();
    let mut weights = json!({
        "num_bits": layout.bits,
        "type": "int",
        "symmetric": layout.symmetric,
        "strategy": if layout.group_size.is_some() { "group" } else { "channel" },
        "group_size": layout.group_size,
        "dynamic": false,
    });
    // "static" only documents how the codes came about, and packages before 0.16 refuse it of whole rows; "group" says that
    // there is a weight_g_idx, and packages from 0.20 on refuse it instead of reading the columns in the wrong groups.
    let actorder = match (layout.order, layout.group_size) {
        (Order::None, _) | (_, None) => None,
        (Order::ActGroup | Order::Act, Some(_)) if layout.group_index => Some("group"),
        (Order::ActGroup | Order::Act, Some(_)) => Some("static"),
    };
    if let Some(actorder) = actorder {
        weights["actorder"] = json!(actorder);
    }
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "ignore": ignore,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                // LMDeploy looks for it here.
                "format": "pack-quantized",
                "weights": weights,
                "input_activations": null,
                "output_activations": null,
            }
        },
        "version": "0.20.0",
    })
}

/// A layer's tensors whose shapes and types are right.
pub(crate) struct Headers<'a> {
    /// `[out, words]`.
    weight: Words<'a>,
    /// `[words, groups]`; `None` where the zero is the middle.
    zeros: Option<Words<'a>>,
    has_index: bool,
}

/// Finds a layer's tensors. Errors where one is missing, or of another shape or type.
pub(crate) fn headers<'a>(
    checkpoint: &'a Checkpoint,
    module: &str,
    out: usize,
    inputs: usize,
    packing: Packing,
) -> Result<Headers<'a>> {
    let bits = packing.bits;
    let (_, groups) = packing.groups(inputs);
    let words = |suffix: &str, shape: &[usize]| words_of(checkpoint, module, suffix, shape);
    let weight = words("weight_packed", &[out, packed_words(inputs, bits)])?;
    let shape_name = format!("{module}.weight_shape");
    let shape = checkpoint.tensor(&shape_name)?;
    let wanted: Vec<u8> = [out as i64, inputs as i64].iter().flat_map(|size| size.to_le_bytes()).collect();
    ensure!(
        shape.dtype == Dtype::I64 && shape.shape == [2] && shape.bytes == wanted,
        "{shape_name} in {} is not [{out}, {inputs}], the shape that config.json asks for",
        checkpoint.file_of(&shape_name)
    );
    checkpoint.check_matrix(&format!("{module}.weight_scale"), out, groups)?;
    let zeros = match packing.symmetric {
        true => None,
        false => Some(words("weight_zero_point", &[packed_words(out, bits), groups])?),
    };
    let has_index = checkpoint.contains(&format!("{module}.weight_g_idx"));
    if has_index {
        words("weight_g_idx", &[inputs])?;
    }
    Ok(Headers { weight, zeros, has_index })
}

/// Reads a layer back.
pub(crate) fn decode(
    checkpoint: &Checkpoint,
    module: &str,
    out: usize,
    inputs: usize,
    packing: Packing,
) -> Result<QuantizedLinear> {
    let bits = packing.bits;
    let (group_columns, groups) = packing.groups(inputs);
    let Headers { weight, zeros: stored_zeros, has_index } = headers(checkpoint, module, out, inputs, packing)?;
    let packed = weight.read();
    let mut codes = vec![0; out * inputs];
    let rows = packed.par_chunks_exact(packed_words(inputs, bits)).zip(codes.par_chunks_exact_mut(inputs));
    rows.for_each(|(words, codes)| unpack(words, 1, inputs, bits, codes, 1));
    let scales = checkpoint.matrix(&format!("{module}.weight_scale"), out, groups)?.into_data();
    let mut zeros = vec![1 << (bits - 1); out * groups];
    if let Some(packed) = stored_zeros {
        let packed = packed.read();
        for group in 0..groups {
            unpack(&packed[group..], groups, out, bits, &mut zeros[group..], groups);
        }
    }
    let group_index =
        if has_index { Some(group_index(checkpoint, module, "weight_g_idx", inputs, groups)?) } else { None };
    Ok(QuantizedLinear {
        out_features: out,
        in_features: inputs,
        bits,
        group_columns,
        symmetric: packing.symmetric,
        codes,
        scales,
        zeros,
        group_index,
    })
}
