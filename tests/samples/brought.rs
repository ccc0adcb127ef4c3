//! What people bring: checkpoints that trainers and other tools leave, templates and data in the forms that are about. Each is read as
//! the program that it comes from reads it, or refused.

use crate::support::program::{
    Bench, IMAGE, copy_folder, edit_header, edit_json, edit_tensor, names_in, question, read_json, stderr, stdout,
    succeed, vlmq_run,
};
use crate::support::{data, golden};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use vlmq::checkpoint::Checkpoint;
use vlmq::data::dataset::{self, Message, Part};
use vlmq::data::sequence::{Sequence, SequenceBuilder};
use vlmq::data::template::ChatTemplate;
use vlmq::device::cpu::Cpu;
use vlmq::model::families::{self, ImageOptions};

/// One file of bf16 weights, the head tied to the embedding.
const FLAT: &str = "flat-tied-bf16";

fn plain(role: &str, text: &str) -> Message {
    Message { role: role.into(), content: vec![Part::Text(text.into())], plain: true }
}

/// The template of a folder that has this one.
fn template(folder: &Path, source: &str) -> ChatTemplate {
    fs::write(folder.join("chat_template.jinja"), source).unwrap();
    ChatTemplate::load(folder).unwrap()
}

/// What a checkpoint's tokenizer and template make of lines of data.
fn sequences(model: &Path, file: &Path) -> anyhow::Result<Vec<Sequence>> {
    let checkpoint = Checkpoint::open(model)?;
    let vision = families::of::<Cpu>(&checkpoint)?.vision_input(&checkpoint, ImageOptions::default())?;
    let builder = SequenceBuilder::new(model, vision)?;
    dataset::read(file, None)?.iter().map(|conversation| builder.build(conversation)).collect()
}

/// Total negative log-likelihood that `eval` finds.
fn nll(bench: &Bench) -> f64 {
    succeed(&bench.eval(&[]));
    let scores = bench.outputs().join("scores.json");
    let nll = read_json(&scores)["nll"].as_f64().unwrap();
    fs::remove_file(scores).unwrap();
    nll
}

/// Quantizes, and returns what was said on the way; the output is `outputs/out`.
fn quantized(bench: &Bench, extra: &[&str]) -> String {
    let output = vlmq_run(&bench.quantize(extra));
    assert_eq!(output.status.code(), Some(0), "{extra:?}: {}", stderr(&output));
    stderr(&output) + &stdout(&output)
}

#[test]
fn templates_get_texts_in_the_form_that_they_take() {
    // All walk through the parts of a user's turn; what they do with the others' is what is said of each.
    const USER: &str = "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}";
    const LOOP: &str = "{% for p in m.content %}{{ p.text }}{% endfor %}";
    let bench = Bench::new(FLAT);
    let conversation = [plain("system", "be short."), plain("user", "what?"), plain("assistant", "a square")];
    let as_parts = conversation.clone().map(|message| Message { plain: false, ..message });
    for (what, body) in [
        ("shows all as it stands", USER.to_owned()),
        ("walks through all", LOOP.to_owned()),
        (
            "adds the system's",
            format!("{{% if m.role == 'system' %}}{{{{ '' + m.content }}}}{{% else %}}{USER}{{% endif %}}"),
        ),
        (
            "shows the assistant's",
            format!("{{% if m.role == 'assistant' %}}{{{{ m.content }}}}{{% else %}}{LOOP}{{% endif %}}"),
        ),
        (
            "trims the assistant's",
            format!("{{% if m.role == 'assistant' %}}{{{{ m.content | trim }}}}{{% else %}}{USER}{{% endif %}}"),
        ),
    ] {
        let template =
            template(&bench.model(), &format!("{{% for m in messages %}}[{{{{ m.role }}}}:{body}]{{% endfor %}}"));
        for messages in [&conversation, &as_parts] {
            let shown = template.render(messages, false).unwrap();
            assert_eq!(shown, "[system:be short.][user:what?][assistant:a square]", "{what}");
        }
    }
    // A template that takes nothing but strings is no vision-language model's.
    fs::write(bench.file("chat_template.jinja"), "{% for m in messages %}{{ '' + m.content }}{% endfor %}").unwrap();
    bench.refused(&bench.quantize(&[]), &["takes only plain strings"]);
}

#[test]
fn an_answer_that_cannot_be_told_from_its_prompt_calibrates() {
    let bench = Bench::new(FLAT);
    let source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}<|image_pad|>\
        {% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
    fs::write(bench.file("chat_template.jinja"), source).unwrap();
    quantized(&bench, &[]);
    fs::remove_dir_all(bench.outputs().join("out")).unwrap();
    bench.refused(&bench.eval(&[]), &["data.jsonl:1", "the answer cannot be told from the prompt"]);
}

