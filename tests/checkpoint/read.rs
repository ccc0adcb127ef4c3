//! Reading: exact values for every dtype and layout, one clear error for every broken folder.

use crate::support::checkpoint::*;
use crate::support::message;
use std::fs;
use vlmq::checkpoint::Checkpoint;
use vlmq::tensor::{Float, Stored};

const CONFIG: (&str, &[u8]) = ("config.json", b"{\"model_type\": \"qwen2_vl\"}");

fn with_weights(bytes: Vec<u8>) -> tempfile::TempDir {
    folder(&[(CONFIG.0, CONFIG.1.to_vec()), ("model.safetensors", bytes)])
}

#[test]
fn all_float_types_become_float32_exactly() {
    let values = [0.0, -1.5, 65504.0, 6.103_515_6e-5, -0.333_251_95, 5.960_464_5e-8];
    let half: Vec<u8> = values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
    let brain: Vec<u8> = values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
    let files = with_weights(safetensors(&[
        Made { name: "odd", dtype: "U8", shape: vec![1], bytes: vec![7] },
        Made { name: "half", dtype: "F16", shape: vec![2, 3], bytes: half },
        Made { name: "brain", dtype: "BF16", shape: vec![3, 1, 2], bytes: brain },
        made("single", &[6], &values),
    ]));
    let checkpoint = Checkpoint::open(files.path()).unwrap();
    assert_eq!(checkpoint.matrix("half", 2, 3).unwrap().data(), values);
    let rounded: Vec<f32> = values.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect();
    let brain = checkpoint.matrix("brain", 3, 2).unwrap();
    assert_eq!((brain.rows(), brain.cols(), brain.data()), (3, 2, rounded.as_slice()));
    let single = checkpoint.vector("single", 6).unwrap();
    assert_eq!((single.rows(), single.cols(), single.data()), (1, 6, values.as_slice()));
    let stored = checkpoint.stored_matrix("brain", 3, 2).unwrap();
    let (stored, file) = (stored.stored(), checkpoint.tensor("brain").unwrap().bytes);
    assert_eq!((stored.float(), stored.bytes().as_ptr()), (Float::Bf16, file.as_ptr()));
    assert_eq!(checkpoint.float_type("half").unwrap(), Float::F16);
    assert_eq!(checkpoint.float_type("brain").unwrap(), Float::Bf16);
    assert_eq!(checkpoint.float_type("single").unwrap(), Float::F32);
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["odd", "half", "brain", "single"]);
    assert_eq!(checkpoint.tensor("odd").unwrap().bytes, [7]);
    assert_eq!(checkpoint.folder(), files.path());
    assert_eq!(checkpoint.config()["model_type"], "qwen2_vl");
}

#[test]
fn long_tensors_do_not_depend_on_the_number_of_threads() {
    let values: Vec<f32> = (0..300_000).map(|i| (i as f32 * 0.37).sin()).collect();
    let files = with_weights(safetensors(&[made("w", &[300, 1000], &values)]));
    let checkpoint = Checkpoint::open(files.path()).unwrap();
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert!(pool.install(|| checkpoint.matrix("w", 300, 1000).unwrap().into_data()) == values);
    }
}

#[test]
fn shards_are_found_with_and_without_an_index() {
    let one = safetensors(&[made("a", &[2], &[1.0, 2.0])]);
    let two = safetensors(&[made("b", &[1], &[3.0])]);
    let index = br#"{"metadata": {"total_size": 12}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}"#;
    let config = (CONFIG.0, CONFIG.1.to_vec());
    let with = folder(&[
        config.clone(),
        ("x.safetensors", one.clone()),
        ("y.safetensors", two.clone()),
        ("z.safetensors", one.clone()),
        ("model.safetensors.index.json", index.to_vec()),
    ]);
    let without = folder(&[config, ("x.safetensors", one), ("y.safetensors", two)]);
    for files in [with, without] {
        let checkpoint = Checkpoint::open(files.path()).unwrap();
        assert_eq!(checkpoint.vector("a", 2).unwrap().data(), [1.0, 2.0]);
        assert_eq!(checkpoint.vector("b", 1).unwrap().data(), [3.0]);
    }
}

#[test]
fn the_prefix_is_found_by_probing() {
    let files = with_weights(safetensors(&[made("model.language_model.norm.weight", &[1], &[1.0])]));
    let checkpoint = Checkpoint::open(files.path()).unwrap();
    let candidates = ["model.", "model.language_model.", "language_model.model."];
    assert_eq!(checkpoint.prefix(&candidates, "norm.weight").unwrap(), "model.language_model.");
    let error = message(checkpoint.prefix(&candidates, "bias"));
    assert!(error.contains("none of the tensors model.bias, model.language_model.bias"), "{error}");
}

