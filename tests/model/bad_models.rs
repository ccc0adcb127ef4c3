//! A family's own keys, tensors and data, when they are wrong: one clear error that names the model and the key.

use crate::support::picture::save_png;
use crate::support::program::{Bench, IMAGE, Meets, broken, edit_json, question};
use crate::support::{golden, message};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use vlmq::checkpoint::Checkpoint;
use vlmq::data::dataset;
use vlmq::data::sequence::SequenceBuilder;
use vlmq::device::cpu::Cpu;
use vlmq::model::families::{self, ImageOptions};
use vlmq::model::language_model::{LanguageModel, Residency};

/// Sets a key of a section of config.json; null takes it out. An empty section is the root.
fn set(section: &'static str, key: &'static str, value: Value) -> impl FnOnce(&Path) {
    move |model| {
        edit_json(&model.join("config.json"), |all| {
            let inner = if section.is_empty() { all } else { all[section].as_object_mut().unwrap() };
            match value {
                Value::Null => inner.remove(key),
                value => inner.insert(key.to_owned(), value),
            };
        });
    }
}

#[test]
fn language_models_that_are_not_supported() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "mrope_section": [4, 2, 2]});
    let sliding = json!(["full_attention", "sliding_attention"]);
    for (checkpoint, section, key, value, says) in [
        (
            "rope-parameters-f32",
            "text_config",
            "rope_parameters",
            yarn.clone(),
            "text_config.rope_parameters.rope_type is \"yarn\"",
        ),
        ("qwen2_5_vl-flat-bf16", "", "rope_scaling", yarn, "rope_scaling.rope_type is \"yarn\""),
        (
            "qwen2_5_vl-nested-f16",
            "text_config",
            "layer_types",
            sliding,
            "text_config.layer_types has \"sliding_attention\"",
        ),
        ("qwen2_5_vl-nested-f16", "text_config", "layer_types", json!("full_attention"), "text_config.layer_types is"),
        (
            "qwen2_5_vl-nested-f16",
            "text_config",
            "use_sliding_window",
            json!(true),
            "text_config.use_sliding_window is true",
        ),
        (
            "qwen2_5_vl-flat-bf16",
            "",
            "num_hidden_layers",
            json!(1),
            "num_hidden_layers is 1, but there is a tensor model.layers.1.",
        ),
        (
            "qwen2_5_vl-flat-bf16",
            "",
            "num_hidden_layers",
            json!(3),
            "num_hidden_layers is 3, but there is no tensor model.layers.2.",
        ),
        ("qwen2_5_vl-flat-bf16", "", "vocab_size", Value::Null, "vocab_size is missing"),
    ] {
        broken(checkpoint, Meets::All, &["model/config.json", says], set(section, key, value));
    }
}

#[test]
fn vision_towers_that_contradict_the_config() {
    for (key, value, says) in [
        ("hidden_size", Value::Null, "config.json: vision_config.hidden_size is missing"),
        ("hidden_size", json!(128), "tensor visual.blocks.0.norm1.weight"),
        ("hidden_size", json!(128), "config.json: the vision tower of qwen2_5_vl as vision_config has it"),
        (
            "out_hidden_size",
            json!(128),
            "config.json: vision_config.out_hidden_size is 128, but the language model is 64 wide",
        ),
        ("num_heads", json!(3), "config.json: vision_config.hidden_size is 64, which 3 heads"),
        ("intermediate_size", json!(99), "tensor visual.blocks.0.mlp.gate_proj.weight"),
        ("depth", json!(2), "config.json: vision_config.depth is 2, but there is a tensor visual.blocks.2."),
        ("depth", json!(4), "visual.blocks.3."),
        (
            "window_size",
            json!(27),
            "config.json: vision_config.window_size is 27 pixels, less than the 28 of one image token",
        ),
        ("fullatt_block_indexes", json!(7), "config.json: vision_config.fullatt_block_indexes is 7, not a list"),
        ("hidden_act", json!("mish"), "config.json: vision_config.hidden_act is \"mish\""),
        ("patch_size", json!(16), "config.json: vision_config asks for"),
        ("spatial_merge_size", json!(4), "config.json: vision_config asks for"),
    ] {
        broken("qwen2_5_vl-flat-bf16", Meets::Runs, &["model", says], set("vision_config", key, value));
    }
    broken("flat-tied-bf16", Meets::Runs, &["vision_config.depth is 1, but"], set("vision_config", "depth", json!(1)));
    let says = ["vision_config.hidden_size is 3584, but the language model is 32 wide"];
    broken("flat-tied-bf16", Meets::Runs, &says, set("vision_config", "hidden_size", json!(3584)));
}

