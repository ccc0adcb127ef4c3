//! Qwen2-VL (arXiv 2409.12191): native-resolution vision tower, 2×2 patch merger, Qwen2 decoder with M-RoPE.

use super::{Family, ModelConfig, PixelLimits, VisionTower};
use crate::calibration::image::ImagePatches;
use crate::calibration::processor::PatchSettings;
use crate::calibration::sequence::{QwenVision, VisionInput};
use crate::checkpoint::Checkpoint;
use crate::device::{Activation, AttentionShape, ModelOps, Span};
use crate::model::config::{DecoderConfig, DecoderNames, Section};
use crate::model::decoder::Linear;
use crate::model::rope;
use crate::model::vision::{FusedAttention, LayerNorm, Mlp};
use crate::tensor::Matrix;
use anyhow::{Context, Result, bail, ensure};

/// Where generations of transformers have put the decoder.
const DECODER_PREFIXES: [&str; 2] = ["model.language_model.", "model."];
/// Where they have put the vision tower.
const VISION_PREFIXES: [&str; 2] = ["model.visual.", "visual."];
/// Base of the vision tower's rotary frequencies, a constant of the model class.
const VISION_ROPE_THETA: f64 = 10_000.0;

/// The Qwen2-VL family.
pub(super) struct Qwen2Vl;

impl<D: ModelOps> Family<D> for Qwen2Vl {
    fn model_type(&self) -> &'static str {
        "qwen2_vl"
    }

    fn config(&self, checkpoint: &Checkpoint) -> Result<ModelConfig> {
        let root = Section::root(checkpoint)?;
        let decoder = decoder_config(&root)?;
        let probe = "layers.0.input_layernorm.weight";
        let prefix = checkpoint.prefix(&DECODER_PREFIXES, probe)?.to_owned();
        // A wild number of layers must not become a list of as many.
        let last = format!("{prefix}layers.{}.input_layernorm.weight", decoder.layers - 1);
        ensure!(
            checkpoint.contains(&last),
            "{} is {}, but there is no tensor {last}; weights and config.json do not belong together, or a file is missing",
            text_section(&root)?.at("num_hidden_layers"),
            decoder.layers
        );
        let names = DecoderNames { prefix, head: "lm_head.weight".into() };
        Ok(ModelConfig { decoder, names, image_token: root.token("image_token_id")? })
    }

    fn vision_input(&self, checkpoint: &Checkpoint, limits: PixelLimits) -> Result<Box<dyn VisionInput>> {
        let root = Section::root(checkpoint)?;
        let image_token = root.token("image_token_id")?;
        let settings = PatchSettings::read(checkpoint.folder(), limits.min_pixels, limits.max_pixels)?;
        let model = Patches::read(&vision_section(&root)?)?;
        let processor = [settings.patch_size, settings.temporal_patch_size, settings.merge_size];
        ensure!(
            processor == [model.side, model.frames, model.merge],
            "{} asks for [patch_size, temporal_patch_size, spatial_merge_size] of {:?}, but the image processor's file \
             says {processor:?}; take both files from the same checkpoint",
            root.at("vision_config"),
            [model.side, model.frames, model.merge]
        );
        Ok(Box::new(QwenVision::new(settings, image_token)))
    }

    fn vision_tower(&self, device: &D, checkpoint: &Checkpoint) -> Result<Box<dyn VisionTower<D>>> {
        Ok(Box::new(Tower::load(device, checkpoint)?))
    }
}

/// Hub originals keep the text keys at the root, transformers from 4.52 on in text_config.
fn text_section<'a>(root: &Section<'a>) -> Result<Section<'a>> {
    Ok(root.section("text_config")?.unwrap_or_else(|| root.clone()))
}

fn vision_section<'a>(root: &Section<'a>) -> Result<Section<'a>> {
    root.section("vision_config")?.with_context(|| format!("{} is missing", root.at("vision_config")))
}

/// How the vision tower cuts images; Hub files leave out what equals the class's defaults.
struct Patches {
    side: usize,
    frames: usize,
    merge: usize,
}

