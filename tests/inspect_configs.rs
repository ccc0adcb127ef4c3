//! `inspect` on the config.json of every published checkpoint, with files of the right shape and no data: counts and bytes
//! against transformers (tests/golden/make_configs.py), nothing read but headers.
#![cfg(feature = "run")]

mod support;

use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Instant;
use support::program::{read_json, succeed, text};
use support::{data, golden};

/// Name, family, weights of the decoder's linear layers in billions as published, storage type.
const PUBLISHED: &[(&str, &str, f64, &str)] = &[
    ("Qwen2-VL-2B-Instruct", "qwen2_vl", 1.310, "BF16"),
    ("Qwen2-VL-7B-Instruct", "qwen2_vl", 6.525, "BF16"),
    ("Qwen2-VL-72B-Instruct", "qwen2_vl", 70.213, "BF16"),
    ("Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", 2.775, "BF16"),
    ("Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", 6.525, "BF16"),
    ("Qwen2.5-VL-32B-Instruct", "qwen2_5_vl", 31.206, "BF16"),
    ("Qwen2.5-VL-72B-Instruct", "qwen2_5_vl", 70.213, "BF16"),
    ("llava-onevision-qwen2-0.5b-ov-hf", "llava_onevision", 0.358, "F16"),
    ("llava-onevision-qwen2-7b-ov-hf", "llava_onevision", 6.525, "F16"),
    ("llava-onevision-qwen2-72b-ov-hf", "llava_onevision", 70.213, "F16"),
    ("Qwen3-VL-8B-Instruct", "qwen3_vl", 6.946, "BF16"),
    ("Qwen3-VL-32B-Instruct", "qwen3_vl", 31.206, "BF16"),
];

/// Bytes of a shard, about as the published ones.
const SHARD: u64 = 5_000_000_000;

/// Names and shapes of a model's tensors.
fn tensors(model: &Value) -> Vec<(String, Vec<u64>)> {
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
fn write_sparse(folder: &Path, tensors: &[(String, Vec<u64>)], dtype: &str) {
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

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

#[test]
fn published_checkpoints_are_inspected() {
    let models = read_json(golden("configs.json"));
    for &(name, family, billions, dtype) in PUBLISHED {
        let (folder, model) = (tempfile::tempdir().unwrap(), &models[name]);
        fs::copy(data("configs").join(name).join("config.json"), folder.path().join("config.json")).unwrap();
        write_sparse(folder.path(), &tensors(model), dtype);

        let started = Instant::now();
        let found: Value = serde_json::from_str(&succeed(&["inspect", &text(folder.path()), "--json"])).unwrap();
        // A 72B model's data would take a minute.
        assert!(started.elapsed().as_secs() < 10, "{name}: {:?}", started.elapsed());

        assert_eq!(found["family"], family, "{name}");
        assert_eq!(found["quantization"], Value::Null, "{name}");
        let weights: u64 = found["quantizable"]
            .as_array()
            .unwrap()
            .iter()
            .map(|kind| ["count", "rows", "cols"].map(|key| kind[key].as_u64().unwrap()).iter().product::<u64>())
            .sum();
        assert_eq!(json!(weights), model["decoder_linears"], "{name}");
        assert!(
            (weights as f64 / 1e9 - billions).abs() < 5e-4,
            "{name}: {weights} weights, published {billions} billion"
        );
        // Every linear layer takes the usual groups of 128.
        let groups = |kind: &Value| kind["group_sizes"].as_array().unwrap().contains(&json!(128));
        assert!(found["quantizable"].as_array().unwrap().iter().all(groups), "{name}");
        assert_eq!(found["bytes"].as_u64().unwrap(), 2 * model["parameters"].as_u64().unwrap(), "{name}");

        let parts = found["parts"].as_array().unwrap();
        assert_eq!(parts.iter().map(|part| part["bytes"].as_u64().unwrap()).sum::<u64>(), found["bytes"], "{name}");
        assert!(parts.iter().all(|part| part["types"] == json!([dtype])), "{name}");
        let part = |wanted: &str| parts.iter().find(|part| part["name"] == wanted);
        // The towers have 0.4 to 0.8 billion parameters with their projectors, at any size of the language model.
        let tower = number(&part("vision tower").unwrap()["bytes"]) / 2e9;
        assert!((0.39..0.85).contains(&tower), "{name}: a vision tower of {tower} billion");
        assert_eq!(part("last norm").unwrap()["tensors"], 1, "{name}");
        let tied = !model["tensors"].to_string().contains("lm_head");
        assert_eq!(part("output head").is_none(), tied, "{name}");

        // One block twice with its norms and biases, four matrices of the widest input with diagonal blocks, diagonal and
        // order, two streams and rotary tables of 512 samples of 512 tokens, all in float32.
        let size = |key: &str| number(&found["decoder"][key]);
        let streams = 512.0 * 512.0 * (2.0 * size("hidden") + size("head_dim"));
        let norms_and_biases = 2.0 * size("hidden") + (size("heads") + 2.0 * size("kv_heads")) * size("head_dim");
        let blocks = 2.0 * (weights as f64 / size("blocks") + norms_and_biases);
        let inner = size("intermediate");
        let matrices = 4.0 * inner.powi(2) + (2.0 * 128.0 + 2.0) * inner + 128.0 * 128.0;
        let expected = 4.0 * (blocks + matrices + streams);
        let peak = number(&found["estimate"]["peak_memory_bytes"]);
        assert!((peak / expected - 1.0).abs() < 1e-6, "{name}: {peak} against {expected}");
    }
}
