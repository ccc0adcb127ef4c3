//! The small checkpoints of tests/golden/model that hostile files are put beside.

use super::files::{File, folder, sources};
use anyhow::Result;
use serde_json::Value;
use std::sync::{Arc, OnceLock};
use vlmq::checkpoint::Checkpoint;
use vlmq::data::image::ImagePatches;
use vlmq::data::native_resolution::NativeResolution;
use vlmq::data::patches::PatchSettings;
use vlmq::data::sequence::{Sequence, VisionInput};
use vlmq::device::cpu::Cpu;
use vlmq::model::families::{self, ImageMode, ImageOptions};

/// The images that [`see`] and its callers draw on are of this type.
pub type Pixels = image::RgbImage;

/// A family by its small checkpoint.
pub struct Family {
    pub model_type: &'static str,
    folder: &'static str,
    read: OnceLock<Read>,
}

/// What is read of it, once.
struct Read {
    config: Vec<u8>,
    /// Everything else.
    files: Vec<(String, Vec<u8>)>,
}

pub static FAMILIES: [Family; 4] = [
    Family { model_type: "qwen2_vl", folder: "flat-tied-bf16", read: OnceLock::new() },
    Family { model_type: "qwen2_5_vl", folder: "qwen2_5_vl-flat-bf16", read: OnceLock::new() },
    Family { model_type: "qwen3_vl", folder: "qwen3_vl-tied-bf16", read: OnceLock::new() },
    Family { model_type: "llava_onevision", folder: "llava-hub-tied-f16", read: OnceLock::new() },
];

impl Family {
    fn read(&self) -> &Read {
        self.read.get_or_init(|| {
            let folder = sources().join("tests/golden/model").join(self.folder);
            let mut read = Read { config: Vec::new(), files: Vec::new() };
            for name in ["config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json"] {
                match std::fs::read(folder.join(name)) {
                    Ok(bytes) if name == "config.json" => read.config = bytes,
                    Ok(bytes) => read.files.push((name.to_owned(), bytes)),
                    // Not every family has both processor files.
                    Err(_) => {}
                }
            }
            read
        })
    }

    /// All that a vision input and the weights need but config.json.
    pub fn files(&self) -> Vec<File<'_>> {
        self.read().files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect()
    }

    /// Its config.json and one tensor, with `files` beside.
    pub fn with_config<'a>(&'a self, files: &[File<'a>]) -> Vec<File<'a>> {
        const ONE: &[u8] = b"\x35\0\0\0\0\0\0\0{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}7";
        let own: [File<'a>; 2] = [("model.safetensors", ONE), ("config.json", &self.read().config)];
        files.iter().copied().filter(|file| own.iter().all(|own| own.0 != file.0)).chain(own).collect()
    }

    /// Its config.json with some keys changed: `a.b=json`, or taken out: `a.b`.
    pub fn changed_config<'a>(&self, lines: impl Iterator<Item = &'a str>) -> Vec<u8> {
        let mut config: Value = serde_json::from_slice(&self.read().config).expect("a committed config.json");
        for line in lines {
            let (path, value) = line.split_once('=').unwrap_or((line, ""));
            let (section, key) = path.rsplit_once('.').unwrap_or(("", path));
            let pointer = if section.is_empty() { String::new() } else { format!("/{}", section.replace('.', "/")) };
            let Some(Value::Object(section)) = config.pointer_mut(&pointer) else { continue };
            match serde_json::from_str(value) {
                Ok(value) => section.insert(key.to_owned(), value),
                Err(_) => section.shift_remove(key),
            };
        }
        config.to_string().into_bytes()
    }
}

/// Ways to ask for images.
pub const IMAGE_OPTIONS: [ImageOptions; 3] = [
    ImageOptions { min_pixels: None, max_pixels: None, image_mode: None },
    ImageOptions { min_pixels: Some(1), max_pixels: Some(5000), image_mode: None },
    ImageOptions { min_pixels: None, max_pixels: None, image_mode: Some(ImageMode::Single) },
];

/// Every family's own vision input.
pub fn all_visions() -> Vec<Box<dyn VisionInput>> {
    let vision = |family: &Family| -> Result<Box<dyn VisionInput>> {
        let mut files = family.files();
        files.push(("config.json", &family.read().config));
        let folder = folder(&files);
        let checkpoint = Checkpoint::open(folder.path())?;
        families::of::<Cpu>(&checkpoint)?.vision_input(&checkpoint, ImageOptions::default())
    };
    FAMILIES.iter().map(|family| vision(family).expect("a committed checkpoint")).collect()
}

/// A picture with a slope, so that resizing has something to do.
pub fn picture(width: u32, height: u32) -> Pixels {
    Pixels::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, (x ^ y) as u8]))
}

/// Prepares a picture as one of one and as one of several, counts its tokens, and cuts one crop.
pub fn see(vision: &dyn VisionInput, pixels: &Pixels) {
    for of in [1, 2] {
        let Some(image) = super::done(vision.prepare(pixels, of)) else { continue };
        let tokens = vision.image_tokens(&image);
        // A large picture is not fuzzed for the time its patches take.
        if image.crops()[0].as_raw().len() < 1 << 22 {
            image.crop_patches(image.crops().len() - 1);
        }
        if tokens < 1 << 16 {
            super::done(vision.positions(&vec![vision.image_token_id(); tokens], &[image]));
        }
    }
}

/// A sequence of one image and nothing else.
pub fn sequence(vision: &dyn VisionInput, token: u32, image: ImagePatches) -> Result<Sequence> {
    let tokens = vec![token; vision.image_tokens(&image)];
    let images = vec![image];
    let positions = vision.positions(&tokens, &images)?;
    Ok(Sequence { id: "7".into(), vision_tokens: tokens.len(), tokens, images, positions, answer: 0..0 })
}

/// Asks every tensor for what a model would ask it for.
pub fn look_through(checkpoint: &Checkpoint) {
    for name in checkpoint.names().take(64) {
        let Some(tensor) = super::done(checkpoint.tensor(name)) else { continue };
        super::done(checkpoint.float_type(name));
        super::done(checkpoint.vector(name, tensor.shape.first().copied().unwrap_or(1)));
        let rows = tensor.shape.first().copied().unwrap_or(1);
        super::done(checkpoint.matrix(name, rows, tensor.bytes.len() / 2 / rows.max(1)));
        super::done(checkpoint.linear(name.strip_suffix(".weight").unwrap_or(name), rows, 32));
    }
    super::done(checkpoint.prefix(&["", "model."], "norm.weight"));
}

/// The token of the small tokenizers in seeds/tokenizer that stands for an image; the next one stands for a video.
pub const IMAGE_TOKEN: u32 = 3;

/// A template for those.
pub const TEMPLATE: &str = "{% for m in messages %}<|u|>{% for c in m.content %}{% if c.type == 'image' %}<|i|>\
    {% else %}{{ c.text }}{% endif %}{% endfor %}<|e|>{% endfor %}{% if add_generation_prompt %}<|u|>{% endif %}";

/// Small images of few tokens.
pub fn settings() -> NativeResolution {
    let patches = PatchSettings {
        patch_size: 14,
        merge_size: 2,
        temporal_patch_size: 2,
        rescale_factor: 1.0 / 255.0,
        mean: [0.5; 3],
        std: [0.5; 3],
    };
    NativeResolution { patches: Arc::new(patches), min_pixels: 784, max_pixels: 3136 }
}