impl Patches {
    fn read(vision: &Section<'_>) -> Result<Self> {
        Ok(Self {
            side: vision.count_or("patch_size", 14)?,
            frames: vision.count_or("temporal_patch_size", 2)?,
            merge: vision.count_or("spatial_merge_size", 2)?,
        })
    }
}

fn decoder_config(root: &Section<'_>) -> Result<DecoderConfig> {
    let text = text_section(root)?;
    let hidden = text.count("hidden_size")?;
    let heads = text.count("num_attention_heads")?;
    let kv_heads = text.count_or("num_key_value_heads", heads)?;
    let head_dim = text.count_or("head_dim", hidden / heads)?;
    ensure!(
        heads.is_multiple_of(kv_heads) && head_dim > 0 && head_dim.is_multiple_of(2),
        "{}: {heads} attention heads of width {head_dim} do not share {kv_heads} key/value heads evenly",
        text.at("num_attention_heads")
    );
    if text.flag_or("use_sliding_window", false)? {
        bail!("{} is true; sliding-window attention is not supported for qwen2_vl", text.at("use_sliding_window"));
    }
    // transformers 5 keeps theta and sections together in rope_parameters, older ones apart.
    let rope = match text.section("rope_parameters")? {
        Some(rope) => Some(rope),
        None => text.section("rope_scaling")?,
    };
    let Some(rope) = rope else {
        bail!("{} (or rope_parameters) with mrope_section is missing", text.at("rope_scaling"))
    };
    for key in ["rope_type", "type"] {
        if rope.get(key).is_some() && !matches!(rope.text(key)?, "mrope" | "default") {
            bail!("{} is {:?}, not supported for qwen2_vl; known are mrope, default", rope.at(key), rope.text(key)?);
        }
    }
    let rope_theta =
        if rope.get("rope_theta").is_some() { rope.positive("rope_theta")? } else { text.positive("rope_theta")? };
    let sections = rope.counts("mrope_section")?;
    let Ok(rope_sections) = <[usize; 3]>::try_from(sections) else {
        bail!("{} needs three numbers (temporal, height, width)", rope.at("mrope_section"));
    };
    ensure!(
        rope_sections.iter().sum::<usize>() == head_dim / 2,
        "{} {rope_sections:?} does not add up to half the head width {head_dim}",
        rope.at("mrope_section")
    );
    // The flag may stand at the root or in text_config; either one ties the head to the embedding.
    let tied = root.flag_or("tie_word_embeddings", false)? || text.flag_or("tie_word_embeddings", false)?;
    Ok(DecoderConfig {
        hidden,
        intermediate: text.count("intermediate_size")?,
        layers: text.count("num_hidden_layers")?,
        attention: AttentionShape { heads, kv_heads, head_dim, causal: true },
        norm_eps: text.positive("rms_norm_eps")? as f32,
        activation: text.activation_or("hidden_act", Activation::Silu)?,
        vocab: text.count("vocab_size")?,
        tied,
        qkv_bias: true,
        rope_theta,
        rope_sections,
    })
}

struct TowerBlock<T> {
    attention_norm: LayerNorm<T>,
    attention: FusedAttention<T>,
    mlp_norm: LayerNorm<T>,
    mlp: Mlp<T>,
}

/// The vision tower: patch embedding, pre-norm blocks with full attention inside each image, 2×2 merger.
struct Tower<T> {
    embedding: Linear<T>,
    blocks: Vec<TowerBlock<T>>,
    merger_norm: LayerNorm<T>,
    merger: Mlp<T>,
    merge: usize,
    width: usize,
    frequencies: Vec<f32>,
}

