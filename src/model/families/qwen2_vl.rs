//! Qwen2-VL (arXiv 2409.12191): native-resolution vision tower, 2×2 patch merger, Qwen2 decoder with M-RoPE.

use super::qwen::{self, Patches, StackedPatches, VISION_PREFIXES, text_section, vision_section};
use super::{Family, Features, ImageOptions, ModelConfig, VisionTower};
use crate::checkpoint::Checkpoint;
use crate::data::image::ImagePatches;
use crate::data::sequence::VisionInput;
use crate::device::{Activation, ModelOps};
use crate::model::config::{DecoderConfig, Section, mrope_sections};
use crate::model::decoder::Linear;
use crate::model::rope::RopeAxes;
use crate::model::source::{Headers, Source, Weights};
use crate::model::vision::{Attention, Mlp, Norm, TowerBlock, TowerSizes};
use anyhow::Result;

/// Side of a patch where the vision config leaves it out.
const PATCH_SIZE: usize = 14;

/// The Qwen2-VL family.
pub(super) struct Qwen2Vl;

impl<D: ModelOps> Family<D> for Qwen2Vl {
    fn model_type(&self) -> &'static str {
        "qwen2_vl"
    }

    fn answers_stop(&self) -> bool {
        true
    }

    fn config(&self, checkpoint: &Checkpoint) -> Result<ModelConfig> {
        qwen::model_config(checkpoint, decoder_config(&Section::root(checkpoint)?)?)
    }

    fn vision_input(&self, checkpoint: &Checkpoint, options: ImageOptions) -> Result<Box<dyn VisionInput>> {
        let patches = Patches::read(&vision_section(&Section::root(checkpoint)?)?, PATCH_SIZE)?;
        qwen::vision_input(checkpoint, options, &patches)
    }

    fn vision_tower(&self, device: &D, checkpoint: &Checkpoint) -> Result<Box<dyn VisionTower<D>>> {
        Ok(Box::new(Tower::load(&Weights::new(device, checkpoint))?))
    }

    fn check_vision_tower(&self, checkpoint: &Checkpoint) -> Result<()> {
        Tower::load(&Headers(checkpoint)).map(drop)
    }
}

fn decoder_config(root: &Section<'_>) -> Result<DecoderConfig> {
    let text = text_section(root)?;
    let decoder = DecoderConfig::read(root, &text)?;
    let sections = mrope_sections(&text, decoder.attention.head_dim)?;
    Ok(DecoderConfig { rope_axes: RopeAxes::Sections(sections), ..decoder })
}

/// Sizes of the tower; Hub files leave out what equals the class's defaults.
fn sizes(vision: &Section<'_>) -> Result<TowerSizes> {
    let width = vision.count_or("embed_dim", 1280)?;
    Ok(TowerSizes {
        width,
        heads: vision.count_or("num_heads", 16)?,
        inner: width * vision.count_or("mlp_ratio", 4)?,
        depth: vision.count_or("depth", 32)?,
    })
}

/// The vision tower: patch embedding, pre-norm blocks with full attention inside each image, 2×2 merger.
struct Tower<T> {
    embedding: Linear<T>,
    blocks: Vec<TowerBlock<T>>,
    merger_norm: Norm<T>,
    merger: Mlp<T>,
    patches: Patches,
    width: usize,
    frequencies: Vec<f32>,
}

impl<T> Tower<T> {
    fn load<S: Source<Tensor = T>>(source: &S) -> Result<Self> {
        let checkpoint = source.checkpoint();
        let root = Section::root(checkpoint)?;
        let output = decoder_config(&root)?.hidden;
        let vision = vision_section(&root)?;
        let patches = Patches::read(&vision, PATCH_SIZE)?;
        // `hidden_size` is the output width here.
        qwen::check_output(&vision, "hidden_size", output)?;
        let TowerSizes { width, heads, inner, depth } = sizes(&vision)?;
        let activation = vision.activation_or("hidden_act", Activation::QuickGelu)?;
        let frequencies = qwen::vision_frequencies(&vision, "embed_dim", width, heads)?;
        let prefix = checkpoint.prefix(&VISION_PREFIXES, "patch_embed.proj.weight")?;
        qwen::check_depth(checkpoint, &vision, prefix, depth)?;
        let block = |i: usize| -> Result<TowerBlock<T>> {
            let at = format!("{prefix}blocks.{i}");
            let fc = (format!("{at}.mlp.fc1"), format!("{at}.mlp.fc2"));
            Ok(TowerBlock {
                attention_norm: Norm::layer(source, &format!("{at}.norm1"), width)?,
                attention: Attention::fused(source, &format!("{at}.attn"), width, heads)?,
                mlp_norm: Norm::layer(source, &format!("{at}.norm2"), width)?,
                mlp: Mlp::plain(source, (&fc.0, &fc.1), [width, inner, width], activation)?,
            })
        };
        let merged = width * patches.per_token();
        let at = format!("{prefix}merger");
        let fc = (format!("{at}.mlp.0"), format!("{at}.mlp.2"));
        let embedding = format!("{prefix}patch_embed.proj");
        Ok(Self {
            embedding: Linear::load(source, &embedding, (width, patches.values()), false)?,
            blocks: (0..depth).map(block).collect::<Result<_>>()?,
            merger_norm: Norm::layer(source, &format!("{at}.ln_q"), width)?,
            merger: Mlp::plain(source, (&fc.0, &fc.1), [merged, merged, output], Activation::Gelu)?,
            patches,
            width,
            frequencies,
        })
    }
}

impl<D: ModelOps> VisionTower<D> for Tower<D::Tensor> {
    fn encode(&self, device: &D, images: &[&ImagePatches]) -> Result<Features<D::Tensor>> {
        let packed = StackedPatches::new(device, images, self.patches.merge)?;
        let rotary = packed.rotary(device, &self.frequencies)?;
        let mut x = self.embedding.apply(device, &packed.patches)?;
        drop(packed.patches);
        for block in &self.blocks {
            block.apply(device, &mut x, Some(&rotary), &packed.spans)?;
        }
        let normed = self.merger_norm.apply(device, &x)?;
        let per_token = self.patches.per_token();
        let merged = device.reshape(normed, packed.positions.len() / per_token, per_token * self.width)?;
        Ok(Features::plain(self.merger.apply(device, merged)?))
    }
}
