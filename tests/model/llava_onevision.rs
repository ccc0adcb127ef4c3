//! LLaVA-OneVision through the program: its flags, and what is wrong with a checkpoint or an image of it.

use crate::support::data;
use crate::support::picture::save_png;
use crate::support::program::{Bench, edit_header, edit_json, read_json, succeed, text};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use vlmq::data::dataset::{ImageSource, Message, Part};
use vlmq::data::template::ChatTemplate;

/// Names and files as on the hub.
const HUB: &str = "llava-hub-tied-f16";
/// Those of transformers 5.
const V5: &str = "llava-v5-f32";

/// Asserts that quantize and eval of a broken copy of `checkpoint` are refused with words that contain all of `says`.
fn broken(checkpoint: &str, says: &[&str], fault: impl FnOnce(&Path)) {
    let bench = Bench::new(checkpoint);
    fault(&bench.model());
    bench.refused(&bench.quantize(&[]), says);
    bench.refused(&bench.eval(&[]), says);
}

fn set(model: &Path, file: &str, section: Option<&str>, key: &str, value: Value) {
    edit_json(&model.join(file), |all| {
        let object = match section {
            Some(section) => all[section].as_object_mut().unwrap(),
            None => all,
        };
        object.insert(key.to_owned(), value);
    });
}

#[test]
fn configurations() {
    let cases = [
        (None, "vision_feature_select_strategy", json!("default"), "known is full"),
        (None, "vision_feature_layer", json!(-2), "is -2"),
        (None, "vision_feature_layer", json!([-1, -3]), "is [-1,-3]"),
        (None, "multimodal_projector_bias", json!(false), "without biases is not supported"),
        (None, "projector_hidden_act", json!("relu6"), "known are silu"),
        (None, "vision_aspect_ratio", json!("anyres"), "not anyres_max_N"),
        (None, "vision_aspect_ratio", json!("anyres_max_0"), "not anyres_max_N"),
        (None, "image_grid_pinpoints", json!([[48, 50]]), "[48,50]"),
        (None, "text_config", Value::Null, "is missing"),
        (None, "vision_config", Value::Null, "is missing"),
        (None, "image_token_index", Value::Null, "is missing"),
        (Some("text_config"), "model_type", json!("llama"), "known is qwen2"),
        (Some("text_config"), "rope_scaling", json!({"type": "yarn", "factor": 4}), "known are mrope, default"),
        (Some("text_config"), "use_sliding_window", json!(true), "not supported for llava_onevision"),
        (Some("vision_config"), "model_type", json!("clip_vision_model"), "known is siglip_vision_model"),
        (Some("vision_config"), "layer_norm_eps", json!(1e-5), "known is 1e-6"),
        (Some("vision_config"), "patch_size", json!(49), "at least one patch"),
        (Some("vision_config"), "image_size", json!(1 << 30), "at most 1024 in a row"),
        (Some("vision_config"), "num_attention_heads", json!(5), "hidden_size is 144"),
    ];
    for (section, key, value, says) in cases {
        let named = section.map_or(key.to_owned(), |section| format!("{section}.{key}"));
        // Two keys are in error at once where heads do not fit; the one that tells the width is named.
        let named = if key == "num_attention_heads" { "vision_config.hidden_size".to_owned() } else { named };
        broken(HUB, &["config.json", &named, says], |model| set(model, "config.json", section, key, value));
    }
    // The list that stands for a missing one is for towers of 384 pixels.
    broken(V5, &["config.json", "image_grid_pinpoints is missing", "multiples of 384"], |model| {
        set(model, "config.json", None, "image_grid_pinpoints", Value::Null);
    });
}