#[test]
fn broken_files_are_named_with_their_cause() {
    let good = safetensors(&[made("w", &[2], &[1.0, 2.0])]);
    let cut = good[..good.len() - 4].to_vec();
    let cut_header = good[..40].to_vec();
    let two = |first: &str, second: &str, bytes: usize| {
        let header = format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{first}}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{second}}}}}"#
        );
        with_header(&header, vec![0; bytes])
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"".to_vec(), "is not a safetensors file: it has 0 bytes"),
        (b"abc".to_vec(), "is not a safetensors file: it has 3 bytes"),
        (b"\x89PNG\r\n\x1a\n plus what follows in a picture".to_vec(), "is not a safetensors file: its header claims"),
        ([&1_000_000u64.to_le_bytes()[..], b"{}"].concat(), "header claims 1000000 bytes, the file has 10"),
        (cut_header, "is cut short"),
        (cut, "offsets lead out of the file"),
        (with_header("{not json}", vec![]), "header is not valid"),
        (with_header("\u{0}\u{0}", vec![]), "header is not valid"),
        (two("[0,8]", "[4,12]", 12), "tensor b overlaps"),
        (two("[0,8]", "[12,20]", 20), "tensor b overlaps another tensor's or leaves a hole"),
        (two("[0,8]", "[8,16]", 12), "offsets lead out of the file"),
        (two("[0,8]", "[8,16]", 20), "do not reach its end"),
        (two("[0,8]", "[8,20]", 20), "shape and dtype disagree"),
        (two("[8,0]", "[8,16]", 16), "overlaps"),
        (
            with_header(r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#, vec![0; 8]),
            "is damaged",
        ),
    ];
    for (bytes, cause) in cases {
        let files = with_weights(bytes);
        let error = message(Checkpoint::open(files.path()));
        assert!(error.contains("model.safetensors") && error.contains(cause), "wanted {cause:?}, got {error:?}");
    }
}

