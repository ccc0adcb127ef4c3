//! compressed-tensors `pack-quantized`: the layout of the package of that name, version 0.20.
//!
//! Per layer: `weight_packed` I32 `[out, ⌈in·bits/32⌉]`, rows packed along the input features; `weight_scale`
//! `[out, groups]`; `weight_zero_point` I32 `[⌈out·bits/32⌉, groups]`, columns packed along the output features, only when
//! asymmetric; `weight_shape` I64 `[2]`; `weight_g_idx` I32 `[in]` only when groups are not runs of columns. The package
//! thinks in signed codes and stores them plus `2^(bits−1)`, which is our unsigned code.

use super::file_format::{CodeFormat, FileFormat, Format, QuantMethod, Quantization};
use super::served::Served::With;
use super::served::{
    FamilySupport, InTransformers, Served, in_sglang_with_humming, marlin_group, marlin_width, refused_groups,
};
use super::specs::{LinearSpec, TensorSpec};
use super::stored::{StoredLayer, Words};
use crate::checkpoint::config::{Packing, bits, group_size};
use crate::checkpoint::convert::{bytes_from_floats, bytes_from_words, dtype_of};
use crate::codes::Order;
use crate::codes::pack::{PackedRun, pack, packed_words, unpack};
use crate::codes::{CodeLayout, QuantizedLinear};
use crate::parallel::each_chunk;
use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;
use serde_json::{Value, json};

/// The format of this file.
#[derive(Debug)]
pub(super) struct CompressedTensors;

impl FileFormat for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn check(&self, _: &[LinearSpec], _: &CodeLayout) -> Result<()> {
        Ok(())
    }

    fn specs(&self, linear: &LinearSpec, layout: &CodeLayout) -> Vec<TensorSpec> {
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

    fn encode(&self, _: &LinearSpec, layout: &CodeLayout, quantized: &QuantizedLinear) -> Result<Vec<Vec<u8>>> {
        let (out, inputs, bits, groups) =
            (quantized.out_features, quantized.in_features, quantized.bits, quantized.groups());
        let row = packed_words(inputs, bits);
        let mut packed = vec![0; out * row];
        each_chunk(&mut packed, row, |i, words| {
            pack(&quantized.codes[i * inputs..][..inputs], words, PackedRun::dense(bits, inputs));
        });
        let shape = [out as i64, inputs as i64].iter().flat_map(|size| size.to_le_bytes()).collect();
        let mut tensors =
            vec![bytes_from_words(&packed), bytes_from_floats(layout.scale_type, &quantized.scales), shape];
        if !layout.symmetric {
            let mut zeros = vec![0; packed_words(out, bits) * groups];
            let run = PackedRun { bits, count: out, code_stride: groups, word_stride: groups };
            for group in 0..groups {
                pack(&quantized.zeros[group..], &mut zeros[group..], run);
            }
            tensors.push(bytes_from_words(&zeros));
        }
        if let Some(index) = &quantized.group_index {
            tensors.push(bytes_from_words(index));
        }
        Ok(tensors)
    }

    fn in_transformers(&self, layout: &CodeLayout, family: FamilySupport) -> Option<InTransformers> {
        let arguments = match layout.symmetric && !family.must_dequantize {
            // compressed-tensors 0.20 refuses to read one.
            _ if layout.group_index => return None,
            true => "",
            false => ", quantization_config=CompressedTensorsConfig(dequantize=True)",
        };
        Some(InTransformers { name: "transformers + compressed-tensors", arguments: arguments.to_owned() })
    }

    fn in_vllm(&self, layout: &CodeLayout) -> Served {
        // Since 0.30.
        refused_groups(layout).unwrap_or(match marlin_width(layout) || layout.symmetric {
            true => With("vLLM", ""),
            false => With("vLLM 0.31 or newer", ""),
        })
    }

    fn in_sglang(&self, layout: &CodeLayout) -> Served {
        // Whether its kernel has zeros of 8 bits is not known.
        if marlin_width(layout) && marlin_group(layout) && (layout.bits == 4 || layout.symmetric) {
            return With("SGLang", "");
        }
        refused_groups(layout).unwrap_or_else(|| in_sglang_with_humming(layout))
    }

    fn codes(&self) -> Option<&dyn CodeFormat> {
        Some(self)
    }
}

impl CodeFormat for CompressedTensors {
    fn method(&self) -> QuantMethod {
        QuantMethod { name: self.name(), told: "compressed-tensors (pack-quantized)", variant_key: None }
    }