impl<T> Tower<T> {
    fn load<D: ModelOps<Tensor = T>>(device: &D, checkpoint: &Checkpoint) -> Result<Self> {
        let root = Section::root(checkpoint)?;
        let output = decoder_config(&root)?.hidden;
        let vision = vision_section(&root)?;
        let Patches { side, frames, merge } = Patches::read(&vision)?;
        // `hidden_size` is the output width here.
        let width = vision.count_or("embed_dim", 1280)?;
        let heads = vision.count_or("num_heads", 16)?;
        let channels = match vision.get("in_channels") {
            Some(_) => vision.count("in_channels")?,
            None => vision.count_or("in_chans", 3)?,
        };
        let activation = vision.activation_or("hidden_act", Activation::QuickGelu)?;
        let inner = width * vision.count_or("mlp_ratio", 4)?;
        ensure!(
            width.is_multiple_of(heads) && (width / heads).is_multiple_of(4),
            "{} is {width}, which {heads} heads do not share in multiples of 4, as the rotary embedding needs",
            vision.at("embed_dim")
        );
        let prefix = checkpoint.prefix(&VISION_PREFIXES, "patch_embed.proj.weight")?;
        let block = |i: usize| -> Result<TowerBlock<T>> {
            let at = format!("{prefix}blocks.{i}");
            let fc = (format!("{at}.mlp.fc1"), format!("{at}.mlp.fc2"));
            Ok(TowerBlock {
                attention_norm: LayerNorm::load(device, checkpoint, &format!("{at}.norm1"), width)?,
                attention: FusedAttention::load(device, checkpoint, &format!("{at}.attn"), width, heads)?,
                mlp_norm: LayerNorm::load(device, checkpoint, &format!("{at}.norm2"), width)?,
                mlp: Mlp::load(device, checkpoint, (&fc.0, &fc.1), [width, inner, width], activation)?,
            })
        };
        let merged = width * merge * merge;
        let at = format!("{prefix}merger");
        let fc = (format!("{at}.mlp.0"), format!("{at}.mlp.2"));
        let patch_values = channels * frames * side * side;
        Ok(Self {
            embedding: Linear::load(
                device,
                checkpoint,
                &format!("{prefix}patch_embed.proj"),
                (width, patch_values),
                false,
            )?,
            blocks: (0..vision.count_or("depth", 32)?).map(block).collect::<Result<_>>()?,
            merger_norm: LayerNorm::load(device, checkpoint, &format!("{at}.ln_q"), width)?,
            merger: Mlp::load(device, checkpoint, (&fc.0, &fc.1), [merged, merged, output], Activation::Gelu)?,
            merge,
            width,
            frequencies: rope::inverse_frequencies(VISION_ROPE_THETA, width / heads / 2),
        })
    }
}

impl<D: ModelOps> VisionTower<D> for Tower<D::Tensor> {
    fn encode(&self, device: &D, images: &[&ImagePatches]) -> Result<D::Tensor> {
        let (mut values, mut columns) = (Vec::new(), 0);
        let mut positions = Vec::new();
        let mut spans = Vec::new();
        for image in images {
            let start = positions.len();
            let patches = image.patches();
            columns = patches.cols();
            values.extend_from_slice(patches.data());
            positions.extend(patch_positions(image.grid_height, image.grid_width, self.merge));
            spans.push(Span::own(start..positions.len()));
        }
        let rotary = rope::axial(device, &positions, &self.frequencies)?;
        let patches = device.upload_model(Matrix::new(positions.len(), columns, values)?)?;
        let mut x = self.embedding.apply(device, &patches)?;
        for block in &self.blocks {
            let normed = block.attention_norm.apply(device, &x)?;
            device.add_assign(&mut x, &block.attention.apply(device, &normed, &rotary, &spans)?)?;
            let normed = block.mlp_norm.apply(device, &x)?;
            device.add_assign(&mut x, &block.mlp.apply(device, &normed)?)?;
        }
        let normed = self.merger_norm.apply(device, &x)?;
        let per_token = self.merge * self.merge;
        let merged = device.reshape(normed, positions.len() / per_token, per_token * self.width)?;
        self.merger.apply(device, &merged)
    }
}

/// (row, column) of every patch in the order of the patches: merge blocks row by row, inside each its own rows.
fn patch_positions(height: usize, width: usize, merge: usize) -> impl Iterator<Item = [u32; 2]> {
    let blocks = (0..height / merge).flat_map(move |by| (0..width / merge).map(move |bx| (by, bx)));
    blocks.flat_map(move |(by, bx)| {
        (0..merge).flat_map(move |iy| (0..merge).map(move |ix| [(by * merge + iy) as u32, (bx * merge + ix) as u32]))
    })
}
