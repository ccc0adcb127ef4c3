//! Whatever is wrong with its input, the program says so in one line, exits with 1, and leaves nothing behind.

use crate::support::checkpoint::with_header;
use crate::support::program::{
    Bench, Meets, broken, copy_folder, edit_header, edit_json, edit_tensor, succeed, text, vlmq_run,
};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// One file of bf16 weights; `rope_scaling` and all other text keys at the root of config.json.
const FLAT: &str = "flat-tied-bf16";
const WEIGHTS: &str = "model.safetensors";
const Q_PROJ: &str = "model.layers.1.self_attn.q_proj.weight";

#[test]
fn folders_and_files() {
    let remove = |name: &'static str| move |model: &Path| fs::remove_file(model.join(name)).unwrap();
    let write =
        |name: &'static str, content: &'static str| move |model: &Path| fs::write(model.join(name), content).unwrap();
    broken(FLAT, Meets::All, &["model", "give the folder"], |model| fs::remove_dir_all(model).unwrap());
    broken(FLAT, Meets::All, &["model", "folder"], |model| {
        fs::remove_dir_all(model).unwrap();
        fs::write(model, "not a folder").unwrap();
    });
    broken(FLAT, Meets::All, &["config.json", "cannot read"], remove("config.json"));
    broken(FLAT, Meets::All, &["config.json", "not valid JSON"], write("config.json", "{\"model_type\":"));
    broken(FLAT, Meets::All, &["config.json", "not a JSON object"], write("config.json", "[1]"));
    broken(FLAT, Meets::All, &["config.json", "recursion limit"], |model| {
        fs::write(model.join("config.json"), format!("{{\"a\":{}", "[".repeat(1 << 20))).unwrap();
    });
    broken(FLAT, Meets::All, &["config.json"], |model| {
        fs::remove_file(model.join("config.json")).unwrap();
        fs::create_dir(model.join("config.json")).unwrap();
    });
    broken(FLAT, Meets::All, &["holds no weights", "convert them"], remove(WEIGHTS));
    broken(FLAT, Meets::Runs, &["tokenizer.json", "copy it"], remove("tokenizer.json"));
    broken(FLAT, Meets::Runs, &["tokenizer.json", "not a tokenizer"], write("tokenizer.json", "{}"));
    broken(FLAT, Meets::Runs, &["tokenizer.json", "not a tokenizer"], write("tokenizer.json", "\u{0}"));
    broken(FLAT, Meets::Runs, &["preprocessor_config.json", "copy them"], remove("preprocessor_config.json"));
    broken(FLAT, Meets::Runs, &["preprocessor_config.json", "JSON"], write("preprocessor_config.json", "[]"));
    broken(FLAT, Meets::Runs, &["no chat template", "copy it"], remove("chat_template.json"));
    for (template, says) in [
        ("{% for m in messages %}", "not a chat template"),
        ("{{ raise_exception('no such luck') }}", "no such luck"),
        ("{{ messages[0].nothing.at_all }}", "undefined"),
        ("{% for i in range(99999999) %}{% for j in range(99999) %}.{% endfor %}{% endfor %}", "fails"),
        ("{{ 'a constant' }}", "only plain strings"),
    ] {
        broken(FLAT, Meets::Runs, &["chat_template.jinja", says], write("chat_template.jinja", template));
    }
    broken(FLAT, Meets::Runs, &["chat_template.jinja"], |model| {
        fs::write(model.join("chat_template.jinja"), format!("{{{{ {}", "(".repeat(1 << 18))).unwrap();
    });
    broken(FLAT, Meets::Runs, &["no end-of-turn token"], |model| {
        for name in ["generation_config.json", "tokenizer_config.json", "config.json"] {
            edit_json(&model.join(name), |all| all.retain(|key, _| !key.starts_with("eos_token")));
        }
    });
}