#[test]
fn broken_folders_are_named_with_their_cause() {
    let weights = safetensors(&[made("w", &[2], &[1.0, 2.0])]);
    let config = (CONFIG.0, CONFIG.1.to_vec());
    let index = |text: &str| ("model.safetensors.index.json", text.as_bytes().to_vec());
    let shard = ("x.safetensors", weights.clone());
    let copy = ("y.safetensors", weights.clone());
    let whole = ("model.safetensors", weights);
    let map = |entries: &str| format!(r#"{{"weight_map": {{{entries}}}}}"#);
    type Files = Vec<(&'static str, Vec<u8>)>;
    let cases: Vec<(Files, &str)> = vec![
        (vec![whole.clone()], "config.json"),
        (vec![("config.json", b"{".to_vec()), whole.clone()], "config.json is not valid JSON"),
        (vec![("config.json", b"[1]".to_vec()), whole], "config.json is not a JSON object"),
        (vec![config.clone()], "holds no weights"),
        (vec![config.clone(), ("pytorch_model.bin", vec![1])], "convert them to safetensors"),
        (vec![config.clone(), shard.clone(), copy.clone()], "tensor w is both in"),
        (vec![config.clone(), index("[]")], "is not an index"),
        (vec![config.clone(), index(&map(""))], "lists no tensors"),
        (
            vec![config.clone(), index(&map(r#""w": "gone.safetensors""#))],
            "gone.safetensors, which is not in the folder",
        ),
        (vec![config.clone(), index(&map(r#""w": "../x.safetensors""#))], "leaves the checkpoint's folder"),
        (vec![config.clone(), index(&map(r#""w": "/x.safetensors""#))], "leaves the checkpoint's folder"),
        (vec![config.clone(), index(&map(r#""w": """#))], "leaves the checkpoint's folder"),
        (
            vec![config.clone(), shard.clone(), index(&map(r#""w": "x.safetensors", "v": "x.safetensors""#))],
            "lists tensor v in x.safetensors, which does not hold it",
        ),
        (
            vec![config, shard, copy, index(&map(r#""w": "x.safetensors", "v": "y.safetensors""#))],
            "tensor w is both in",
        ),
    ];
    for (files, cause) in cases {
        let files = folder(&files);
        let error = message(Checkpoint::open(files.path()));
        assert!(error.contains(cause), "wanted {cause:?}, got {error:?}");
        assert!(error.contains(&files.path().display().to_string()), "{error}");
    }

    let scratch = tempfile::tempdir().unwrap();
    let error = message(Checkpoint::open(&scratch.path().join("absent")));
    assert!(error.contains("cannot open the checkpoint") && error.contains("absent"), "{error}");
    fs::write(scratch.path().join("file"), "x").unwrap();
    let error = message(Checkpoint::open(&scratch.path().join("file")));
    assert!(error.contains("is not a folder"), "{error}");
}

#[test]
fn a_weight_file_that_is_a_folder_is_named() {
    let files = folder(&[(CONFIG.0, CONFIG.1.to_vec())]);
    fs::create_dir(files.path().join("model.safetensors")).unwrap();
    let error = message(Checkpoint::open(files.path()));
    assert!(error.contains("model.safetensors is not a file"), "{error}");
}

#[test]
fn broken_tensors_are_named() {
    let files = with_weights(safetensors(&[
        made("w", &[2, 3], &[0.0; 6]),
        made("nan", &[2, 3], &[0.0, 1.0, 2.0, 3.0, f32::NAN, f32::INFINITY]),
        made("inf", &[3], &[0.0, f32::NEG_INFINITY, 0.0]),
        made("scalar", &[], &[0.0]),
        Made { name: "int", dtype: "I32", shape: vec![2, 3], bytes: vec![0; 24] },
    ]));
    let checkpoint = Checkpoint::open(files.path()).unwrap();
    for (result, parts) in [
        (checkpoint.matrix("absent", 2, 3), vec!["no tensor absent"]),
        (checkpoint.matrix("w", 3, 2), vec!["tensor w in", "shape [2, 3]", "asks for [3, 2]"]),
        (checkpoint.matrix("scalar", 1, 1), vec!["tensor scalar in", "shape []"]),
        (checkpoint.vector("w", 6), vec!["shape [2, 3]", "asks for [6]"]),
        (checkpoint.matrix("int", 2, 3), vec!["tensor int in", "dtype I32", "F16, BF16 or F32"]),
        (checkpoint.matrix("nan", 2, 3), vec!["tensor nan in", "holds NaN at row 1, column 1"]),
        (checkpoint.vector("inf", 3), vec!["tensor inf in", "holds -inf at row 0, column 1"]),
        (checkpoint.linear("w", 2, 3), vec!["no tensor w.weight"]),
    ] {
        let error = message(result);
        for part in parts {
            assert!(error.contains(part), "wanted {part:?}, got {error:?}");
        }
    }
    assert!(message(checkpoint.packed("w", 2, 3)).contains("is not quantized"));
}

#[test]
fn quantizations_that_are_not_read_are_named_when_weights_are_asked_for() {
    let ct = |weights: &str| {
        format!(
            r#"{{"quant_method":"compressed-tensors","format":"pack-quantized",
            "config_groups":{{"g":{{"targets":["Linear"],"input_activations":null,"weights":{weights}}}}}}}"#
        )
    };
    for (entry, cause) in [
        (r#"{"quant_method":"awq","bits":4}"#.to_owned(), "\"awq\" are not read"),
        (r#"{"bits":4}"#.to_owned(), "no quant_method"),
        (r#"{"quant_method":"gptq","bits":5,"group_size":128}"#.to_owned(), "weights of 5 bits"),
        (r#"{"quant_method":"gptq","bits":4}"#.to_owned(), "group_size null"),
        (r#"{"quant_method":"gptq","bits":4,"group_size":0}"#.to_owned(), "group_size 0"),
        (r#"{"quant_method":"gptq","bits":4,"group_size":128,"checkpoint_format":"marlin"}"#.to_owned(), "marlin"),
        (
            r#"{"quant_method":"gptq","bits":4,"group_size":128,"dynamic":{"+:.*mlp.*":{"bits":8}}}"#.to_owned(),
            "settings per layer",
        ),
        (r#"{"quant_method":"compressed-tensors","config_groups":{}}"#.to_owned(), "0 config_groups"),
        (r#"{"quant_method":"compressed-tensors"}"#.to_owned(), "no config_groups"),
        (ct(r#"{"num_bits":8,"type":"float","strategy":"channel"}"#), "type \"float\""),
        (ct(r#"{"num_bits":4,"type":"int","strategy":"tensor"}"#), "strategy Some(\"tensor\")"),
        (ct(r#"{"num_bits":6,"type":"int","strategy":"channel"}"#), "weights of 6 bits"),
    ] {
        let config = format!(r#"{{"quantization_config": {entry}}}"#);
        let weights = safetensors(&[made("m.weight_scale", &[1], &[1.0]), made("n.weight", &[1, 2], &[1.0, 2.0])]);
        let files = folder(&[("config.json", config.into_bytes()), ("model.safetensors", weights)]);
        let checkpoint = Checkpoint::open(files.path()).unwrap();
        assert!(checkpoint.is_quantized());
        assert_eq!(checkpoint.linear("n", 1, 2).unwrap().data(), [1.0, 2.0], "plain layers stay readable");
        let error = message(checkpoint.linear("m", 1, 2));
        assert!(error.contains(cause) && error.contains("config.json"), "wanted {cause:?}, got {error:?}");
    }
}

#[test]
fn no_damage_to_a_header_makes_it_panic() {
    let good = safetensors(&[made("a", &[2, 2], &[1.0; 4]), made("b", &[3], &[2.0; 3])]);
    let header = 8 + u64::from_le_bytes(*good.first_chunk().unwrap()) as usize;
    let (mut refused, mut read) = (0, 0);
    for place in 0..header {
        for value in [0, 0xff, b'9', b'"', good[place] ^ 1] {
            let mut bytes = good.clone();
            bytes[place] = value;
            let files = with_weights(bytes);
            match Checkpoint::open(files.path()) {
                Err(_) => refused += 1,
                Ok(checkpoint) => {
                    for name in checkpoint.names() {
                        let _ =
                            (checkpoint.matrix(name, 2, 2), checkpoint.vector(name, 3), checkpoint.linear(name, 2, 2));
                    }
                    read += 1;
                }
            }
        }
    }
    assert!(refused > 100 && read > 50, "{refused} refused, {read} read");
}
