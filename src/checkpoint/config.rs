//! `quantization_config` of a config.json: where it is, and what all formats say in it alike. And how a key gets in there.

use crate::device::{WIDTHS, told_widths};
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

/// What config.json says of codes, whatever their format.
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

/// A width of codes. Errors for one that is not read.
pub(super) fn bits(value: &Value) -> Result<u32> {
    let known = WIDTHS.into_iter().find(|&bits| value.as_u64() == Some(bits.into()));
    known.with_context(|| format!("weights of {value} bits are not read; only {} are", told_widths("and")))
}

/// `group_size` of a section; `None` for whole rows, −1.
pub(super) fn group_size(section: &Value) -> Result<Option<usize>> {
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
