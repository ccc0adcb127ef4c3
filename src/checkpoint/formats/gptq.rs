//! GPTQ: the layout of AutoGPTQ, read by its successors.
//!
//! Per layer: `qweight` I32 `[in·bits/32, out]`, columns packed along the input features; `qzeros` I32
//! `[groups, out·bits/32]`, rows packed along the output features, each field holding `zero − 1` in version 1 and the zero in
//! version 2; `scales` F16 `[groups, out]`; `g_idx` I32 `[in]`, the group of every input column. A bias stays where it is.

use super::{LinearSpec, TensorSpec, Words, group_index, words_of};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::{GptqVersion, Packing};
use crate::checkpoint::convert::{bytes_from_floats, bytes_from_words, dtype_of};
use crate::codes::pack::{pack, packed_words, unpack};
use crate::codes::{CodeLayout, QuantizedLinear};
use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

/// Tensors of a layer.
pub(super) fn specs(linear: &LinearSpec, layout: &CodeLayout) -> Vec<TensorSpec> {
    let (out, inputs, bits) = (linear.out_features, linear.in_features, layout.bits);
    let groups = inputs.div_ceil(layout.group_columns(inputs));
    let spec = |suffix: &str, dtype, shape: &[usize]| TensorSpec::new(&linear.module, suffix, dtype, shape);
    vec![
        spec("qweight", Dtype::I32, &[packed_words(inputs, bits), out]),
        spec("qzeros", Dtype::I32, &[groups, packed_words(out, bits)]),
        spec("scales", dtype_of(layout.scale_type), &[groups, out]),
        spec("g_idx", Dtype::I32, &[inputs]),
    ]
}

/// Bytes of [`specs`].
pub(super) fn encode(
    module: &str,
    layout: &CodeLayout,
    quantized: &QuantizedLinear,
    version: GptqVersion,
) -> Result<Vec<Vec<u8>>> {
    let (out, inputs, bits, groups) =
        (quantized.out_features, quantized.in_features, quantized.bits, quantized.groups());
    let less = version.stored_less();
    ensure!(
        quantized.zeros.iter().all(|&zero| zero >= less),
        "{module} has a zero of 0, which files of GPTQ version 1 cannot hold"
    );
    let mut weight = vec![0; packed_words(inputs, bits) * out];
    // 32 codes fill whole words, as many as a code has bits: rows of words that no other codes share.
    weight.par_chunks_mut(bits as usize * out).enumerate().for_each(|(run, words)| {
        let columns = run * 32..inputs.min(run * 32 + 32);
        for (row, codes) in quantized.codes.chunks_exact(inputs).enumerate() {
            pack(&codes[columns.clone()], 1, columns.len(), bits, &mut words[row..], out);
        }
    });
    let stored: Vec<u8> = quantized.zeros.iter().map(|zero| zero - less).collect();
    let row = packed_words(out, bits);
    let mut zeros = vec![0; groups * row];
    for (group, words) in zeros.chunks_exact_mut(row).enumerate() {
        pack(&stored[group..], groups, out, bits, words, 1);
    }
    let scales: Vec<f32> = transposed(&quantized.scales, out, groups);
    let index: Vec<u32> = (0..inputs).map(|column| quantized.group_of(column) as u32).collect();
    Ok(vec![
        bytes_from_words(&weight),
        bytes_from_words(&zeros),
        bytes_from_floats(layout.scale_type, &scales),
        bytes_from_words(&index),
    ])
}

/// `quantization_config`, and the text of `quantize_config.json`.
pub(super) fn config(
    quantized: &[LinearSpec],
    left_alone: &[String],
    layout: &CodeLayout,
    version: GptqVersion,
) -> Value {
    let dynamic: Map<String, Value> = left_alone.iter().map(|pattern| (format!("-:{pattern}"), json!({}))).collect();
    json!({
        "quant_method": "gptq",
        "bits": layout.bits,
        // Whole rows are written as a group of −1.
        "group_size": layout.group_size.map_or(-1, |size| size as i64),
        "desc_act": layout.group_index,
        "sym": layout.symmetric,
        "lm_head": false,
        "checkpoint_format": version.name(),
        "pack_dtype": "int32",
        "static_groups": false,
        "true_sequential": false,
        "modules_in_block_to_quantize": modules_in_block(quantized),
        "dynamic": dynamic,
        "meta": {
            "quantizer": [concat!(env!("CARGO_PKG_NAME"), ":", env!("CARGO_PKG_VERSION"))],
            "damp_percent": layout.damp,
            "mse": layout.grid.error_power().unwrap_or(0.0),
        },
    })
}

