//! GPTQ: the layout of AutoGPTQ, read by its successors.
//!
//! Per layer: `qweight` I32 `[in·bits/32, out]`, columns packed along the input features; `qzeros` I32
//! `[groups, out·bits/32]`, rows packed along the output features, each field holding `zero − 1` in version 1 and the zero in
//! version 2; `scales` F16 `[groups, out]`; `g_idx` I32 `[in]`, the group of every input column. A bias stays where it is.

use super::file_format::{CodeFormat, FileFormat, Format, QuantMethod, Quantization};
use super::served::Served::{Not, With};
use super::served::{
    FamilySupport, HUMMING, InTransformers, Served, in_sglang_with_humming, marlin_group, marlin_width, refused_groups,
};
use super::specs::{LinearSpec, TensorSpec, misfits};
use super::stored::{StoredLayer, Words};
use crate::checkpoint::config::{Packing, bits, group_size};
use crate::checkpoint::convert::{bytes_from_floats, bytes_from_words, dtype_of};
use crate::codes::pack::{PackedRun, pack, packed_words, unpack};
use crate::codes::{CodeLayout, QuantizedLinear};
use crate::parallel::each_chunk;
use crate::tensor::Float;
use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

/// How a GPTQ file stores its zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GptqVersion {
    /// As `zero − 1`, as AutoGPTQ does. Kernels that take what is stored for the zero are a step off, but for symmetric files, whose
    /// zeros they do not read.
    V1,
    /// Zeros are stored as they are.
    V2,
}

impl GptqVersion {
    /// Both versions.
    pub const ALL: [Self; 2] = [Self::V1, Self::V2];

    /// Name of the version in config.json, as `checkpoint_format`.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "gptq",
            Self::V2 => "gptq_v2",
        }
    }

    /// Difference of a zero and what is stored for it.
    pub fn stored_less(self) -> u8 {
        match self {
            Self::V1 => 1,
            Self::V2 => 0,
        }
    }
}

impl Format {
    /// GPTQ of a version.
    pub const fn gptq_of(version: GptqVersion) -> Self {
        match version {
            GptqVersion::V1 => Self(&Gptq { version: GptqVersion::V1 }),
            GptqVersion::V2 => Self(&Gptq { version: GptqVersion::V2 }),
        }
    }

    /// GPTQ of the version that most programs read rightly: 1 where all zeros are the middle, as programs look for it and none reads
    /// them; 2 otherwise, as the kernels of vLLM and SGLang take what is stored for the zero.
    pub fn gptq(symmetric: bool) -> Self {
        Self::gptq_of(if symmetric { GptqVersion::V1 } else { GptqVersion::V2 })
    }
}

/// The format of this file.
#[derive(Debug)]
struct Gptq {
    version: GptqVersion,
}

