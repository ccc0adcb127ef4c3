//! `vlmq-run verify`: sound checkpoints pass wherever they lie, and no change of a bit, a file or a tensor does.

use crate::support::golden;
use crate::support::program::{
    Bench, copy_folder, edit_header, edit_json, edit_tensor, files_of, names_in, read_json, stderr, stdout, succeed,
    text, vlmq_run,
};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use vlmq::checkpoint::sums::Sums;

/// One file of bf16 weights.
const FLAT: &str = "flat-tied-bf16";
/// Key and value projections of 16 rows: of 3 bits, 48 of the 64 bits of two words.
const PADDED: &str = "rope-parameters-f32";
/// Three files.
const SHARDED: &str = "nested-f16-sharded";

/// A checkpoint and what was made of it.
struct Made {
    bench: Bench,
    out: PathBuf,
}

impl Made {
    fn of(checkpoint: &str, flags: &[&str]) -> Self {
        let bench = Bench::new(checkpoint);
        // The Hub's card of the float checkpoint.
        fs::write(bench.file("README.md"), "---\nlicense: mit\n---\n# Base\n").unwrap();
        succeed(&bench.quantize(flags));
        let out = bench.outputs().join("out");
        Self { bench, out }
    }

    /// A copy of the output, to be broken.
    fn copy(&self) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("renamed");
        copy_folder(&self.out, &out);
        (folder, out)
    }

    fn verify(&self, out: &Path) -> Output {
        vlmq_run(&["verify", &text(out), "--against", &text(self.bench.model()), "--quiet"])
    }

    /// Breaks a copy and asserts that verification names all of `says`.
    fn broken(&self, says: &[&str], fault: impl FnOnce(&Path)) {
        let (_folder, out) = self.copy();
        fault(&out);
        differs(&self.verify(&out), says);
    }

    /// The same, by somebody who wrote the checksums anew, so that only what is in the files can tell.
    fn forged(&self, says: &[&str], fault: impl FnOnce(&Path)) {
        let (_folder, out) = self.copy();
        fault(&out);
        fs::write(out.join("SHA256SUMS"), Sums::of(&out).unwrap().text()).unwrap();
        let output = self.verify(&out);
        differs(&output, says);
        assert!(!stdout(&output).contains("checksum differs"), "{}", stdout(&output));
    }
}

fn differs(output: &Output, says: &[&str]) {
    let (shown, errors) = (stdout(output), stderr(output));
    assert_eq!(output.status.code(), Some(1), "{says:?} expected: {shown}{errors}");
    assert!(errors.starts_with("error: ") && errors.lines().count() == 1, "{errors}");
    assert!(errors.contains("does not verify against"), "{errors}");
    for part in says {
        assert!(shown.contains(part), "{part:?} is not in {shown}");
    }
    assert!(!shown.contains("all as they were written"), "{shown}");
}

