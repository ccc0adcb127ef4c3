//! Checkpoints of published shapes whose weights are holes in their files.

use crate::support::program::{edit_json, names_in, read_json};
use crate::support::{data, golden};
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// Bytes of a shard, about as the published ones.
const SHARD: u64 = 5_000_000_000;

/// Names and shapes of a model's tensors.
pub(crate) fn tensors(model: &Value) -> Vec<(String, Vec<u64>)> {
    let mut all = Vec::new();
    for line in model["tensors"].as_array().unwrap() {
        let name = line[0].as_str().unwrap();
        let shape: Vec<u64> = line[1].as_array().unwrap().iter().map(|side| side.as_u64().unwrap()).collect();
        match line[2].as_u64().unwrap() {
            0 => all.push((name.to_owned(), shape)),
            blocks => all.extend((0..blocks).map(|block| (name.replace('#', &block.to_string()), shape.clone()))),
        }
    }
    all
}

/// Writes tensors without data behind them: the files are holes, and take no room.
pub(crate) fn write_sparse(folder: &Path, tensors: &[(String, Vec<u64>)], dtype: &str) {
    let mut shards: Vec<(Map<String, Value>, u64)> = Vec::new();
    let mut place = Vec::new();
    for (name, shape) in tensors {
        let bytes = 2 * shape.iter().product::<u64>();
        if shards.last().is_none_or(|(_, end)| end + bytes > SHARD) {
            shards.push((Map::new(), 0));
        }
        let (header, end) = shards.last_mut().unwrap();
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [*end, *end + bytes]}));
        *end += bytes;
        place.push((name, shards.len()));
    }
    let file = |number: usize| format!("model-{number:05}-of-{:05}.safetensors", shards.len());
    let map: Map<String, Value> = place.iter().map(|(name, number)| ((*name).clone(), json!(file(*number)))).collect();
    fs::write(folder.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    for (number, (header, end)) in shards.iter().enumerate() {
        let header = Value::Object(header.clone()).to_string();
        let mut out = File::create(folder.join(file(number + 1))).unwrap();
        out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        out.write_all(header.as_bytes()).unwrap();
        out.set_len(8 + header.len() as u64 + end).unwrap();
    }
}

/// A published model without its weights, with the small checkpoint's tokenizer and templates.
pub(crate) fn hollow(name: &str, folder: &Path) {
    let small = data("tiny-qwen2-vl");
    for file in names_in(&small).iter().filter(|file| !file.ends_with("safetensors") && *file != "config.json") {
        fs::copy(small.join(file), folder.join(file)).unwrap();
    }
    let config = folder.join("config.json");
    fs::copy(data("configs").join(name).join("config.json"), &config).unwrap();
    let small = read_json(small.join("config.json"));
    edit_json(&config, |config| {
        for key in ["image_token_id", "video_token_id"] {
            config.insert(key.into(), small[key].clone());
        }
    });
    write_sparse(folder, &tensors(&read_json(golden("configs.json"))[name]), "BF16");
}