#[test]
fn norms_of_heads_interleaved_sections_and_deepstack() {
    let rope = |change: (&str, Value)| {
        let mut rope = json!({"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]});
        rope[change.0] = change.1;
        rope
    };
    for (key, value, says) in [
        ("attention_bias", json!(true), "text_config.attention_bias is true"),
        ("rope_parameters", rope(("mrope_interleaved", json!(false))), "rope_parameters.mrope_interleaved is false"),
        (
            "rope_parameters",
            rope(("mrope_section", json!([4, 4, 2]))),
            "mrope_section [4, 4, 2] does not add up to half",
        ),
        ("rope_parameters", rope(("rope_type", json!("yarn"))), "text_config.rope_parameters.rope_type is \"yarn\""),
        ("num_key_value_heads", json!(4), "text_config.num_attention_heads: 6 attention heads"),
        ("head_dim", json!(32), "does not add up to half the head width 32"),
    ] {
        broken("qwen3_vl-tied-bf16", Meets::All, &["model/config.json", says], set("text_config", key, value));
    }
    for (key, value, says) in [
        ("depth", json!(2), "vision_config.depth is 2, but there is a tensor model.visual.blocks.2."),
        ("out_hidden_size", json!(96), "vision_config.out_hidden_size is 96, but the language model is 64 wide"),
        (
            "num_position_embeddings",
            json!(48),
            "vision_config.num_position_embeddings is 48, not the positions of a square",
        ),
        ("num_position_embeddings", json!(64), "tensor model.visual.pos_embed.weight"),
        ("deepstack_visual_indexes", json!([2, 0]), "vision_config.deepstack_visual_indexes is [2, 0], not ascending"),
        ("deepstack_visual_indexes", json!([0, 3]), "not ascending numbers of the 3 blocks"),
        ("deepstack_visual_indexes", json!([0]), "but there is a tensor model.visual.deepstack_merger_list.1."),
        ("deepstack_visual_indexes", json!([0, 1, 2]), "model.visual.deepstack_merger_list.2."),
        ("hidden_size", json!(64), "tensor model.visual."),
        ("intermediate_size", json!(99), "tensor model.visual.blocks.0.mlp.linear_fc1.weight"),
    ] {
        broken("qwen3_vl-tied-bf16", Meets::Runs, &["model", says], set("vision_config", key, value));
    }
    // Three levels for a decoder of two blocks.
    broken("qwen3_vl-f32", Meets::Runs, &["the language model has only 2 blocks"], |model| {
        set("vision_config", "depth", json!(3))(model);
        set("vision_config", "deepstack_visual_indexes", json!([0, 1, 2]))(model);
    });
}

#[test]
fn mixtures_of_experts() {
    for (checkpoint, model_type) in
        [("qwen3_vl-tied-bf16", "qwen3_vl_moe"), ("flat-tied-bf16", "qwen2_vl_moe"), ("qwen3_vl-f32", "qwen2_5_vl_moe")]
    {
        let says = format!("model/config.json: model_type \"{model_type}\" is a mixture of experts");
        broken(checkpoint, Meets::All, &[&says], set("", "model_type", json!(model_type)));
    }
    for (checkpoint, section, says) in [
        ("qwen3_vl-tied-bf16", "text_config", "config.json: text_config.num_experts is 8; mixtures of experts"),
        ("flat-tied-bf16", "", "config.json: num_experts is 8; mixtures of experts"),
    ] {
        broken(checkpoint, Meets::All, &["model", says], set(section, "num_experts", json!(8)));
    }
    // A model that is nobody's mixture is simply not known.
    let says = ["model_type \"other_moe\" is not known"];
    broken("flat-tied-bf16", Meets::All, &says, set("", "model_type", json!("other_moe")));
}

#[test]
fn videos() {
    let part = |part: Value| {
        json!({"messages": [
            {"role": "user", "content": [part, {"type": "text", "text": "what happens?"}]},
            {"role": "assistant", "content": "nothing"},
        ]})
    };
    let turns = json!([{"from": "human", "value": "<video>\nwhat happens?"}, {"from": "gpt", "value": "nothing"}]);
    for (line, says) in [
        (part(json!({"type": "video", "video": "a.mp4"})), "`type` \"video\""),
        (part(json!({"type": "video_url", "video_url": {"url": "a.mp4"}})), "`type` \"video_url\""),
        (part(json!({"type": "text", "text": "so <|video_pad|> it is"})), "\"<|video_pad|>\""),
        (json!({"video": "a.mp4", "conversations": turns}), "`video`"),
        (json!({"text": "plain <|video_pad|>"}), "\"<|video_pad|>\""),
    ] {
        let bench = Bench::new("qwen2_5_vl-flat-bf16");
        let good = question(IMAGE);
        bench.write_data(&[&good, &line.to_string()]);
        bench.refused(&bench.quantize(&[]), &["data.jsonl:2", says, "videos are not supported"]);
        if line.get("text").is_none() {
            bench.refused(&bench.eval(&[]), &["data.jsonl:2", says, "videos are not supported"]);
        }
    }
}

#[test]
fn images_of_extreme_proportions() {
    let bench = Bench::new("qwen2_5_vl-nested-f16");
    save_png(&image::RgbImage::new(10, 2010), bench.file("long.png"));
    bench.write_data(&[&question("model/long.png")]);
    let says = ["data.jsonl:1: image 1", "is 10x2010: one side is more than 200 times the other"];
    bench.refused(&bench.quantize(&[]), &says);
    bench.refused(&bench.eval(&[]), &says);
}

/// Families' towers, whose features must be as many as the placeholders they replace.
#[test]
fn image_tokens_that_disagree_with_the_features() {
    for checkpoint in ["flat-tied-bf16", "qwen2_5_vl-flat-bf16", "qwen3_vl-f16-sharded"] {
        let folder = golden("model").join(checkpoint);
        let opened = Arc::new(Checkpoint::open(&folder).unwrap());
        let family = families::of::<Cpu>(&opened).unwrap();
        let vision = family.vision_input(&opened, ImageOptions::default()).unwrap();
        let builder = SequenceBuilder::new(&folder, vision).unwrap();
        let conversations = dataset::read(&golden("model").join(format!("{checkpoint}.jsonl")), None).unwrap();
        let mut sequence = builder.build(&conversations[0]).unwrap();
        let model = LanguageModel::<Cpu>::load(&Cpu, &opened, Residency::Resident).unwrap();
        let features = model.embedder().image_features(&Cpu, &[&sequence]).unwrap();
        let image = family.config(&opened).unwrap().image_token;
        let last = sequence.tokens.iter().rposition(|&token| token == image).unwrap();
        sequence.tokens[last] = 0;
        let said = message(model.embedder().embed(&Cpu, &[&sequence], features.as_ref()));
        for part in ["image tokens", "features", &conversations[0].id] {
            assert!(said.contains(part), "{checkpoint}: {said}");
        }
    }
}