#[test]
fn tokens_beside_tokenizer_json_are_tokens() {
    // As AutoTokenizer of transformers 5.24 has them.
    let expected = [86, 257, 259, 265, 220, 615, 333, 30];
    let properties = json!({"content": "<box>", "special": true, "normalized": false});
    type Way<'a> = (&'a str, &'a dyn Fn(&Path));
    let ways: [Way<'_>; 4] = [
        ("added_tokens_decoder", &|model| {
            edit_json(&model.join("tokenizer_config.json"), |config| {
                config.insert("added_tokens_decoder".into(), json!({"615": properties}));
            });
        }),
        ("added_tokens.json", &|model| fs::write(model.join("added_tokens.json"), r#"{"<box>": 615}"#).unwrap()),
        ("extra_special_tokens", &|model| {
            edit_json(&model.join("tokenizer_config.json"), |config| {
                config.insert("extra_special_tokens".into(), json!({"box_token": "<box>"}));
            });
        }),
        ("special_tokens_map.json", &|model| {
            fs::write(model.join("special_tokens_map.json"), r#"{"additional_special_tokens": ["<box>"]}"#).unwrap();
        }),
    ];
    for (what, add) in ways {
        let bench = Bench::new(FLAT);
        bench.write_data(&[r#"{"text": "where is <box> red?"}"#]);
        let before = sequences(&bench.model(), &bench.data()).unwrap().remove(0).tokens;
        assert!(before.len() > expected.len(), "{before:?}");
        add(&bench.model());
        assert_eq!(sequences(&bench.model(), &bench.data()).unwrap()[0].tokens, expected, "{what}");
    }
    // A number that the token would not get.
    let bench = Bench::new(FLAT);
    fs::write(bench.file("added_tokens.json"), r#"{"<box>": 700}"#).unwrap();
    bench.refused(&bench.quantize(&[]), &["\"<box>\"", "700", "615"]);
}

#[test]
fn a_stored_head_is_the_head() {
    // A checkpoint with a head of its own says the same whatever its flag says.
    let bench = Bench::new("llava-v5-f32");
    let own = nll(&bench);
    edit_json(&bench.file("config.json"), |config| {
        config.insert("tie_word_embeddings".into(), true.into());
    });
    assert_eq!(nll(&bench), own);
    let said = quantized(&bench, &[]);
    assert!(said.contains("tie_word_embeddings") && said.contains("lm_head.weight"), "{said}");
}

#[test]
fn a_head_that_is_nowhere_is_said_at_the_start() {
    let bench = Bench::new(FLAT);
    edit_json(&bench.file("config.json"), |config| {
        config.insert("tie_word_embeddings".into(), false.into());
        if let Some(text) = config.get_mut("text_config").and_then(Value::as_object_mut) {
            text.insert("tie_word_embeddings".into(), false.into());
        }
    });
    let data = bench.data().display().to_string();
    bench.refused(&bench.eval(&[]), &["no tensor lm_head.weight", "tie_word_embeddings"]);
    bench.refused(&bench.quantize(&["--eval", &data]), &["no tensor lm_head.weight", "tie_word_embeddings"]);
    let said = quantized(&bench, &[]);
    assert!(said.contains("no tensor lm_head.weight") && said.contains("not compared"), "{said}");
}

/// Rewrites the weight file, each tensor as `change` has it: type, shape, bytes.
fn rewrite(path: &Path, change: impl Fn(&str, Dtype, &[u8]) -> (Dtype, Vec<u8>)) {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let (dtype, data) = change(&name, view.dtype(), view.data());
            (name, dtype, view.shape().to_vec(), data)
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn layers_may_be_stored_in_different_types() {
    const WIDE: &str = "model.layers.1.mlp.down_proj.weight";
    for (format, kind) in [("compressed-tensors", "weight_scale"), ("gptq", "scales"), ("dequantized", "weight")] {
        let bench = Bench::new(FLAT);
        rewrite(&bench.file("model.safetensors"), |name, dtype, data| match name {
            WIDE => (
                Dtype::F32,
                // A bfloat16 is the upper half of a float32.
                data.chunks_exact(2).flat_map(|half| [0, 0, half[0], half[1]]).collect(),
            ),
            _ => (dtype, data.to_vec()),
        });
        quantized(&bench, &["--format", format]);
        let mixed = Checkpoint::open(&bench.outputs().join("out")).unwrap();
        // The values are the same, and so is what comes of them.
        let usual = Bench::new(FLAT);
        quantized(&usual, &["--format", format]);
        let usual = Checkpoint::open(&usual.outputs().join("out")).unwrap();
        let name = WIDE.replace("weight", kind);
        let (mixed, usual) = (mixed.tensor(&name).unwrap(), usual.tensor(&name).unwrap());
        assert!((mixed.dtype, mixed.bytes) == (usual.dtype, usual.bytes), "{format}");
    }
}

#[test]
fn a_leftover_quantization_config_over_floats_is_no_quantization() {
    let bench = Bench::new(FLAT);
    let before = nll(&bench);
    edit_json(&bench.file("config.json"), |config| {
        config.insert("quantization_config".into(), json!({"quant_method": "bitsandbytes", "load_in_4bit": true}));
    });
    assert_eq!(nll(&bench), before);
    for (format, method) in [("compressed-tensors", json!("compressed-tensors")), ("dequantized", Value::Null)] {
        let said = quantized(&bench, &["--format", format]);
        assert!(said.contains("leftover"), "{said}");
        let out = bench.outputs().join("out");
        assert_eq!(read_json(out.join("config.json"))["quantization_config"]["quant_method"], method);
        let model = bench.model().display().to_string();
        succeed(&["verify", out.to_str().unwrap(), "--against", &model]);
        fs::remove_dir_all(out).unwrap();
    }
}

#[test]
fn adapters_stay_behind_or_are_to_be_merged() {
    let bench = Bench::new(FLAT);
    fs::write(bench.file("adapter_config.json"), "{}").unwrap();
    fs::write(bench.file("adapter_model.safetensors"), "no weights of the model").unwrap();
    fs::write(bench.file("optimizer.pt"), "moments").unwrap();
    let said = quantized(&bench, &[]);
    assert!(said.contains("merge_and_unload"), "{said}");
    assert_eq!(said.matches("no part of a model").count(), 1, "{said}");
    assert!(said.contains("optimizer.pt"), "{said}");
    let written = names_in(&bench.outputs().join("out"));
    assert!(written.iter().all(|name| !name.contains("adapter") && !name.contains("optimizer")), "{written:?}");

    let bench = Bench::new(FLAT);
    edit_header(&bench.file("model.safetensors"), |header| {
        let tensor = header.remove("model.layers.0.self_attn.q_proj.weight").unwrap();
        header.insert("model.layers.0.self_attn.q_proj.base_layer.weight".into(), tensor);
    });
    bench.refused(&bench.quantize(&[]), &["base_layer", "merge"]);
}

#[cfg(unix)]
#[test]
fn a_download_cache_may_have_any_name() {
    let folder = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (folder.path().join("mine/blobs"), folder.path().join("mine/snapshots/0123"));
    fs::create_dir_all(&snapshot).unwrap();
    copy_folder(&golden("model").join(FLAT), &blobs);
    for name in names_in(&blobs) {
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), snapshot.join(&name)).unwrap();
    }
    let bench = Bench::new(FLAT);
    let arguments = bench.quantize(&[]).into_iter().map(|word| match word {
        _ if Path::new(&word) == bench.model() => snapshot.display().to_string(),
        _ => word,
    });
    succeed(&arguments.collect::<Vec<_>>());
}

#[test]
fn data_in_the_forms_that_are_about() {
    let bench = Bench::new(FLAT);
    let text = |line: &Value| {
        bench.write_data(&[&line.to_string()]);
        sequences(&bench.model(), &bench.data()).map(|mut all| all.remove(0))
    };
    let shows = |line: &Value, vision_tokens: bool| {
        let sequence = text(line).unwrap_or_else(|error| panic!("{line}: {error:#}"));
        assert_eq!(sequence.vision_tokens > 0, vision_tokens, "{line}");
        sequence.tokens
    };
    let refused = |line: Value, says: &str| {
        let error = text(&line).map(drop).unwrap_err();
        assert!(format!("{error:#}").contains(says), "{line}: {error:#}");
    };
    let asked = |value: &str| json!([{"from": "human", "value": value}, {"from": "gpt", "value": "triangle"}]);
    let turns = |value: &str| json!([{"role": "user", "content": value}, {"role": "assistant", "content": "triangle"}]);

    // The system's words in a column of their own (LLaMA-Factory).
    let with_turn = json!({"conversations": [{"from": "system", "value": "one word."}, {"from": "human", "value": "what?"}, {"from": "gpt", "value": "a"}]});
    let with_column = json!({"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a"}], "system": "one word."});
    assert_eq!(shows(&with_column, false), shows(&with_turn, false));
    let both = json!({"conversations": with_turn["conversations"], "system": "another."});
    refused(both, "both a `system` column");
    assert_eq!(
        shows(&json!({"conversations": asked("what?"), "system": ""}), false),
        shows(&json!({"conversations": asked("what?")}), false)
    );

    // A column of images that is empty, and markers in messages.
    assert_eq!(
        shows(&json!({"messages": turns("what?"), "images": []}), false),
        shows(&json!({"messages": turns("what?")}), false)
    );
    let parts = json!([{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what?"}]}, {"role": "assistant", "content": "triangle"}]);
    assert_eq!(
        shows(&json!({"messages": turns("<image>what?"), "images": [IMAGE]}), true),
        shows(&json!({"messages": parts}), true)
    );
    refused(json!({"messages": turns("what?"), "images": [IMAGE]}), "no image part");
    refused(json!({"messages": turns("<image><image>what?"), "images": [IMAGE]}), "2 <image> markers");

    // What means an image and shows none.
    refused(json!({"conversations": asked(&format!("<img>{IMAGE}</img>what?"))}), "write it as an image part");
    refused(json!({"messages": turns("<image>what?")}), "the line has no image");
    refused(json!({"conversations": asked("what?"), "image_path": IMAGE}), "`image_path` names an image");
    refused(json!({"messages": turns("what?"), "files": ["a.JPG", "b.webp"]}), "`files` names an image");
    // HTML is none, nor is a column of words.
    shows(&json!({"messages": turns("what does <img> mean?"), "source": "a.png is red", "files": []}), false);

    // An image in base64 without the beginning of a URI.
    use base64::Engine;
    let bytes = base64::engine::general_purpose::STANDARD.encode(fs::read(golden("model/images").join(IMAGE)).unwrap());
    let uri = format!("data:image/png;base64,{bytes}");
    let [bare, uri] =
        [bytes, uri].map(|image| shows(&json!({"conversations": asked("<image>what?"), "image": image}), true));
    assert_eq!(bare, uri);
    // A string that is neither that nor a path is not shown whole.
    let long = "no/such/".repeat(1000) + "../../../../x";
    let error = format!(
        "{:#}",
        text(&json!({"conversations": asked("<image>what?"), "image": format!("https://{long}")})).unwrap_err()
    );
    assert!(error.len() < 500 && error.contains("not fetched"), "{error}");

    // What Python writes for numbers that JSON does not have, in a column that is none of ours.
    bench.write_data(&[r#"{"text": "a NaN \" Infinity", "score": NaN, "more": [-Infinity, {"x": Infinity}]}"#]);
    let odd = sequences(&bench.model(), &bench.data()).unwrap().remove(0).tokens;
    assert_eq!(odd, shows(&json!({"text": "a NaN \" Infinity"}), false));
    bench.write_data(&[r#"{"text": NaN}"#]);
    assert!(sequences(&bench.model(), &bench.data()).is_err());
}

#[test]
fn bad_images_end_a_run_or_are_counted() {
    let bench = Bench::new(FLAT);
    fs::write(bench.data().with_file_name("broken.png"), b"\x89PNG\r\n\x1a\nno more").unwrap();
    bench.write_data(&[&question(IMAGE), &question("broken.png"), &question("missing.png")]);
    bench.refused(&bench.quantize(&[]), &["data.jsonl:"]);
    let said = quantized(&bench, &["--skip-bad-images"]);
    assert!(said.contains("broken.png") && said.contains("missing.png"), "{said}");
    assert!(said.contains("1 samples, 0 left out as too long, 2 for a bad image"), "{said}");
    assert_eq!(read_json(bench.outputs().join("out/report.json"))["calibration"]["bad_images"], 2);
    fs::remove_dir_all(bench.outputs().join("out")).unwrap();
    bench.write_data(&[&question("missing.png")]);
    bench.refused(&bench.quantize(&["--skip-bad-images"]), &["all 1 conversations have an image that cannot be read"]);
}

#[test]
fn gptq_files_are_of_the_version_that_is_asked_for() {
    for (flags, format) in [
        (&["--bits", "4"][..], "gptq_v2"),
        (&["--bits", "4", "--symmetric"], "gptq"),
        (&["--bits", "4", "--gptq-version", "1"], "gptq"),
        (&["--bits", "4", "--gptq-version", "2", "--symmetric"], "gptq_v2"),
    ] {
        let bench = Bench::new(FLAT);
        let said = quantized(&bench, &[flags, &["--format", "gptq"]].concat());
        let out = bench.outputs().join("out");
        for file in ["config.json", "quantize_config.json"] {
            let config = read_json(out.join(file));
            let entry = config.get("quantization_config").unwrap_or(&config);
            assert_eq!(entry["checkpoint_format"], format, "{flags:?} {file}");
        }
        // Version 1 is read a step off where zeros are read.
        assert_eq!(said.contains("every weight comes out a step off"), flags.contains(&"1"), "{flags:?}: {said}");
        let model = bench.model().display().to_string();
        succeed(&["verify", out.to_str().unwrap(), "--against", &model]);
    }
    let bench = Bench::new(FLAT);
    let output = vlmq_run(&bench.quantize(&["--gptq-version", "2"]));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[test]
fn a_symmetric_gptq_file_of_version_2_that_is_called_1_is_read_rightly() {
    let bench = Bench::new(FLAT);
    quantized(&bench, &["--format", "gptq", "--bits", "4", "--symmetric"]);
    let out = bench.outputs().join("out");
    let scores = bench.outputs().join("scores.json");
    let eval = || {
        let (data, json) = (bench.data(), scores.display().to_string());
        succeed(&["eval", out.to_str().unwrap(), data.to_str().unwrap(), "--json", &json]);
        read_json(&scores)["nll"].clone()
    };
    let before = eval();
    let weights = out.join("model.safetensors");
    let names: Vec<String> =
        Checkpoint::open(&out).unwrap().names().filter(|name| name.ends_with(".qzeros")).map(str::to_owned).collect();
    assert!(!names.is_empty());
    for name in &names {
        edit_tensor(&weights, name, |bytes| {
            assert!(bytes.iter().all(|&byte| byte == 0x77), "{name}");
            bytes.fill(0x88);
        });
    }
    assert_eq!(eval(), before);
}

#[test]
fn whole_rows_have_no_order_of_groups() {
    for (flags, actorder) in [(&["--group-size", "none"][..], Value::Null), (&[], json!("static"))] {
        let bench = Bench::new(FLAT);
        quantized(&bench, flags);
        let config = read_json(bench.outputs().join("out/config.json"));
        let group = &config["quantization_config"]["config_groups"]["group_0"];
        assert_eq!((&group["weights"]["actorder"], &group["format"]), (&actorder, &json!("pack-quantized")));
    }
}

#[test]
fn scales_at_the_bottom_of_their_type_are_found() {
    let bench = Bench::new(FLAT);
    const TINY: &str = "model.layers.0.mlp.up_proj.weight";
    rewrite(&bench.file("model.safetensors"), |name, dtype, data| match name {
        // bfloat16 of about 1e-9, both signs: below what a float16 scale can tell.
        TINY => (dtype, data.chunks_exact(2).flat_map(|half| [half[0], 0x30 | half[1] & 0x80]).collect()),
        _ => (dtype, data.to_vec()),
    });
    let said = quantized(&bench, &["--format", "gptq", "--bits", "4", "--symmetric"]);
    assert!(said.contains("scales too small in 1"), "{said}");
    fs::remove_dir_all(bench.outputs().join("out")).unwrap();
    assert!(!quantized(&bench, &["--bits", "4", "--symmetric"]).contains("scales too small"));
}

#[test]
fn what_a_server_cannot_take_is_said() {
    for (flags, says) in [
        (&["--order", "act"][..], "refuses files with a g_idx"),
        (&["--group-size", "8"], "groups of less than 16 columns"),
        (&["--format", "gptq", "--group-size", "none", "--symmetric"], "no kernel for whole rows"),
    ] {
        let bench = Bench::new(FLAT);
        let said = quantized(&bench, flags);
        assert!(said.contains("not served: vLLM") && said.contains(says), "{flags:?}: {said}");
        let report = read_json(bench.outputs().join("out/report.json"));
        assert!(report["shut_out"].as_array().is_some_and(|all| !all.is_empty()) && report["largest_split"].is_u64());
    }
    let bench = Bench::new(FLAT);
    let said = quantized(&bench, &[]);
    assert!(
        !said.contains("not served") && said.contains("vLLM 0.31 or newer") && said.contains("parallelism"),
        "{said}"
    );
    let inspected = succeed(&["inspect", data("tiny-qwen2-vl").to_str().unwrap()]);
    assert!(inspected.contains("tensor parallelism in servers: groups of 128: up to 2 GPUs"), "{inspected}");
}