fn flip(path: &Path, at: impl FnOnce(usize) -> usize) {
    let mut bytes = fs::read(path).unwrap();
    let at = at(bytes.len());
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn weights(out: &Path) -> PathBuf {
    out.join("model.safetensors")
}

#[test]
fn sound_checkpoints_verify_wherever_they_lie() {
    let runs: &[(&str, &[&str])] = &[
        (FLAT, &["--format", "compressed-tensors"]),
        (FLAT, &["--format", "gptq", "--bits", "2", "--order", "act", "--group-size", "8"]),
        (FLAT, &["--format", "dequantized", "--symmetric"]),
        (FLAT, &["--solver", "rtn", "--group-size", "none", "--bits", "8", "--format", "gptq"]),
        (PADDED, &["--format", "compressed-tensors"]),
        (SHARDED, &["--order", "act", "--bits", "4", "--symmetric", "--group-size", "16"]),
        ("qwen2_5_vl-nested-f16", &["--format", "gptq", "--bits", "4"]),
        ("llava-hub-tied-f16", &["--format", "compressed-tensors", "--bits", "2", "--symmetric"]),
        ("llava-v5-f32", &["--format", "dequantized"]),
        ("qwen3_vl-f16-sharded", &["--format", "compressed-tensors", "--group-size", "16"]),
        ("qwen3_vl-tied-bf16", &["--format", "gptq"]),
    ];
    for (checkpoint, flags) in runs {
        let made = Made::of(checkpoint, flags);
        // Elsewhere, under other names, with what a download leaves behind.
        let (folder, out) = made.copy();
        fs::write(out.join(".gitattributes"), "*.safetensors filter=lfs").unwrap();
        let model = folder.path().join("base");
        copy_folder(&made.bench.model(), &model);
        let json = folder.path().join("found.json");
        let output = vlmq_run(&["verify", &text(&out), "--against", &text(&model), "--json", &text(&json)]);
        let (shown, progress) = (stdout(&output), stderr(&output));
        assert_eq!(output.status.code(), Some(0), "{checkpoint} {flags:?}: {shown}{progress}");
        assert!(shown.starts_with("compared ") && shown.contains("all as they were written"), "{shown}");
        assert!(shown.contains("largest errors of weights") && progress.contains("verifying: "), "{shown}{progress}");

        let found = read_json(&json);
        let report = read_json(out.join("report.json"));
        let layers = report["layers"].as_array().unwrap();
        assert_eq!(found["differences"], json!([]));
        assert_eq!(found["layers"].as_array().unwrap().len(), layers.len());
        for layer in layers {
            let error = layer["weight_error"].as_f64().unwrap();
            assert!((1e-4..1.0).contains(&error), "{layer}");
            if flags.contains(&"rtn") {
                // Without statistics the solver's own error is the same in other words: squared, and summed in float32.
                let relative = layer["relative_error"].as_f64().unwrap();
                assert!((error * error / relative - 1.0).abs() < 1e-5, "{layer}");
            }
        }
        if cfg!(target_os = "linux") {
            let mut check = Command::new("sha256sum");
            check.args(["-c", "--strict", "--quiet", "SHA256SUMS"]).current_dir(&out);
            assert!(check.status().unwrap().success(), "{checkpoint}");
        }
    }
}

#[test]
fn one_bit_anywhere_is_found_and_named() {
    let compressed = Made::of(FLAT, &["--order", "act", "--group-size", "16"]);
    let gptq = Made::of(FLAT, &["--format", "gptq"]);
    let plain = Made::of(FLAT, &["--format", "dequantized"]);
    let up = "model.layers.0.mlp.up_proj";
    for (made, suffixes) in [
        (&compressed, &["weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"][..]),
        (&gptq, &["qweight", "scales", "qzeros", "g_idx"]),
        (&plain, &["weight"]),
    ] {
        for suffix in suffixes {
            let name = format!("{up}.{suffix}");
            let tensor = format!("the tensor {name} is not as it was written");
            let layer = format!("the layer {up} ");
            // A plain weight of 0 becomes one of 1e-38, which no error shows.
            let layer = if *suffix == "weight" { &tensor } else { &layer };
            made.broken(&["the file model.safetensors is not as it was written", &tensor, layer], |out| {
                edit_tensor(&weights(out), &name, |bytes| *bytes.last_mut().unwrap() ^= 1);
            });
            // Somewhere inside.
            made.broken(&[&tensor], |out| {
                edit_tensor(&weights(out), &name, |bytes| bytes[bytes.len() / 2] ^= 0x10);
            });
        }
        let embedding = "model.embed_tokens.weight";
        let says = format!(
            "the tensor {embedding} is not as it was written: its checksum differs; it is not the base model's"
        );
        made.broken(&[&says], |out| edit_tensor(&weights(out), embedding, |bytes| bytes[7] ^= 2));
        // Every other file, in its middle.
        for (name, _) in files_of(&made.out) {
            if !["model.safetensors", "SHA256SUMS"].contains(&name.as_str()) {
                let says = format!("the file {name} is not as it was written");
                made.broken(&[&says], |out| flip(&out.join(&name), |length| length / 2));
            }
        }
        // The header: the name of a tensor, where its text comes first. Whatever that makes of it, the file is named.
        made.broken(&["the file model.safetensors is not as it was written"], |out| flip(&weights(out), |_| 20));
        // The list itself: one of its own checksums is another.
        made.broken(&["is not as it was written"], |out| {
            let path = out.join("SHA256SUMS");
            let sums = fs::read_to_string(&path).unwrap();
            let at = sums.find("  config.json").unwrap() - 1;
            let other = if &sums[at..=at] == "0" { "1" } else { "0" };
            fs::write(path, [&sums[..at], other, &sums[at + 1..]].concat()).unwrap();
        });
    }
}

#[test]
fn files_cut_short_lost_or_added_are_named() {
    let made = Made::of(SHARDED, &["--format", "compressed-tensors"]);
    made.broken(&["model.safetensors is damaged: its tensors' offsets lead out", "not checked further"], |out| {
        let bytes = fs::read(weights(out)).unwrap();
        fs::write(weights(out), &bytes[..bytes.len() / 3]).unwrap();
    });
    for name in ["tokenizer.json", "README.md", "README.base.md", "model.safetensors", "config.json", "report.json"] {
        made.broken(&[&format!("the file {name} is missing")], |out| fs::remove_file(out.join(name)).unwrap());
    }
    made.broken(&["the file notes.txt does not belong"], |out| fs::write(out.join("notes.txt"), "x").unwrap());
    made.broken(&["the file model-2.safetensors does not belong"], |out| {
        fs::copy(weights(out), out.join("model-2.safetensors")).unwrap();
    });
    made.broken(&["checkpoints is no file and does not belong"], |out| {
        fs::create_dir(out.join("checkpoints")).unwrap()
    });
    made.broken(&["report.json is not as it was written", "no report of vlmq-run quantize"], |out| {
        fs::write(out.join("report.json"), "{}").unwrap();
    });
    let (_folder, out) = made.copy();
    fs::remove_file(out.join("SHA256SUMS")).unwrap();
    let output = made.verify(&out);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("SHA256SUMS: vlmq-run quantize writes it"), "{}", stderr(&output));
    fs::write(out.join("SHA256SUMS"), "0123  config.json\n").unwrap();
    assert!(stderr(&made.verify(&out)).contains("SHA256SUMS is damaged: line 1 is no checksum"));
}