#[test]
fn weight_files() {
    let write = |bytes: Vec<u8>| move |model: &Path| fs::write(model.join(WEIGHTS), bytes).unwrap();
    let header = |edit: fn(&mut Value)| {
        move |model: &Path| {
            edit_header(&model.join(WEIGHTS), |all| edit(all.get_mut(Q_PROJ).unwrap()));
        }
    };
    broken(FLAT, Meets::All, &[WEIGHTS, "not a safetensors file"], write(b"abc".to_vec()));
    broken(FLAT, Meets::All, &[WEIGHTS, "not a safetensors file"], write(vec![b'x'; 4096]));
    broken(FLAT, Meets::All, &[WEIGHTS, "not a safetensors file"], write(with_header("[1, 2]", vec![0; 64])));
    broken(FLAT, Meets::All, &[WEIGHTS, "claims 99999 bytes"], write([&99999u64.to_le_bytes()[..], b"{}"].concat()));
    broken(FLAT, Meets::All, &[WEIGHTS], write([&u64::MAX.to_le_bytes()[..], b"{}"].concat()));
    broken(FLAT, Meets::All, &[WEIGHTS, "damaged"], |model| {
        let bytes = fs::read(model.join(WEIGHTS)).unwrap();
        fs::write(model.join(WEIGHTS), &bytes[..bytes.len() - 100]).unwrap();
    });
    broken(FLAT, Meets::All, &[WEIGHTS, "damaged"], header(|q| q["data_offsets"] = json!([0, 2048])));
    broken(
        FLAT,
        Meets::All,
        &[WEIGHTS, "damaged"],
        header(|q| q["data_offsets"] = json!([1u64 << 40, (1u64 << 40) + 2048])),
    );
    broken(FLAT, Meets::All, &[WEIGHTS, "damaged"], header(|q| q["shape"] = json!([32, 33])));
    broken(FLAT, Meets::All, &[WEIGHTS], header(|q| q["shape"] = json!([u64::MAX, 2])));
    broken(FLAT, Meets::All, &[WEIGHTS], header(|q| q["dtype"] = json!("B5")));
    broken(FLAT, Meets::All, &[Q_PROJ, "[16, 64]", "[32, 32]"], header(|q| q["shape"] = json!([16, 64])));
    broken(FLAT, Meets::Runs, &[Q_PROJ, WEIGHTS, "U16"], header(|q| q["dtype"] = json!("U16")));
    for name in
        [Q_PROJ, "visual.merger.ln_q.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.bias"]
    {
        let meets = if name == Q_PROJ { Meets::All } else { Meets::Runs };
        broken(FLAT, meets, &["model has no tensor", name], |model| {
            edit_header(&model.join(WEIGHTS), |all| {
                let tensor = all.remove(name).unwrap();
                all.insert("stray".to_owned(), tensor);
            });
        });
    }
}