/// Towers of another shape than config.json claims.
#[test]
fn towers() {
    let vision = |key: &'static str, value: usize| {
        move |model: &Path| set(model, "config.json", Some("vision_config"), key, json!(value))
    };
    let tower = "vision_tower.vision_model.";
    broken(HUB, &["embeddings.patch_embedding", "[144, 3, 14, 14]", "[96, 588]"], vision("hidden_size", 96));
    broken(HUB, &[tower, "encoder.layers.0.mlp.fc1", "[100, 144]", "[101, 144]"], vision("intermediate_size", 101));
    broken(HUB, &[tower, "encoder.layers.2."], vision("num_hidden_layers", 3));
    broken(HUB, &[tower, "encoder.layers.2."], vision("num_hidden_layers", 2_000_000_000));
    broken(HUB, &[tower, "patch_embedding", "[144, 3, 14, 14]", "[144, 768]"], vision("patch_size", 16));
    broken(HUB, &["image_size of config.json is 96", "same checkpoint"], |model| {
        vision("image_size", 96)(model);
        set(model, "config.json", None, "image_grid_pinpoints", json!([[96, 96]]));
    });
    // Both files agree, and the learned positions are of another image.
    broken(HUB, &["position_embedding.weight", "[9, 144]", "[36, 144]"], |model| {
        vision("image_size", 96)(model);
        set(model, "config.json", None, "image_grid_pinpoints", json!([[96, 96]]));
        let size = json!({"height": 96, "width": 96});
        for (key, value) in [("size", size.clone()), ("crop_size", size), ("image_grid_pinpoints", json!([[96, 96]]))] {
            set(model, "preprocessor_config.json", None, key, value);
        }
        set(model, "processor_config.json", None, "num_image_tokens", json!(36));
    });
    for name in ["image_newline", "multi_modal_projector.linear_2.bias", "language_model.model.norm.weight"] {
        let bench = Bench::new(HUB);
        edit_header(&bench.file("model.safetensors"), |all| {
            let tensor = all.remove(name).unwrap();
            all.insert("stray".to_owned(), tensor);
        });
        let says = if name.starts_with("image") { "none of the tensors image_newline" } else { name };
        bench.refused(&bench.eval(&[]), &[says]);
    }
}

/// Counts that the processor's file and config.json tell differently would make placeholders and features disagree.
#[test]
fn processors() {
    for (key, value) in [("num_image_tokens", json!(16)), ("vision_aspect_ratio", json!("anyres_max_4"))] {
        broken(HUB, &["processor_config.json", key, "same checkpoint"], |model| {
            set(model, "processor_config.json", None, key, value);
        });
    }
    broken(HUB, &["preprocessor_config.json", "image_grid_pinpoints", "same checkpoint"], |model| {
        set(model, "preprocessor_config.json", None, "image_grid_pinpoints", json!([[48, 48]]));
    });
}