/// Names of the quantized layers inside a decoder block, one list per part of the block.
fn modules_in_block(quantized: &[LinearSpec]) -> Vec<Vec<String>> {
    let mut parts: Vec<Vec<String>> = Vec::new();
    for linear in quantized {
        // A block is addressed by its number; what follows is the name inside it.
        let path: Vec<&str> = linear.module.split('.').collect();
        let inside = path.iter().rposition(|part| part.parse::<usize>().is_ok()).map_or(0, |number| number + 1);
        let name = path[inside..].join(".");
        if parts.iter().flatten().any(|known| *known == name) {
            continue;
        }
        let parent = |name: &str| name.rsplit_once('.').map(|(parent, _)| parent.to_owned());
        match parts.iter_mut().find(|part| parent(&part[0]) == parent(&name)) {
            Some(part) => part.push(name),
            None => parts.push(vec![name]),
        }
    }
    parts
}

/// A layer's tensors whose shapes and types are right.
pub(crate) struct Headers<'a> {
    /// `[words, out]`.
    weight: Words<'a>,
    /// `[groups, words]`.
    zeros: Words<'a>,
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
    let weight = words_of(checkpoint, module, "qweight", &[packed_words(inputs, bits), out])?;
    let zeros = words_of(checkpoint, module, "qzeros", &[groups, packed_words(out, bits)])?;
    checkpoint.check_matrix(&format!("{module}.scales"), groups, out)?;
    words_of(checkpoint, module, "g_idx", &[inputs])?;
    Ok(Headers { weight, zeros })
}

/// Reads a layer back, whose file config.json says to be of this `version`. A symmetric one tells itself, as all its zeros are the
/// middle: programs that write version 2 have been seen to call it 1.
pub(crate) fn decode(
    checkpoint: &Checkpoint,
    module: &str,
    out: usize,
    inputs: usize,
    packing: Packing,
    version: GptqVersion,
) -> Result<QuantizedLinear> {
    let bits = packing.bits;
    let (group_columns, groups) = packing.groups(inputs);
    let Headers { weight, zeros } = headers(checkpoint, module, out, inputs, packing)?;
    let weight = weight.read();
    let mut codes = vec![0; out * inputs];
    for (row, codes) in codes.chunks_exact_mut(inputs).enumerate() {
        unpack(&weight[row..], out, inputs, bits, codes, 1);
    }
    let row = packed_words(out, bits);
    let packed = zeros.read();
    let mut zeros = vec![0; out * groups];
    for (group, words) in packed.chunks_exact(row).enumerate() {
        unpack(words, 1, out, bits, &mut zeros[group..], groups);
    }
    let name = || format!("{module}.qzeros");
    let version = match packing.symmetric {
        true => {
            let middle = 1u8 << (bits - 1);
            let known = |version: &GptqVersion| {
                zeros.iter().all(|zero| zero.checked_add(version.stored_less()) == Some(middle))
            };
            GptqVersion::ALL.into_iter().find(known).with_context(|| {
                format!(
                    "tensor {} in {} holds zeros that are not all {} (GPTQ version 1) or all {middle} (version 2), though \
                     config.json says that the weights are symmetric",
                    name(),
                    checkpoint.file_of(&name()),
                    middle - 1
                )
            })?
        }
        false => version,
    };
    for zero in &mut zeros {
        if version == GptqVersion::V1 && u32::from(*zero) == (1 << bits) - 1 {
            bail!(
                "tensor {} in {} holds a zero that wrapped around (stored {zero} with {bits} bits): loaders read it \
                 as 0 or as {}. Quantize the float checkpoint again.",
                name(),
                checkpoint.file_of(&name()),
                1 << bits
            );
        }
        *zero += version.stored_less();
    }
    let scales = checkpoint.matrix(&format!("{module}.scales"), groups, out)?;
    let index = group_index(checkpoint, module, "g_idx", inputs, groups)?;
    let consecutive = index.iter().enumerate().all(|(column, &group)| column / group_columns == group as usize);
    Ok(QuantizedLinear {
        out_features: out,
        in_features: inputs,
        bits,
        group_columns,
        symmetric: packing.symmetric,
        codes,
        scales: transposed(scales.data(), groups, out),
        zeros,
        group_index: (!consecutive).then_some(index),
    })
}

/// `[rows, cols]` as `[cols, rows]`.
fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| values[row * cols + col])).collect()
}