    fn config(&self, _: &[LinearSpec], left_alone: &[String], layout: &CodeLayout) -> Value {
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

    fn announced(&self, entry: &Value) -> Result<Quantization> {
        let groups = entry["config_groups"].as_object().context("quantization_config has no config_groups")?;
        ensure!(
            groups.len() == 1,
            "quantization_config has {} config_groups; only checkpoints with one are read",
            groups.len()
        );
        let group = groups.values().next().expect("one group");
        let format = group["format"].as_str().or(entry["format"].as_str()).unwrap_or("none");
        ensure!(format == "pack-quantized", "compressed-tensors format {format:?} is not read; only pack-quantized is");
        ensure!(group["input_activations"].is_null(), "checkpoints with quantized activations are not read");
        let weights = &group["weights"];
        let kind = weights["type"].as_str().unwrap_or("int");
        ensure!(kind == "int", "weights of type {kind:?} are not read; only int is");
        let group_size = match weights["strategy"].as_str() {
            Some("group") => group_size(weights)?,
            Some("channel") => None,
            other => bail!("weight strategy {other:?} is not read; only group and channel are"),
        };
        let symmetric = weights["symmetric"].as_bool().unwrap_or(true);
        let packing = Packing { bits: bits(&weights["num_bits"])?, group_size, symmetric };
        Ok(Quantization { format: Format(&Self), packing })
    }

    fn check_headers(&self, layer: &StoredLayer<'_>) -> Result<()> {
        Headers::of(layer).map(drop)
    }

    fn decode(&self, layer: &StoredLayer<'_>) -> Result<QuantizedLinear> {
        let &StoredLayer { checkpoint, out_features: out, in_features: inputs, packing, .. } = layer;
        let bits = packing.bits;
        let (group_columns, groups) = packing.groups(inputs);
        let Headers { weight, zeros: stored_zeros, has_index } = Headers::of(layer)?;
        let packed = weight.read();
        let mut codes = vec![0; out * inputs];
        let row = packed_words(inputs, bits);
        each_chunk(&mut codes, inputs, |i, codes| {
            unpack(&packed[i * row..][..row], codes, PackedRun::dense(bits, inputs));
        });
        let scales = checkpoint.matrix(&layer.name("weight_scale"), out, groups)?.into_data();
        let mut zeros = vec![1 << (bits - 1); out * groups];
        if let Some(packed) = stored_zeros {
            let packed = packed.read();
            let run = PackedRun { bits, count: out, code_stride: groups, word_stride: groups };
            for group in 0..groups {
                unpack(&packed[group..], &mut zeros[group..], run);
            }
        }
        let group_index = if has_index { Some(layer.group_index("weight_g_idx")?) } else { None };
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

    fn stores_zeros(&self, symmetric: bool) -> bool {
        !symmetric
    }
}

/// A layer's tensors whose shapes and types are right.
struct Headers<'a> {
    /// `[out, words]`.
    weight: Words<'a>,
    /// `[words, groups]`; `None` where the zero is the middle.
    zeros: Option<Words<'a>>,
    has_index: bool,
}

impl<'a> Headers<'a> {
    /// Finds a layer's tensors. Errors where one is missing, or of another shape or type.
    fn of(layer: &StoredLayer<'a>) -> Result<Self> {
        let &StoredLayer { checkpoint, out_features: out, in_features: inputs, packing, .. } = layer;
        let bits = packing.bits;
        let (_, groups) = packing.groups(inputs);
        let weight = layer.words("weight_packed", &[out, packed_words(inputs, bits)])?;
        let shape_name = layer.name("weight_shape");
        let shape = checkpoint.tensor(&shape_name)?;
        let wanted: Vec<u8> = [out as i64, inputs as i64].iter().flat_map(|size| size.to_le_bytes()).collect();
        ensure!(
            shape.dtype == Dtype::I64 && shape.shape == [2] && shape.bytes == wanted,
            "{shape_name} in {} is not [{out}, {inputs}], the shape that config.json asks for",
            checkpoint.file_of(&shape_name)
        );
        checkpoint.check_matrix(&layer.name("weight_scale"), out, groups)?;
        let zeros = match packing.symmetric {
            true => None,
            false => Some(layer.words("weight_zero_point", &[packed_words(out, bits), groups])?),
        };
        let has_index = checkpoint.contains(&layer.name("weight_g_idx"));
        if has_index {
            layer.words("weight_g_idx", &[inputs])?;
        }
        Ok(Self { weight, zeros, has_index })
    }
}
