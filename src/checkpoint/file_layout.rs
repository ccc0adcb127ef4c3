//! Where every tensor of a new checkpoint goes, before the first is written.

use super::formats::TensorSpec;
use super::shard::SINGLE;
use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

/// One file to be: its name, header, and total length in bytes.
#[derive(Debug)]
pub(crate) struct ShardLayout {
    pub(crate) name: String,
    pub(crate) header: Vec<u8>,
    pub(crate) length: u64,
}

/// Place of a tensor: which shard, and its first byte in that file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) shard: usize,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// All files and all places.
#[derive(Debug)]
pub(crate) struct FileLayout {
    pub(crate) shards: Vec<ShardLayout>,
    pub(crate) places: HashMap<String, Place>,
    /// Bytes of all tensors.
    pub(crate) total: u64,
}

impl FileLayout {
    /// Spreads `tensors`, in order, over shards of at most `limit` bytes of tensors (one larger tensor gets a shard of
    /// its own). Those that stand together have wider elements first. Where that does not align every tensor of a shard to its element,
    /// as some have odd sizes, wider elements come first in all of the shard.
    pub(crate) fn new(tensors: &[Vec<TensorSpec>], limit: u64, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let mut parts: Vec<Vec<&TensorSpec>> = vec![Vec::new()];
        let mut filled = 0;
        let mut in_order = Vec::new();
        for together in tensors {
            let mut together: Vec<&TensorSpec> = together.iter().collect();
            together.sort_by_key(|tensor| Reverse(tensor.dtype.bitsize()));
            in_order.extend(together);
        }
        for tensor in in_order {
            let length = tensor.bytes() as u64;
            if filled > 0 && filled + length > limit {
                parts.push(Vec::new());
                filled = 0;
            }
            filled += length;
            parts.last_mut().expect("at least one part").push(tensor);
        }

        let mut layout = Self { shards: Vec::new(), places: HashMap::new(), total: 0 };
        let count = parts.len();
        for (shard, mut part) in parts.into_iter().enumerate() {
            if !are_aligned(&part) {
                part.sort_by_key(|tensor| Reverse(tensor.dtype.bitsize()));
            }
            let name = match count {
                1 => SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
            };
            let header = header(&part, metadata)?;
            let mut offset = header.len() as u64;
            for tensor in part {
                let length = tensor.bytes() as u64;
                layout.places.insert(tensor.name.clone(), Place { shard, offset, length });
                layout.total += length;
                offset += length;
            }
            layout.shards.push(ShardLayout { name, header, length: offset });
        }
        Ok(layout)
    }

    /// Text of `model.safetensors.index.json`; `None` for a single file.
    pub(crate) fn index(&self) -> Option<String> {
        if self.shards.len() == 1 {
            return None;
        }
        let sorted: BTreeMap<&String, &String> =
            self.places.iter().map(|(name, place)| (name, &self.shards[place.shard].name)).collect();
        let index = json!({"metadata": {"total_size": self.total}, "weight_map": sorted});
        Some(format!("{index:#}\n"))
    }
}

/// Whether tensors behind each other are all aligned to their elements; the first is.
fn are_aligned(tensors: &[&TensorSpec]) -> bool {
    let mut start = 0;
    tensors.iter().all(|tensor| {
        let element = (tensor.dtype.bitsize() / 8).max(1);
        let aligned = start % element == 0;
        start += tensor.bytes();
        aligned
    })
}

/// The first bytes of a file: length of the header, header, and spaces up to a multiple of 8.
pub(crate) fn header(tensors: &[&TensorSpec], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!(metadata));
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        entries.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut text = serde_json::to_vec(&Value::Object(entries)).context("cannot write a safetensors header")?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    Ok(header)
}
