//! `quantization_config` of a config.json: how the weights of a quantized checkpoint are stored. And how a key gets in there.

use crate::device::{WIDTHS, told_widths};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use std::fmt;

/// How a quantized checkpoint stores its linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// compressed-tensors, `pack-quantized` with integer weights.
    CompressedTensors(Packing),
    /// GPTQ, of the version that config.json names.
    Gptq(Packing, GptqVersion),
}

/// How a GPTQ file stores its zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GptqVersion {
    /// As `zero − 1`, as AutoGPTQ does. Kernels that take what is stored for the zero are a step off, but for symmetric files, whose
    /// zeros they do not read.
    V1,
    /// As they are.
    V2,
}

impl GptqVersion {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V1, Self::V2];

    /// Its name in config.json, as `checkpoint_format`.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "gptq",
            Self::V2 => "gptq_v2",
        }
    }

    /// How much less than the zero is stored.
    pub fn stored_less(self) -> u8 {
        match self {
            Self::V1 => 1,
            Self::V2 => 0,
        }
    }
}

/// What both formats have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Width of a code, one of [`WIDTHS`].
    pub bits: u32,
    /// Input columns that share a scale; `None`: the whole row.
    pub group_size: Option<usize>,
    /// Every zero is `2^(bits − 1)`.
    pub symmetric: bool,
}

impl Packing {
    /// Columns that share a scale, and how many such groups a row of `inputs` columns has.
    pub(crate) fn groups(&self, inputs: usize) -> (usize, usize) {
        let columns = self.group_size.unwrap_or(inputs);
        (columns, inputs.div_ceil(columns))
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, packing) = match self {
            Self::CompressedTensors(packing) => ("compressed-tensors", packing),
            Self::Gptq(packing, version) => (version.name(), packing),
        };
        let group = packing.group_size.map_or_else(|| "whole rows".to_owned(), |size| format!("groups of {size}"));
        let grid = if packing.symmetric { "symmetric" } else { "asymmetric" };
        write!(f, "{name}, {} bits, {group}, {grid}", packing.bits)
    }
}

/// The names that entries have had.
const ENTRIES: [&str; 2] = ["quantization_config", "compression_config"];

/// The quantization entry of a config, wherever generations of the format put it; an empty one counts as absent.
pub(crate) fn quantization_entry(config: &Value) -> Option<&Value> {
    [config, &config["text_config"]]
        .into_iter()
        .flat_map(|section| ENTRIES.map(|key| &section[key]))
        .find(|entry| !entry.is_null())
}

/// A config without any such entry.
pub(crate) fn without_quantization(config: &Value) -> Value {
    let mut config = config.clone();
    let remove = |section: &mut Value| {
        if let Some(section) = section.as_object_mut() {
            ENTRIES.iter().for_each(|key| drop(section.shift_remove(*key)));
        }
    };
    remove(&mut config);
    if let Some(text) = config.get_mut("text_config") {
        remove(text);
    }
    config
}

/// Reads the entry. Errors, naming what is not supported, for every method, width or strategy that is not read here.
pub(crate) fn parse_quantization(entry: &Value) -> Result<Quantization> {
    match entry["quant_method"].as_str() {
        Some("compressed-tensors") => compressed_tensors(entry),
        Some("gptq") => gptq(entry),
        Some(other) => bail!(
            "weights quantized with {other:?} are not read; known are compressed-tensors (pack-quantized) and gptq. \
             Start from the float checkpoint."
        ),
        None => bail!("quantization_config has no quant_method; start from the float checkpoint"),
    }
}

fn compressed_tensors(entry: &Value) -> Result<Quantization> {
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
    Ok(Quantization::CompressedTensors(Packing { bits: bits(&weights["num_bits"])?, group_size, symmetric }))
}

fn gptq(entry: &Value) -> Result<Quantization> {
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
    Ok(Quantization::Gptq(Packing { bits: bits(&entry["bits"])?, group_size: group_size(entry)?, symmetric }, version))
}

/// config.json with `key` as its last one, all other bytes as they were: numbers and their spelling too.
///
/// A text that has the key with this value stays as it is. One that has it with another value, as a checkpoint that was made
/// of one of ours does, is written anew.
pub(crate) fn with_key(text: &str, key: &str, value: &Value) -> Result<String> {
    let mut whole: Map<String, Value> = serde_json::from_str(text).context("config.json is no JSON object")?;
    match whole.get(key) {
        Some(old) if old == value => return Ok(text.to_owned()),
        Some(_) => {
            whole.shift_remove(key);
            whole.insert(key.to_owned(), value.clone());
            return Ok(format!("{:#}\n", Value::Object(whole)));
        }
        None => {}
    }
    let body = text.trim_end().strip_suffix('}').context("config.json is no JSON object")?.trim_end();
    let comma = if whole.is_empty() { "" } else { "," };
    let entry = format!("{value:#}").replace('\n', "\n  ");
    Ok(format!("{body}{comma}\n  {}: {entry}\n}}\n", Value::from(key)))
}

fn bits(value: &Value) -> Result<u32> {
    let known = WIDTHS.into_iter().find(|&bits| value.as_u64() == Some(bits.into()));
    known.with_context(|| format!("weights of {value} bits are not read; only {} are", told_widths("and")))
}

fn group_size(section: &Value) -> Result<Option<usize>> {
    match section["group_size"].as_i64() {
        Some(-1) => Ok(None),
        Some(size) if size > 0 => Ok(Some(size as usize)),
        _ => bail!("group_size {} of quantization_config is neither positive nor -1", section["group_size"]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn keys_come_last_and_once() {
        let value = json!({"a": 1.5});
        let text = "{\n  \"eps\": 1e-06\n}\n";
        let with = with_key(text, "k", &value).unwrap();
        assert_eq!(with, "{\n  \"eps\": 1e-06,\n  \"k\": {\n    \"a\": 1.5\n  }\n}\n");
        assert_eq!(with_key(&with, "k", &value).unwrap(), with);
        let other: Value = serde_json::from_str(&with_key(&with, "k", &json!(2)).unwrap()).unwrap();
        assert_eq!(other, json!({"eps": 1e-6, "k": 2}));
        assert_eq!(with_key("{}", "k", &json!(2)).unwrap(), "{\n  \"k\": 2\n}\n");
        assert!(with_key("[1]", "k", &json!(2)).is_err());
    }
}
