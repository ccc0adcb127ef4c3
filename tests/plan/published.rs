//! Models of a shape, without weights, and plans for them.

use crate::sparse::{hollow, tensors, write_sparse};
use crate::support::golden;
use crate::support::program::{edit_json, read_json};
use image::RgbImage;
use serde_json::json;
use std::fs;
use std::sync::Arc;
use tempfile::TempDir;
use vlmq::checkpoint::{Checkpoint, Format};
use vlmq::data::sequence::Sequence;
use vlmq::device::cpu::Cpu;
use vlmq::model::families::{self, ImageOptions, ModelConfig};
use vlmq::plan::{DecoderShape, Subject, SubjectChunk};
use vlmq::quantize::settings::{Importance, Refit, SolverSettings};

/// A checkpoint whose weights are holes.
pub(crate) struct Hollow {
    _folder: TempDir,
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) config: ModelConfig,
}

impl Hollow {
    fn open(folder: TempDir) -> Self {
        let checkpoint = Arc::new(Checkpoint::open(folder.path()).unwrap());
        let config = families::of::<Cpu>(&checkpoint).unwrap().config(&checkpoint).unwrap();
        Self { _folder: folder, checkpoint, config }
    }

    /// A published model.
    pub(crate) fn published(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        hollow(name, folder.path());
        if name.starts_with("Qwen3") {
            // The small checkpoint's images have patches of another size.
            let own = golden("model/qwen3_vl-tied-bf16/processor_config.json");
            fs::copy(own, folder.path().join("processor_config.json")).unwrap();
        }
        Self::open(folder)
    }

    /// A language model of this shape.
    pub(crate) fn decoder(shape: DecoderShape, vocab: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.json");
        fs::copy(golden("model/flat-tied-bf16/config.json"), &config).unwrap();
        let sizes = [
            ("hidden_size", shape.hidden),
            ("intermediate_size", shape.intermediate),
            ("num_attention_heads", shape.heads),
            ("num_key_value_heads", shape.kv_heads),
            ("num_hidden_layers", shape.blocks),
            ("vocab_size", vocab),
        ];
        edit_json(&config, |config| {
            for (key, size) in sizes {
                config.insert(key.into(), json!(size));
            }
            let half = shape.head_dim / 2;
            let sections = json!([half / 4, half / 2 - half / 8, half - half / 4 - half / 2 + half / 8]);
            config.insert("rope_scaling".into(), json!({"type": "mrope", "mrope_section": sections}));
        });
        write_sparse(folder.path(), &decoder_tensors(shape, vocab), "BF16");
        Self::open(folder)
    }

    /// Values of the tensors whose names begin so.
    pub(crate) fn values(&self, prefix: &str) -> u64 {
        let names = self.checkpoint.names().filter(|name| name.starts_with(prefix));
        names.map(|name| self.checkpoint.tensor(name).unwrap().shape.iter().product::<usize>() as u64).sum()
    }

    /// A sample of text of so many tokens behind an image of so many pixels, if any.
    pub(crate) fn sample(&self, tokens: usize, image: Option<(u32, u32)>) -> Sequence {
        let family = families::of::<Cpu>(&self.checkpoint).unwrap();
        let options = ImageOptions { min_pixels: Some(1), max_pixels: Some(1 << 26), image_mode: None };
        let options = if family.model_type().starts_with("llava") { ImageOptions::default() } else { options };
        let mut of_image = Vec::new();
        let images: Vec<_> = image
            .into_iter()
            .map(|(width, height)| {
                let input = family.vision_input(&self.checkpoint, options).unwrap();
                let patches = input.prepare(&RgbImage::new(width, height), 1).unwrap();
                of_image = vec![self.config.image_token; input.image_tokens(&patches)];
                patches
            })
            .collect();
        let vision_tokens = of_image.len();
        assert!(tokens >= vision_tokens, "{vision_tokens} tokens of an image");
        let text = std::iter::repeat_n(u32::from(self.config.image_token == 0), tokens - vision_tokens);
        let tokens: Vec<u32> = of_image.into_iter().chain(text).collect();
        let positions = (0..tokens.len() as u32).map(|place| [place; 3]).collect();
        Sequence { id: String::new(), tokens, vision_tokens, images, positions, answer: 0..0 }
    }

    /// What is to be done with chunks of a sample each.
    pub(crate) fn subject<'a>(&'a self, samples: Vec<&'a Sequence>, method: &'a Method) -> Subject<'a> {
        let Method { solver, importance, refit } = method;
        let images = samples.iter().any(|sample| !sample.images.is_empty());
        let chunk = |sample| SubjectChunk { sequences: vec![sample], held_out: false, checked: false };
        Subject {
            checkpoint: &self.checkpoint,
            config: &self.config,
            solver,
            format: Format::COMPRESSED_TENSORS,
            importance: *importance,
            refit: *refit,
            chunks: samples.into_iter().map(chunk).collect(),
            places: Vec::new(),
            images,
        }
    }
}

/// How a plan's model would be quantized.
pub(crate) struct Method {
    pub(crate) solver: SolverSettings,
    pub(crate) importance: Importance,
    pub(crate) refit: Refit,
}

/// Tensors of a language model as the first Qwen2-VL checkpoints have them, with the embedding for a head.
fn decoder_tensors(shape: DecoderShape, vocab: usize) -> Vec<(String, Vec<u64>)> {
    let published = tensors(&read_json(golden("configs.json"))["Qwen2-VL-2B-Instruct"]);
    // By the published shape's own sizes.
    let [hidden, inner, key, words] = [1536, 8960, 256, 151_936];
    let size = |side: u64| match side {
        _ if side == hidden => shape.hidden,
        _ if side == inner => shape.intermediate,
        _ if side == key => shape.kv_heads * shape.head_dim,
        _ if side == words => vocab,
        _ => panic!("{side}"),
    };
    let block = |name: &str| name.split('.').nth(2).and_then(|index| index.parse::<usize>().ok());
    let own = published.into_iter().filter(|(name, _)| name.starts_with("model."));
    let own = own.filter(|(name, _)| block(name).is_none_or(|block| block < shape.blocks));
    own.map(|(name, sides)| (name, sides.into_iter().map(|side| size(side) as u64).collect())).collect()
}