#[test]
fn shards() {
    let index = "model.safetensors.index.json";
    let sharded = |says: &[&str], fault: &dyn Fn(&Path)| broken("nested-f16-sharded", Meets::All, says, fault);
    let point_to = |to: &'static str| {
        move |model: &Path| {
            edit_json(&model.join(index), |all| {
                for file in all["weight_map"].as_object_mut().unwrap().values_mut().take(1) {
                    *file = json!(to);
                }
            });
        }
    };
    let shard = "model-00002-of-00003.safetensors";
    sharded(&[index, shard, "Download the missing file"], &|model| fs::remove_file(model.join(shard)).unwrap());
    for to in ["../elsewhere.safetensors", "/etc/passwd", "a/../../b", "", ".."] {
        sharded(&[index, "leaves the checkpoint's folder"], &point_to(to));
    }
    sharded(&[index, "does not hold it"], &point_to(shard));
    sharded(&["config.json", "not a safetensors file"], &point_to("config.json"));
    sharded(&[index, "lists no tensors"], &|model| fs::write(model.join(index), r#"{"weight_map": {}}"#).unwrap());
    sharded(&[index, "weight_map"], &|model| fs::write(model.join(index), "{}").unwrap());
}

#[test]
fn numbers_that_are_none() {
    let names = [
        Q_PROJ,
        "visual.blocks.0.mlp.fc1.weight",
        "model.norm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ];
    for (name, (bits, shown)) in
        names.into_iter().zip([(0x7fc0u16, "NaN"), (0x7f80, "inf"), (0xff80, "-inf"), (0x7f81, "NaN")])
    {
        broken(FLAT, Meets::Runs, &[name, WEIGHTS, shown, "column 3"], |model| {
            edit_tensor(&model.join(WEIGHTS), name, |bytes| bytes[6..8].copy_from_slice(&bits.to_le_bytes()));
        });
        // What round-to-nearest never looks at must not be copied either.
        let bench = Bench::new(FLAT);
        edit_tensor(&bench.file(WEIGHTS), name, |bytes| bytes[6..8].copy_from_slice(&bits.to_le_bytes()));
        bench.refused(&bench.quantize(&["--solver", "rtn"]), &[name, shown]);
    }
    let huge = |name: &'static str| {
        move |model: &Path| {
            edit_tensor(&model.join(WEIGHTS), name, |bytes| {
                bytes.as_chunks_mut::<2>().0.iter_mut().for_each(|value| *value = 0x7f00u16.to_le_bytes());
            });
        }
    };
    broken(FLAT, Meets::Runs, &["activations", "block 1"], huge("model.layers.1.mlp.down_proj.weight"));
    broken(FLAT, Meets::Runs, &["image features", "sample q"], huge("visual.merger.mlp.2.weight"));
}

#[test]
fn configurations() {
    let config = |model: &Path, key: &str, value: Value| {
        edit_json(&model.join("config.json"), |all| {
            all.insert(key.to_owned(), value);
        });
    };
    let needed = "model_type image_token_id hidden_size num_attention_heads intermediate_size num_hidden_layers \
                  rms_norm_eps vocab_size rope_theta rope_scaling";
    for key in needed.split_ascii_whitespace() {
        broken(FLAT, Meets::All, &["config.json", key, "is missing"], |model| config(model, key, Value::Null));
    }
    broken(FLAT, Meets::Runs, &["config.json", "vision_config", "is missing"], |model| {
        config(model, "vision_config", Value::Null)
    });

    let huge = json!(1u64 << 62);
    let cases = [
        ("model_type", json!("qwen9_vl"), "known are: qwen2_vl"),
        ("model_type", json!(7), "not a string"),
        ("num_hidden_layers", json!(0), "not a whole number"),
        ("num_hidden_layers", json!(-1), "not a whole number"),
        ("num_hidden_layers", json!(1.5), "not a whole number"),
        ("num_hidden_layers", json!("2"), "not a whole number"),
        ("num_hidden_layers", json!(3), "layers.2."),
        ("num_hidden_layers", json!(2_000_000_000), "num_hidden_layers is 2000000000"),
        ("num_hidden_layers", huge.clone(), "not a whole number"),
        ("hidden_size", json!(64), "half the head width 16"),
        ("hidden_size", json!(1_000_000_000), "mrope_section"),
        ("intermediate_size", json!(2_000_000_000), "[2000000000, 32]"),
        ("num_attention_heads", json!(3), "3 attention heads"),
        ("num_attention_heads", json!(2_000_000_000), "2000000000 attention heads"),
        ("num_key_value_heads", json!(3), "3 key/value heads"),
        ("num_key_value_heads", json!(0), "not a whole number"),
        ("head_dim", json!(7), "attention heads of width 7"),
        ("head_dim", json!(1 << 30), "half the head width"),
        ("rms_norm_eps", json!(-1e-6), "not a positive number"),
        ("rms_norm_eps", json!("small"), "not a positive number"),
        ("rms_norm_eps", json!(1e308), "not a positive number"),
        ("rope_theta", json!(0), "not a positive number"),
        ("rope_scaling", json!({"type": "mrope", "mrope_section": [1, 1]}), "three numbers"),
        ("rope_scaling", json!({"type": "mrope", "mrope_section": [9, 9, 9]}), "half the head width"),
        ("rope_scaling", json!({"type": "mrope", "mrope_section": [u64::MAX, 3, 2]}), "whole numbers"),
        ("rope_scaling", json!({"type": "mrope", "mrope_section": "2"}), "not a list"),
        ("rope_scaling", json!({"type": "mrope"}), "mrope_section is missing"),
        ("rope_scaling", json!({"type": "yarn", "factor": 4, "mrope_section": [2, 1, 1]}), "known are mrope, default"),
        ("rope_scaling", json!([1]), "not an object"),
        ("use_sliding_window", json!(true), "not supported"),
        ("use_sliding_window", json!("no"), "true or false"),
        ("hidden_act", json!("relu6"), "known are silu"),
        ("tie_word_embeddings", json!(1), "true or false"),
    ];
    for (key, value, says) in cases {
        broken(FLAT, Meets::All, &["config.json", says], |model| config(model, key, value));
    }
    let cases = [
        ("vocab_size", json!(2_000_000_000), "model.embed_tokens.weight"),
        ("image_token_id", json!(5_000_000), "token 5000000"),
        ("vision_config", json!({"depth": 2_000_000_000, "embed_dim": 64, "hidden_size": 32}), "blocks.2."),
        ("vision_config", json!({"depth": 2, "embed_dim": 60, "hidden_size": 32}), "embed_dim"),
        ("vision_config", json!({"depth": 2, "embed_dim": 64, "patch_size": 16}), "patch_size"),
        ("vision_config", json!({"depth": 2, "embed_dim": 64, "mlp_ratio": 2_000_000_000}), "visual.blocks.0.mlp.fc1"),
    ];
    for (key, value, says) in cases {
        broken(FLAT, Meets::Runs, &[says], |model| config(model, key, value));
    }
    // All sections of a later generation's config.json are named in full.
    broken("rope-parameters-f32", Meets::All, &["config.json", "text_config.hidden_size is missing"], |model| {
        edit_json(&model.join("config.json"), |all| {
            all["text_config"].as_object_mut().unwrap().remove("hidden_size");
        });
    });
}

#[test]
fn processor_values() {
    let cases = [
        ("patch_size", json!(0), "positive integer"),
        ("patch_size", json!(4_000_000_000u64), "1 to 64"),
        ("patch_size", json!(16), "take both files from the same checkpoint"),
        ("merge_size", json!(4), "take both files from the same checkpoint"),
        ("temporal_patch_size", json!(1e308), "positive integer"),
        ("min_pixels", json!(4_000_000_000u64), "pixels"),
        ("max_pixels", json!(4_000_000_000u64), "pixels"),
        ("image_std", json!([0.0, 1.0, 1.0]), "image_std"),
        ("image_mean", json!([0.5]), "image_mean"),
        ("rescale_factor", json!("big"), "rescale_factor"),
        ("do_resize", json!(false), "do_resize"),
        ("resample", json!(2), "resample"),
    ];
    for (key, value, says) in cases {
        broken(FLAT, Meets::Runs, &["processor", says], |model| {
            edit_json(&model.join("preprocessor_config.json"), |all| {
                all.insert(key.to_owned(), value);
            });
        });
    }
}

#[test]
fn groups_that_do_not_divide() {
    let bench = Bench::new(FLAT);
    let says = ["group size 128", "model.layers.0.self_attn.q_proj (32 x 32)", "8, 16, 32, none"];
    bench.refused(&bench.quantize(&["--group-size", "128"]), &says);
    let says = ["group size 64", "q_proj (32 x 32)", "8, 16, 32, none"];
    bench.refused(&bench.quantize(&["--group-size", "64", "--format", "gptq"]), &says);
}

/// What would be ignored is refused.
#[test]
fn a_refit_needs_samples() {
    let bench = Bench::new(FLAT);
    let rtn = bench.quantize(&["--solver", "rtn", "--refit", "residual"]);
    bench.refused(&rtn, &["--refit residual", "--solver rtn reads none"]);
    succeed(&bench.quantize(&["--solver", "rtn", "--refit", "none"]));
}

#[test]
fn checkpoints_that_are_quantized_already() {
    for format in ["compressed-tensors", "gptq"] {
        let bench = Bench::new(FLAT);
        succeed(&bench.quantize(&["--format", format]));
        let out = bench.outputs().join("out");
        fs::remove_dir_all(bench.model()).unwrap();
        copy_folder(&out, &bench.model());
        fs::remove_dir_all(out).unwrap();
        bench.refused(&bench.quantize(&[]), &["already quantized", "float checkpoint"]);
        bench.refused(&bench.quantize(&["--solver", "rtn", "--format", "dequantized"]), &["already quantized"]);
        // What cannot be read is named.
        edit_json(&bench.file("config.json"), |all| all["quantization_config"]["quant_method"] = json!("awq"));
        bench.refused(&bench.eval(&[]), &["config.json", "awq", "compressed-tensors"]);
        bench.refused(&bench.inspect(), &["config.json", "awq"]);
    }
}

#[test]
fn outputs_that_cannot_be() {
    let bench = Bench::new(FLAT);
    let (model, data) = (text(bench.model()), text(bench.data()));
    let beside = text(bench.outputs());
    let quantize = |out: &str| {
        ["quantize", &model, "--calib", &data, "--group-size", "32", "--out", out].map(str::to_owned).to_vec()
    };
    let before = crate::support::program::files_of(&bench.model());
    bench.refused(&quantize(&model), &[&model, "exists", "--out"]);
    assert!(crate::support::program::files_of(&bench.model()) == before);
    bench.refused(&quantize(&beside), &[&beside, "exists"]);
    bench.refused(&quantize(&data), &[&data, "exists"]);
    bench.refused(&quantize("/"), &["no name for an output folder"]);
    bench.refused(&quantize(&format!("{beside}/missing/out")), &["missing", "create it first"]);
    bench.refused(&quantize(&format!("{data}/out")), &["no folder", "data.jsonl"]);
    bench.refused(&quantize(&format!("{beside}/missing/..")), &["no name for an output folder"]);
    bench.refused(&quantize(&format!("{beside}/{}", "n".repeat(300))), &["too long a name"]);
    bench.refused(&bench.eval(&["--reference", "no/such/model"]), &["no/such/model", "reference"]);

    // Nobody may make folders in /proc, not even root; others may not in a folder that is read-only.
    #[cfg(target_os = "linux")]
    bench.refused(&quantize("/proc/out"), &["cannot create a folder in /proc"]);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(bench.outputs(), PermissionsExt::from_mode(0o555)).unwrap();
        let root = fs::write(bench.outputs().join("probe"), "").is_ok();
        match root {
            true => fs::remove_file(bench.outputs().join("probe")).unwrap(),
            false => bench.refused(&bench.quantize(&[]), &["cannot create a folder"]),
        }
        fs::set_permissions(bench.outputs(), PermissionsExt::from_mode(0o755)).unwrap();
    }
}

/// A limit on the size of files stands in for a full disk: it needs no rights, and writing fails in the same places.
#[cfg(unix)]
#[test]
fn a_full_disk() {
    let bench = Bench::new(FLAT);
    let limited = |blocks: usize, arguments: &[String]| {
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", &script, env!("CARGO_BIN_EXE_vlmq-run")]).args(arguments).output().unwrap()
    };
    // Blocks of 512 bytes: too few for the weights; then for a side file alone, once the weights are out of the way.
    for (blocks, what) in [(100, WEIGHTS), (1, WEIGHTS)] {
        let output = limited(blocks, &bench.quantize(&[]));
        bench.check_refusal(&output, "disk full", &["cannot write", what]);
    }
    let output = limited(0, &bench.eval(&[]));
    bench.check_refusal(&output, "disk full", &["scores.json", "cannot write"]);
    let plenty = limited(1 << 20, &bench.quantize(&[]));
    assert_eq!(plenty.status.code(), Some(0));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let bench = Bench::new(FLAT);
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_vlmq-run"))
        .args(bench.inspect())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"));
    assert_eq!(vlmq_run(&bench.inspect()).status.code(), Some(0));
}
