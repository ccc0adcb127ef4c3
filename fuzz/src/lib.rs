//! What is fuzzed. Each target is a function of some bytes from a stranger: it may refuse them, but never panic, hang, or
//! take memory beyond its bound. `tests/run/fuzz_seeds.rs` includes this file and replays every committed input.

mod files;
mod models;
mod work_folder;

use anyhow::{Context, Result};
use files::{folder, parts, sources};
use models::{FAMILIES, look_through, see, sequence, settings};
use serde_json::Value;
use std::sync::{Arc, OnceLock};
use vlmq::checkpoint::Checkpoint;
use vlmq::data::dataset::{self, Conversation, ImageSource, Message, Part};
use vlmq::data::image;
use vlmq::data::native_resolution::NativeVision;
use vlmq::data::sequence::{SequenceBuilder, VisionInput};
use vlmq::data::template::ChatTemplate;
use vlmq::device::cpu::Cpu;
use vlmq::evaluate::presets::{PRESETS, Preset};
use vlmq::model::families::{self, ImageOptions};
use vlmq::model::language_model::{LanguageModel, Residency};
use vlmq::run::inspect;
pub use work_folder::resume;

/// A target's name and function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets, as the folders of `seeds/` and `crashes/` are named.
pub const TARGETS: [Target; 10] = [
    ("checkpoint", checkpoint),
    ("config", config),
    ("data", data),
    ("image", image),
    ("packed", packed),
    ("processor", processor),
    ("resume", resume),
    ("safetensors", safetensors),
    ("template", template),
    ("tokenizer", tokenizer),
];

/// Refusals are what is hoped for; their text must be made, as the program would print it.
fn done<T>(result: Result<T>) -> Option<T> {
    result.map_err(|error| format!("{error:#}")).ok()
}

/// A safetensors file: header, offsets, and every tensor of it.
pub fn safetensors(bytes: &[u8]) {
    let folder = folder(&[("config.json", b"{}"), ("model.safetensors", bytes)]);
    if let Some(checkpoint) = done(Checkpoint::open(folder.path())) {
        look_through(&checkpoint);
    }
}

/// A folder of small files: config.json, index and shards, or whatever stands there instead.
pub fn checkpoint(bytes: &[u8]) {
    let folder = folder(&parts(bytes, "model.safetensors.index.json"));
    let Some(checkpoint) = done(Checkpoint::open(folder.path())) else { return };
    look_through(&checkpoint);
    done(checkpoint.quantization());
    if let Some(family) = done(families::of::<Cpu>(&checkpoint)) {
        done(family.config(&checkpoint));
        done(family.vision_input(&checkpoint, ImageOptions::default()));
    }
    // Of a float checkpoint it would measure the machine's speed.
    if checkpoint.is_quantized() {
        done(inspect::inspect(&Cpu, folder.path()));
    }
}

/// A config.json beside the weights of the small checkpoint of its family: whole, or as changes of that checkpoint's own,
/// a line each (`vision_config.depth=3`), behind a line with the family's number.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let whole: Option<Value> = serde_json::from_str(text).ok();
    let named = |value: &Value| FAMILIES.iter().position(|family| value["model_type"] == family.model_type);
    let number = match &whole {
        Some(value) => named(value),
        None => text.lines().next().and_then(|line| line.trim().parse().ok()),
    };
    let family = &FAMILIES[number.unwrap_or(0) % FAMILIES.len()];
    let json = match whole {
        Some(_) => bytes.to_vec(),
        None => family.changed_config(text.lines().skip(1)),
    };
    let folder = folder(&family.files());
    std::fs::write(folder.path().join("config.json"), json).expect("a folder to write to");
    let Some(checkpoint) = done(Checkpoint::open(folder.path())) else { return };
    if checkpoint.is_quantized() {
        done(inspect::inspect(&Cpu, folder.path()));
    }
    done(load_and_see(&Arc::new(checkpoint)));
}

/// All that is read of a model before its first block runs.
fn load_and_see(checkpoint: &Arc<Checkpoint>) -> Result<()> {
    let family = families::of::<Cpu>(checkpoint)?;
    let config = family.config(checkpoint)?;
    families::float_type(checkpoint)?;
    family.check_vision_tower(checkpoint)?;
    let vision = family.vision_input(checkpoint, ImageOptions::default())?;
    let model = LanguageModel::<Cpu>::load(&Cpu, checkpoint, Residency::Resident)?;
    let image = vision.prepare(&models::picture(56, 42), 1)?;
    let sequence = sequence(&*vision, config.image_token, image)?;
    let features = model.embedder().image_features(&Cpu, &[&sequence])?;
    model.embedder().embed(&Cpu, &[&sequence], features.as_ref())?;
    Ok(())
}