#[test]
fn checksums_written_anew_hide_nothing() {
    let made = Made::of(PADDED, &["--format", "compressed-tensors"]);
    let layer = |projection: &str, says: &str| format!("the layer model.language_model.layers.1.{projection} {says}");
    let tensor = |projection: &str, suffix: &str| format!("model.language_model.layers.1.{projection}.{suffix}");
    let up = "mlp.up_proj";
    let edit = |name: String, change: fn(&mut [u8])| move |out: &Path| edit_tensor(&weights(out), &name, change);
    // Codes, scales, zeros: the error is another.
    for suffix in ["weight_packed", "weight_scale", "weight_zero_point"] {
        made.forged(
            &[&layer(up, "has a relative error of weights of")],
            edit(tensor(up, suffix), |bytes| bytes[1] ^= 4),
        );
    }
    made.forged(&[&layer(up, "has a scale of -")], edit(tensor(up, "weight_scale"), |bytes| bytes[3] ^= 0x80));
    made.forged(&[&layer(up, "cannot be read: ")], edit(tensor(up, "weight_scale"), |bytes| bytes[..4].fill(0xff)));
    made.forged(
        &[&layer(up, "cannot be read: "), "weight_shape"],
        edit(tensor(up, "weight_shape"), |bytes| bytes[0] ^= 1),
    );
    // The last quarter of the zeros of key projections is no code's.
    let padding = layer("self_attn.k_proj", "has bits in");
    made.forged(
        &[&padding],
        edit(tensor("self_attn.k_proj", "weight_zero_point"), |bytes| *bytes.last_mut().unwrap() ^= 0x80),
    );
    // Two tensors of equal shape, one in the other's place.
    let (gate, up_codes) = (tensor("mlp.gate_proj", "weight_packed"), tensor(up, "weight_packed"));
    let swap = |out: &Path| {
        edit_header(&weights(out), |header| {
            let (a, b) = (header[&gate]["data_offsets"].clone(), header[&up_codes]["data_offsets"].clone());
            assert_eq!(header[&gate]["shape"], header[&up_codes]["shape"]);
            header[&gate]["data_offsets"] = b;
            header[&up_codes]["data_offsets"] = a;
        });
    };
    let both = [layer("mlp.gate_proj", "has a relative error"), layer(up, "has a relative error")];
    made.forged(&[&both[0], &both[1]], swap);
    // Copies: norms, and a tensor that is gone or came in addition.
    let norm = "model.language_model.layers.0.input_layernorm.weight";
    made.forged(&[&format!("the tensor {norm} is not the base model's")], edit(norm.to_owned(), |bytes| bytes[0] ^= 1));
    made.forged(&[&format!("the tensor {norm} is missing"), "the tensor odd does not belong"], |out| {
        edit_header(&weights(out), |header| {
            let entry = header.remove(norm).unwrap();
            header.insert("odd".to_owned(), entry);
        });
    });
    made.forged(&[&format!("the tensor {norm} is F32 [32, 2] instead of F32 [64]")], |out| {
        edit_header(&weights(out), |header| header[norm]["shape"] = json!([32, 2]));
    });
    // config.json and what stands beside it.
    let set = |section: &'static str, key: &'static str, value: Value| {
        move |out: &Path| {
            edit_json(&out.join("config.json"), |all| match section {
                "" => all[key] = value,
                _ => all[section][key] = value,
            });
        }
    };
    made.forged(
        &["config.json's text_config is not the base model's"],
        set("text_config", "rms_norm_eps", json!(1e-3)),
    );
    made.forged(&["config.json's vlmq.seed is not what report.json says"], set("vlmq", "seed", json!(1)));
    made.forged(&["config.json's extra is not the base model's"], |out| {
        edit_json(&out.join("config.json"), |all| drop(all.insert("extra".to_owned(), json!(1))));
    });
    made.forged(&["config.json has no vlmq"], |out| {
        edit_json(&out.join("config.json"), |all| drop(all.remove("vlmq")))
    });
    made.forged(&["config.json does not describe the weights", "compressed-tensors, 4 bits"], |out| {
        edit_json(&out.join("config.json"), |all| {
            all["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = json!(4);
        });
    });
    made.forged(&["the base model's tokenizer.json was not copied"], |out| {
        flip(&out.join("tokenizer.json"), |n| n / 2)
    });
    made.forged(&["the base model's README.md was not copied"], |out| flip(&out.join("README.base.md"), |n| n / 2));
    // The record: another figure, another layer, a file outside.
    let report =
        |edit: fn(&mut serde_json::Map<String, Value>)| move |out: &Path| edit_json(&out.join("report.json"), edit);
    let first = &made_name(&made.out);
    made.forged(
        &[&format!("the layer {first} has a relative error of weights of")],
        report(|all| {
            let error = all["layers"][0]["weight_error"].as_f64().unwrap();
            all["layers"][0]["weight_error"] = json!(f64::from_bits(error.to_bits() + 1));
        }),
    );
    made.forged(
        &[&format!("the layer {first} is not in report.json"), "a layer other, which the base model has not"],
        report(|all| {
            all["layers"][0]["name"] = json!("other");
        }),
    );
    made.forged(
        &["report.json names a file \"../model/config.json\", which leads out"],
        report(|all| {
            all["inputs"]["model"]["../model/config.json"] = json!("0");
        }),
    );
}

/// Settings that are lacking or of another kind are named, with their place in the file.
#[test]
fn settings_are_those_of_a_run() {
    let made = Made::of(FLAT, &["--format", "compressed-tensors"]);
    let forged = |says: &str, edit: fn(&mut Value)| {
        let says = ["report.json is no report of vlmq-run quantize: ", says].concat();
        made.forged(&[&says, "not checked further"], |out| {
            edit_json(&out.join("report.json"), |all| edit(&mut all["settings"]));
        });
    };
    forged("missing field `format` at line ", |settings| drop(settings.as_object_mut().unwrap().remove("format")));
    forged("missing field `solver` at line ", |settings| drop(settings.as_object_mut().unwrap().remove("solver")));
    forged("invalid type: null, expected struct RunSettings at line ", |settings| *settings = Value::Null);
    forged("no format \"best\"; there are compressed-tensors, ", |settings| settings["format"] = json!("best"));
    forged("invalid type: string \"3\", expected u32 at line ", |settings| settings["solver"]["bits"] = json!("3"));
    forged("unknown variant `most`, expected ", |settings| settings["solver"]["grid"] = json!("most"));
    forged("importance_power must be above 0", |settings| settings["importance_power"] = json!(2));
    made.broken(&["report.json is no report of vlmq-run quantize: missing field `settings`"], |out| {
        edit_json(&out.join("report.json"), |all| drop(all.remove("settings")));
    });
}

/// Settings that were added since do not come between an older output and its verification.
#[test]
fn outputs_of_earlier_versions_verify() {
    let made = Made::of(FLAT, &[]);
    let (_folder, out) = made.copy();
    let forget = |settings: &mut Value| {
        for added in ["importance_power", "refit"] {
            assert!(settings.as_object_mut().unwrap().remove(added).is_some(), "{added}");
        }
    };
    edit_json(&out.join("report.json"), |all| forget(&mut all["settings"]));
    edit_json(&out.join("config.json"), |all| forget(&mut all["vlmq"]["settings"]));
    fs::write(out.join("SHA256SUMS"), Sums::of(&out).unwrap().text()).unwrap();
    let output = made.verify(&out);
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    // What is said must agree still.
    made.forged(&["config.json's vlmq.settings is not what report.json says"], |out| {
        edit_json(&out.join("config.json"), |all| all["vlmq"]["settings"]["solver"]["alpha"] = json!(0.125));
    });
}

fn made_name(out: &Path) -> String {
    read_json(out.join("report.json"))["layers"][0]["name"].as_str().unwrap().to_owned()
}

#[test]
fn groups_are_of_their_size() {
    let made = Made::of(FLAT, &["--format", "gptq", "--order", "act", "--group-size", "16", "--bits", "4"]);
    let index = "model.layers.0.mlp.up_proj.g_idx";
    made.forged(&["the layer model.layers.0.mlp.up_proj has a group 0 that is not of 16 columns"], |out| {
        edit_tensor(&weights(out), index, |bytes| bytes.fill(0));
    });
    made.forged(&["the layer model.layers.0.mlp.up_proj cannot be read: ", "into group 2, but there are 2"], |out| {
        edit_tensor(&weights(out), index, |bytes| bytes[..4].copy_from_slice(&2u32.to_le_bytes()));
    });
}

#[test]
fn another_base_model_is_told_apart() {
    let made = Made::of(FLAT, &["--format", "compressed-tensors"]);
    let work = tempfile::tempdir().unwrap();
    let verify = |model: &Path| vlmq_run(&["verify", &text(&made.out), "--against", &text(model), "--quiet"]);
    let other = |fault: &dyn Fn(&Path)| {
        let model = work.path().join("model");
        let _ = fs::remove_dir_all(&model);
        copy_folder(&made.bench.model(), &model);
        fault(&model);
        verify(&model)
    };
    // One bit of a weight that was quantized: its file, and the layer's error.
    let output = other(&|model| {
        edit_tensor(&weights(model), "model.layers.0.mlp.up_proj.weight", |bytes| bytes[1] ^= 0x40);
    });
    differs(
        &output,
        &[
            "the base model's model.safetensors is not the file",
            "the layer model.layers.0.mlp.up_proj has a relative error",
        ],
    );
    let output = other(&|model| edit_tensor(&weights(model), "model.norm.weight", |bytes| bytes[0] ^= 1));
    differs(&output, &["the base model's model.safetensors", "the tensor model.norm.weight is not the base model's"]);
    let output = other(&|model| fs::remove_file(model.join("tokenizer.json")).unwrap());
    differs(&output, &["the base model has no file tokenizer.json"]);
    // Another family altogether: many differences, some of them shown.
    let output = verify(&golden("model/qwen2_5_vl-flat-bf16"));
    differs(&output, &["the base model's config.json is not the file"]);

    // Nothing to compare with, or nothing to compare.
    for (model, says) in [(work.path().join("none"), "none"), (made.out.clone(), "already quantized")] {
        let output = verify(&model);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(says), "{}", stderr(&output));
        assert_eq!(stdout(&output), "");
    }
    let output = made.verify(&made.bench.model());
    assert!(stderr(&output).contains("SHA256SUMS"), "{}", stderr(&output));
    assert_eq!(vlmq_run(&["verify", &text(&made.out)]).status.code(), Some(2));
    assert_eq!(names_in(&made.bench.outputs()), ["out"]);
}

