//! `inspect` on the config.json of every published checkpoint, with files of the right shape and no data: counts and bytes
//! against transformers (tests/golden/make_configs.py), nothing read but headers.

use crate::sparse::{tensors, write_sparse};
use crate::support::program::{brief_run, read_json, stderr, stdout, text};
use crate::support::{data, golden};
use serde_json::{Value, json};
use std::fs;

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

/// Most processor time of an inspection, in seconds.
const SECONDS: u32 = 10;

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

#[test]
#[ignore = "slow: a run for every published size"]
fn published_checkpoints_are_inspected() {
    let models = read_json(golden("configs.json"));
    for &(name, family, billions, dtype) in PUBLISHED {
        let (folder, model) = (tempfile::tempdir().unwrap(), &models[name]);
        fs::copy(data("configs").join(name).join("config.json"), folder.path().join("config.json")).unwrap();
        write_sparse(folder.path(), &tensors(model), dtype);

        // A 72B model's data would take a minute.
        let output = brief_run(SECONDS, &["inspect", &text(folder.path()), "--json"]);
        assert!(output.status.success(), "{name}: {}: {}", output.status, stderr(&output));
        let found: Value = serde_json::from_str(&stdout(&output)).unwrap();

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
        // order, two streams and rotary tables of 512 samples of 512 tokens, all in float32. Of H only the half that is
        // written takes memory, where the system gives it in small pages; what the factorization takes for itself is less.
        let size = |key: &str| number(&found["decoder"][key]);
        let streams = 512.0 * 512.0 * (2.0 * size("hidden") + size("head_dim"));
        let norms_and_biases = 2.0 * size("hidden") + (size("heads") + 2.0 * size("kv_heads")) * size("head_dim");
        let blocks = 2.0 * (weights as f64 / size("blocks") + norms_and_biases);
        let inner = size("intermediate");
        let matrices = 4.0 * inner.powi(2) + (2.0 * 128.0 + 2.0) * inner + 128.0 * 128.0;
        let expected = 4.0 * (blocks + matrices + streams);
        let peak = number(&found["estimate"]["peak_memory_bytes"]);
        assert!((expected - 2.0 * inner.powi(2)..1.02 * expected).contains(&peak), "{name}: {peak} against {expected}");
        assert!(number(&found["estimate"]["seconds"]) > 1.0, "{name}");
    }
}