/// A file of calibration or evaluation data, for every benchmark's columns too; images inside it are decoded.
pub fn data(bytes: &[u8]) {
    let folder = folder(&[("data.jsonl", bytes)]);
    let path = folder.path().join("data.jsonl");
    let plain = done(dataset::read(&path, None));
    for preset in &PRESETS {
        done(dataset::read_with(&path, None, &Preset::reads, &|row| preset.prepare(row)));
    }
    for conversation in plain.into_iter().flatten() {
        conversation.answer();
        for part in conversation.messages.iter().flat_map(|message| &message.content) {
            if let Part::Image(source) = part {
                done(image::decode(source, &conversation.origin));
            }
        }
    }
}

/// A PNG or JPEG file, for every family's preprocessing.
pub fn image(bytes: &[u8]) {
    static VISIONS: OnceLock<Vec<Box<dyn VisionInput>>> = OnceLock::new();
    let Some(pixels) = done(image::decode(&ImageSource::Bytes(bytes.to_vec()), "line 1")) else { return };
    // Larger ones are slow, not different.
    if u64::from(pixels.width()) * u64::from(pixels.height()) > 1 << 20 {
        return;
    }
    for vision in VISIONS.get_or_init(models::all_visions) {
        see(&**vision, &pixels);
    }
}

/// A quantized checkpoint with one layer, in either format, as `eval` reads it.
pub fn packed(bytes: &[u8]) {
    let folder = folder(&parts(bytes, "model.safetensors"));
    let Some(checkpoint) = done(Checkpoint::open(folder.path())) else { return };
    if let Some(quantization) = done(checkpoint.quantization()).flatten() {
        let _ = quantization.to_string();
    }
    for (outputs, inputs) in [(32, 64), (32, 96), (8, 40)] {
        done(checkpoint.linear("layer", outputs, inputs));
        if let Some(layer) = done(checkpoint.packed("layer", outputs, inputs)) {
            done(layer.dequantize());
        }
    }
}

/// An image processor's file, or two, beside the config.json of every family.
pub fn processor(bytes: &[u8]) {
    let files = parts(bytes, "preprocessor_config.json");
    for family in &FAMILIES {
        let with_config = family.with_config(&files);
        let folder = folder(&with_config);
        let Some(checkpoint) = done(Checkpoint::open(folder.path())) else { continue };
        let Some(known) = done(families::of::<Cpu>(&checkpoint)) else { continue };
        for options in models::IMAGE_OPTIONS {
            let Some(vision) = done(known.vision_input(&checkpoint, options)) else { continue };
            for (width, height) in [(56, 42), (1, 90), (401, 2), (10, 2010)] {
                see(&*vision, &models::picture(width, height));
            }
        }
    }
}

/// A chat template, over a fixed conversation.
pub fn template(bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let tokens = serde_json::Map::from_iter([("bos_token".to_owned(), "<s>".into())]);
    let Some(template) = done(ChatTemplate::new(source, tokens, "chat_template.jinja".into())) else { return };
    for messages in [&talk().messages[..], &talk().messages[..1], &[]] {
        for prompt in [false, true] {
            if let Some(text) = done(template.render(messages, prompt)) {
                assert!(text.len() <= 8 << 20, "{} bytes of text", text.len());
            }
        }
    }
}

/// tokenizer.json with the files that name special tokens and hold a chat template.
pub fn tokenizer(bytes: &[u8]) {
    let defaults: [(&str, &[u8]); 2] =
        [("chat_template.jinja", models::TEMPLATE.as_bytes()), ("generation_config.json", br#"{"eos_token_id": 2}"#)];
    let mut files = parts(bytes, "tokenizer.json");
    for default in defaults {
        if !files.iter().any(|file| file.0 == default.0 || file.0.starts_with("chat_template")) {
            files.push(default);
        }
    }
    let folder = folder(&files);
    let vision = NativeVision::new(settings(), models::IMAGE_TOKEN, Some(models::IMAGE_TOKEN + 1));
    let Some(builder) = done(SequenceBuilder::new(folder.path(), Box::new(vision))) else { return };
    for conversation in [talk(), plain()] {
        if let Some(sequence) = done(builder.build(&conversation)) {
            assert!(sequence.answer.end <= sequence.tokens.len() && sequence.positions.len() == sequence.tokens.len());
            done(builder.decode(&sequence.tokens));
        }
        done(builder.prompt(&conversation));
    }
    done(builder.decode(&[0, 1, 7, u32::MAX]));
}

/// Two turns and an image.
fn talk() -> Conversation {
    let image = std::fs::read(sources().join("tests/golden/calibration/images/grey.png")).context("grey.png");
    let text = |text: &str| Part::Text(text.into());
    let content =
        vec![Part::Image(ImageSource::Bytes(image.expect("a committed image"))), text("what's  red? 12\n\né")];
    Conversation {
        messages: vec![
            Message { role: "user".into(), content, plain: false },
            Message { role: "assistant".into(), content: vec![text("a b c")], plain: true },
        ],
        ..plain()
    }
}

/// Text alone.
fn plain() -> Conversation {
    Conversation {
        id: "7".into(),
        group: None,
        messages: Vec::new(),
        text: Some("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab  the cat's\t\n 1 234 日本 \u{301}".into()),
        metric: None,
        answers: Vec::new(),
        max_new_tokens: None,
        origin: "data.jsonl:1".into(),
    }
}