/// An evaluation adds to the reports after all else is written.
#[test]
fn evaluated_checkpoints_verify() {
    let bench = Bench::new(FLAT);
    let data = text(bench.data());
    succeed(&bench.quantize(&["--eval", &data]));
    let out = bench.outputs().join("out");
    let output = vlmq_run(&["verify", &text(&out), "--against", &text(bench.model()), "--quiet"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
}

#[test]
fn many_differences_are_counted() {
    let made = Made::of(FLAT, &["--format", "compressed-tensors"]);
    let (folder, out) = made.copy();
    for number in 0..30 {
        fs::write(out.join(format!("odd-{number}")), "").unwrap();
    }
    let json = folder.path().join("found.json");
    let against = text(made.bench.model());
    let output = vlmq_run(&["verify", &text(&out), "--against", &against, "--json", &text(&json), "--quiet"]);
    differs(&output, &["and 10 more differences"]);
    assert!(stderr(&output).contains("30 differences"), "{}", stderr(&output));
    assert_eq!(read_json(&json)["differences"].as_array().unwrap().len(), 30);
}

/// config.json and the model card say where the weights come from, without a folder's name.
#[test]
fn outputs_name_their_source() {
    let made = Made::of(FLAT, &["--format", "dequantized", "--seed", "7"]);
    let config = read_json(made.out.join("config.json"));
    let report = read_json(made.out.join("report.json"));
    let said = &config["vlmq"];
    let keys: Vec<&String> = said.as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        ["version", "commit", "base_model", "base_model_sha256", "format", "settings", "seed", "calibration"]
    );
    assert_eq!(
        (&said["seed"], &said["base_model"], &said["format"]),
        (&json!(7), &json!("model"), &json!("dequantized"))
    );
    assert_eq!((&said["version"], &said["commit"]), (&report["vlmq_version"], &report["commit"]));
    assert_eq!(said["settings"]["solver"], report["settings"]["solver"]);
    let calibration = vlmq::checkpoint::checksum::of_file(&made.bench.data()).unwrap();
    assert_eq!(said["calibration"]["sha256"], calibration);
    assert_eq!(said["calibration"]["file"], "data.jsonl");
    let version = succeed(&["--version"]);
    let both = format!("{}+{}", said["version"].as_str().unwrap(), said["commit"].as_str().unwrap());
    assert_eq!(version.trim(), format!("vlmq-run {both}"));

    let card = fs::read_to_string(made.out.join("README.md")).unwrap();
    for part in [
        "---\nlicense: mit\nbase_model: \"model\"\n",
        "# out\n",
        &calibration,
        "seed 7",
        "vllm serve out\n",
        "README.base.md",
    ] {
        assert!(card.contains(part), "{part} is not in {card}");
    }
    assert_eq!(fs::read_to_string(made.out.join("README.base.md")).unwrap(), "---\nlicense: mit\n---\n# Base\n");
    let folder = text(made.bench.outputs().parent().unwrap());
    for text in [card, config.to_string()] {
        assert!(!text.contains(&folder), "{text}");
    }

    // An output is a float checkpoint again: both cards stay, and the key is the new run's.
    let again = made.bench.outputs().join("again");
    let line =
        ["quantize", &text(&made.out), "--solver", "rtn", "--group-size", "32", "--out", &text(&again), "--quiet"];
    succeed(&line);
    assert_eq!(fs::read(again.join("README.base.md")).unwrap(), fs::read(made.out.join("README.base.md")).unwrap());
    assert_eq!(fs::read(again.join("README.base.base.md")).unwrap(), fs::read(made.out.join("README.md")).unwrap());
    assert_eq!(read_json(again.join("config.json"))["vlmq"]["base_model"], "out");
    let output = vlmq_run(&["verify", &text(&again), "--against", &text(&made.out), "--quiet"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
}