#[test]
fn images_and_flags() {
    let bench = Bench::new(HUB);
    for flag in ["--min-pixels", "--max-pixels"] {
        let says = [flag, "own resolution", "llava_onevision", "--image-mode"];
        bench.refused(&bench.quantize(&[flag, "50000"]), &says);
        bench.refused(&bench.eval(&[flag, "50000"]), &says);
    }
    bench.refused(&bench.quantize(&["--max-tokens", "9"]), &["all 1", "--image-mode single"]);
    bench.refused(&bench.eval(&["--chat-template", "no/such.jinja"]), &["no/such.jinja", "cannot be read"]);
    let folder = bench.data().parent().unwrap().to_path_buf();
    fs::write(folder.join("plain.jinja"), "{{ messages[0].content }}").unwrap();
    let plain = text(folder.join("plain.jinja"));
    bench.refused(&bench.eval(&["--chat-template", &plain]), &["plain.jinja", "only plain strings"]);
    bench.write_data(&[r#"{"text": "see <video>"}"#]);
    bench.refused(&bench.quantize(&[]), &["data.jsonl:1", "<video>", "videos are not supported"]);
    save_png(&image::RgbImage::new(2010, 10), folder.join("long.png"));
    bench.write_data(&[&crate::support::program::question("long.png")]);
    bench.refused(&bench.quantize(&[]), &["data.jsonl:1", "image 1", "2010x10", "200 times"]);

    let qwen = Bench::new("flat-tied-bf16");
    qwen.refused(&qwen.quantize(&["--image-mode", "single"]), &["--image-mode", "qwen2_vl", "images whole"]);
}

/// 9 tokens of the whole image, a newline; or two tiles, of which all but padding is kept.
#[test]
fn modes_and_templates_reach_the_run_and_its_report() {
    let tokens = |extra: &[&str]| {
        let bench = Bench::new(HUB);
        let flags: Vec<&str> = ["--solver", "gptq", "--quiet"].iter().chain(extra).copied().collect();
        succeed(&bench.quantize(&flags));
        let report = read_json(bench.outputs().join("out/report.json"));
        succeed(&bench.eval(&extra.iter().copied().chain(["--quiet"]).collect::<Vec<_>>()));
        let count = |kind: &str| report["calibration"][kind].as_u64().unwrap();
        (report["settings"].clone(), count("vision_tokens"), count("text_tokens"))
    };
    let (settings, tiled, text_tokens) = tokens(&[]);
    assert_eq!((&settings["image_mode"], &settings["chat_template"]), (&Value::Null, &json!("checkpoint")));
    let (settings, single, same) = tokens(&["--image-mode", "single"]);
    assert_eq!((&settings["image_mode"], single, same), (&json!("single"), 10, text_tokens));
    assert!(tiled > 2 * single, "{tiled}");
    let (settings, same, chatml) = tokens(&["--image-mode", "anyres", "--chat-template", "chatml"]);
    assert_eq!((&settings["chat_template"], same), (&json!("chatml"), tiled));
    // A system prompt of its own, and line breaks.
    assert!(chatml > text_tokens + 5, "{chatml} {text_tokens}");
    let file = text(data("tiny-qwen2-vl/chat_template.jinja"));
    let bench = Bench::new(V5);
    // That template shows another family's placeholder.
    bench.refused(&bench.quantize(&["--chat-template", &file]), &["shows 0 images", "<image>"]);
}

#[test]
fn chatml_is_qwens_and_what_the_converter_of_the_weights_was_tried_with() {
    let text = |text: &str| Part::Text(text.into());
    let image = || Part::Image(ImageSource::Bytes(Vec::new()));
    let turn = |role: &str, content: Vec<Part>| Message { role: role.into(), content, plain: false };
    let conversations = [
        vec![turn("user", vec![image(), text("What is shown in this image?")])],
        vec![turn("system", vec![text("Be brief.")]), turn("user", vec![text("one "), image(), text(" two"), image()])],
        vec![turn("user", vec![text(" a\n")]), turn("assistant", vec![text("b <c>")]), turn("user", vec![text("d")])],
    ];
    let qwen = ChatTemplate::load(&data("tiny-qwen2-vl")).unwrap();
    let ours = ChatTemplate::chatml("<|vision_start|><|image_pad|><|vision_end|>").unwrap();
    for messages in &conversations {
        for prompt in [false, true] {
            assert_eq!(ours.render(messages, prompt).unwrap(), qwen.render(messages, prompt).unwrap());
        }
    }
    let llava = ChatTemplate::chatml("<image>\n").unwrap().render(&conversations[0], true).unwrap();
    let expected = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is shown in \
                    this image?<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(llava, expected);
}

/// What loaders would take for quantized layers: by names on disk, and by those under which transformers has the modules.
#[test]
fn unquantized_layers_are_named_to_loaders() {
    for checkpoint in [HUB, "llava-resaved-f16-sharded", V5] {
        let bench = Bench::new(checkpoint);
        succeed(&bench.quantize(&["--solver", "rtn", "--quiet"]));
        let config = read_json(bench.outputs().join("out/config.json"));
        let list = config["quantization_config"]["ignore"].as_array().unwrap();
        let mut ignored: Vec<&str> = list.iter().map(|one| one.as_str().unwrap()).collect();
        ignored.sort_unstable();
        let all = [r"re:(.*\.)?lm_head$", r"re:(.*\.)?multi_modal_projector\..*", r"re:(.*\.)?vision_tower\..*"];
        assert_eq!(ignored, all, "{checkpoint}");
    }
}