impl FileFormat for Gptq {
    fn name(&self) -> &'static str {
        self.version.name()
    }

    fn scale_type(&self, _: Float) -> Float {
        Float::F16
    }

    /// Version 1 stores `zero − 1` in an unsigned field.
    fn smallest_zero(&self) -> u8 {
        self.version.stored_less()
    }

    fn check(&self, linears: &[LinearSpec], layout: &CodeLayout) -> Result<()> {
        ensure!(
            layout.scale_type == Float::F16,
            "gptq files hold scales of type F16, but the solver rounds them to {:?}",
            layout.scale_type
        );
        let misfits = misfits(linears, |linear| linear.in_features % 32 != 0 || linear.out_features % 32 != 0);
        ensure!(
            misfits.is_empty(),
            "gptq files need input and output features in multiples of 32, which {misfits} do not have; use the format \
             compressed-tensors"
        );
        Ok(())
    }

    fn specs(&self, linear: &LinearSpec, layout: &CodeLayout) -> Vec<TensorSpec> {
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

    fn encode(&self, linear: &LinearSpec, layout: &CodeLayout, quantized: &QuantizedLinear) -> Result<Vec<Vec<u8>>> {
        let (out, inputs, bits, groups) =
            (quantized.out_features, quantized.in_features, quantized.bits, quantized.groups());
        let less = self.version.stored_less();
        ensure!(
            quantized.zeros.iter().all(|&zero| zero >= less),
            "{} has a zero of 0, which files of GPTQ version 1 cannot hold",
            linear.module
        );
        let mut weight = vec![0; packed_words(inputs, bits) * out];
        // 32 codes fill whole words, as many as a code has bits: rows of words that no other codes share.
        each_chunk(&mut weight, bits as usize * out, |first, words| {
            let columns = first * 32..inputs.min(first * 32 + 32);
            let run = PackedRun { word_stride: out, ..PackedRun::dense(bits, columns.len()) };
            for (row, codes) in quantized.codes.chunks_exact(inputs).enumerate() {
                pack(&codes[columns.clone()], &mut words[row..], run);
            }
        });
        let stored: Vec<u8> = quantized.zeros.iter().map(|zero| zero - less).collect();
        let row = packed_words(out, bits);
        let mut zeros = vec![0; groups * row];
        for (group, words) in zeros.chunks_exact_mut(row).enumerate() {
            pack(&stored[group..], words, PackedRun { code_stride: groups, ..PackedRun::dense(bits, out) });
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

    fn in_transformers(&self, layout: &CodeLayout, _: FamilySupport) -> Option<InTransformers> {
        // Sizes of gptqmodel's plain kernel. At 4 bits it chooses one for a CPU that fails with some of them.
        let arguments = match (layout.bits, layout.group_size) {
            (4, None | Some(16 | 512 | 1024)) => {
                format!(", quantization_config=GPTQConfig(bits={}, backend=\"torch\")", layout.bits)
            }
            (_, None | Some(16 | 32 | 64 | 128 | 256 | 512 | 1024)) => String::new(),
            _ => return None,
        };
        Some(InTransformers { name: "transformers + optimum + gptqmodel", arguments })
    }

    fn in_vllm(&self, layout: &CodeLayout) -> Served {
        const ROWS: &str =
            "has no kernel for whole rows in this file; --group-size 128 or --format compressed-tensors has one";
        // Files with a g_idx since 0.30.
        if let Some(refused) = refused_groups(layout) {
            return refused;
        }
        match (self.version, layout.group_size) {
            (GptqVersion::V1, _) if layout.symmetric && marlin_width(layout) && marlin_group(layout) => {
                With("vLLM", "")
            }
            (GptqVersion::V1, _) if !layout.symmetric => Not(VERSION_1),
            (GptqVersion::V1 | GptqVersion::V2, None) => Not(ROWS),
            (GptqVersion::V1 | GptqVersion::V2, Some(_)) => With("vLLM with Humming kernels", HUMMING),
        }
    }

    fn in_sglang(&self, layout: &CodeLayout) -> Served {
        match self.version {
            GptqVersion::V1 if layout.symmetric && marlin_width(layout) && marlin_group(layout) => {
                return With("SGLang", "");
            }
            GptqVersion::V1 | GptqVersion::V2 => {}
        }
        if let Some(refused) = refused_groups(layout) {
            return refused;
        }
        match self.version {
            GptqVersion::V1 if !layout.symmetric => Not(VERSION_1),
            GptqVersion::V1 | GptqVersion::V2 => in_sglang_with_humming(layout),
        }
    }

    fn codes(&self) -> Option<&dyn CodeFormat> {
        Some(self)
    }
}

/// Why servers refuse files of version 1.
const VERSION_1: &str = "takes what GPTQ version 1 stores, the zero less 1, for the zero: every weight comes out a step off; --gptq-version 2 stores zeros as they are";

impl CodeFormat for Gptq {
    fn method(&self) -> QuantMethod {
        QuantMethod { name: "gptq", told: "gptq", variant_key: Some("checkpoint_format") }
    }

    fn config(&self, quantized: &[LinearSpec], left_alone: &[String], layout: &CodeLayout) -> Value {
        let dynamic: Map<String, Value> =
            left_alone.iter().map(|pattern| (format!("-:{pattern}"), json!({}))).collect();
        json!({
            "quant_method": "gptq",
            "bits": layout.bits,
            // Whole rows are written as a group of −1.
            "group_size": layout.group_size.map_or(-1, |size| size as i64),
            "desc_act": layout.group_index,
            "sym": layout.symmetric,
            "lm_head": false,
            "checkpoint_format": self.name(),
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

    fn config_file(&self) -> Option<&'static str> {
        Some("quantize_config.json")
    }

    fn announced(&self, entry: &Value) -> Result<Quantization> {
        let layout = entry["checkpoint_format"].as_str().or(entry["format"].as_str()).unwrap_or("gptq");
        let version = GptqVersion::ALL.into_iter().find(|version| version.name() == layout).with_context(|| {
            format!("GPTQ checkpoint_format {layout:?} is not read; only gptq (version 1) and gptq_v2 are")
        })?;
        if let Some(rules) = entry["dynamic"].as_object() {
            for rule in rules.keys() {
                ensure!(rule.starts_with('-'), "GPTQ files with settings per layer (dynamic {rule:?}) are not read");
            }
        }
        let symmetric = entry["sym"].as_bool().unwrap_or(true);
        let packing = Packing { bits: bits(&entry["bits"])?, group_size: group_size(entry)?, symmetric };
        Ok(Quantization { format: Format::gptq_of(version), packing })
    }

    fn check_headers(&self, layer: &StoredLayer<'_>) -> Result<()> {
        Headers::of(layer).map(drop)
    }

    /// A symmetric file tells its version itself, as all its zeros are the middle: programs that write version 2 have been seen to
    /// call it 1.
    fn decode(&self, layer: &StoredLayer<'_>) -> Result<QuantizedLinear> {
        let &StoredLayer { checkpoint, out_features: out, in_features: inputs, packing, .. } = layer;
        let bits = packing.bits;
        let (group_columns, groups) = packing.groups(inputs);
        let Headers { weight, zeros } = Headers::of(layer)?;
        let weight = weight.read();
        let mut codes = vec![0; out * inputs];
        for (row, codes) in codes.chunks_exact_mut(inputs).enumerate() {
            unpack(&weight[row..], codes, PackedRun { word_stride: out, ..PackedRun::dense(bits, inputs) });
        }
        let row = packed_words(out, bits);
        let packed = zeros.read();
        let mut zeros = vec![0; out * groups];
        for (group, words) in packed.chunks_exact(row).enumerate() {
            unpack(words, &mut zeros[group..], PackedRun { code_stride: groups, ..PackedRun::dense(bits, out) });
        }
        let name = || layer.name("qzeros");
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
            false => self.version,
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
        let scales = checkpoint.matrix(&layer.name("scales"), groups, out)?;
        let index = layer.group_index("g_idx")?;
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

    fn stores_zeros(&self, _: bool) -> bool {
        true
    }
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
struct Headers<'a> {
    /// `[words, out]`.
    weight: Words<'a>,
    /// `[groups, words]`.
    zeros: Words<'a>,
}

impl<'a> Headers<'a> {
    /// Finds a layer's tensors. Errors where one is missing, or of another shape or type.
    fn of(layer: &StoredLayer<'a>) -> Result<Self> {
        let &StoredLayer { checkpoint, out_features: out, in_features: inputs, packing, .. } = layer;
        let bits = packing.bits;
        let (_, groups) = packing.groups(inputs);
        let weight = layer.words("qweight", &[packed_words(inputs, bits), out])?;
        let zeros = layer.words("qzeros", &[groups, packed_words(out, bits)])?;
        checkpoint.check_matrix(&layer.name("scales"), groups, out)?;
        layer.words("g_idx", &[inputs])?;
        Ok(Self { weight, zeros })
    }
}

/// `[rows, cols]` as `[cols, rows]`.
fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| values[row * cols + col])).collect()
}
