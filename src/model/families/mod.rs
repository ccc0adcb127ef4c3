//! Model families: what differs between them, one file each.
//!
//! A family says how config.json and tensor names are read, how images become patches and tokens, how its vision tower
//! turns patches into features, and where tokens stand. Everything behind that is shared.

mod llava_onevision;
mod qwen;
mod qwen2_5_vl;
mod qwen2_vl;
mod qwen3_vl;

pub use crate::data::anyres::ImageMode;

use super::config::{DecoderConfig, DecoderNames};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::formats::FamilySupport;
use crate::data::image::ImagePatches;
use crate::data::sequence::VisionInput;
use crate::device::ModelOps;
use crate::device::cpu::Cpu;
use crate::model::config::Section;
use crate::tensor::Float;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// How images are sized and cut, where that is not left to the checkpoint's processor file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOptions {
    /// Smallest area to which an image is enlarged, in pixels; `None`: the checkpoint's.
    pub min_pixels: Option<usize>,
    /// Largest area to which an image is reduced, in pixels; `None`: the checkpoint's.
    pub max_pixels: Option<usize>,
    /// Whether an image is cut into tiles; `None`: as the family does.
    pub image_mode: Option<ImageMode>,
}

impl ImageOptions {
    /// For families that never cut images into tiles.
    fn refuse_mode(self, root: &Section<'_>) -> Result<()> {
        if self.image_mode.is_some() {
            bail!(
                "--image-mode is for models that cut images into tiles; {} is {:?}, which takes images whole",
                root.at("model_type"),
                root.text("model_type")?
            );
        }
        Ok(())
    }

    /// For families whose tower takes images of one size.
    fn refuse_sizes(self, root: &Section<'_>) -> Result<()> {
        for (flag, size) in [("--min-pixels", self.min_pixels), ("--max-pixels", self.max_pixels)] {
            if size.is_some() {
                bail!(
                    "{flag} is for models that take images at their own resolution; {} is {:?}, whose resolutions are \
                     fixed; choose with --image-mode",
                    root.at("model_type"),
                    root.text("model_type")?
                );
            }
        }
        Ok(())
    }
}

/// What a vision tower makes of some images: one row an image token.
pub struct Features<T> {
    /// Features in the placeholders' places, `[image tokens, hidden]`.
    pub tokens: T,
    /// Added to the residual stream at the same places behind the first decoder blocks, one tensor a block, each
    /// `[image tokens, hidden]` (DeepStack, arXiv 2406.04334); empty for families without.
    pub deepstack: Vec<T>,
}

impl<T> Features<T> {
    /// Features of a tower without DeepStack.
    pub fn plain(tokens: T) -> Self {
        Self { tokens, deepstack: Vec::new() }
    }
}

/// A vision tower with its projector, loaded on a device.
pub trait VisionTower<D: ModelOps>: Send + Sync {
    /// Features of some images, packed in order.
    fn encode(&self, device: &D, images: &[&ImagePatches]) -> Result<Features<D::Tensor>>;
}

/// What a checkpoint's config.json and tensor names say, before any weight is read.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The language model.
    pub decoder: DecoderConfig,
    /// Where its tensors are.
    pub names: DecoderNames,
    /// What makes logits of its output.
    pub head: Head,
    /// Placeholder token that image features replace.
    pub image_token: u32,
    /// Levels of [`Features::deepstack`].
    pub deepstack: usize,
}

/// What makes logits of a decoder's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The token embedding.
    Embedding,
    /// A tensor of its own, which transformers takes whatever config.json says of it.
    Stored,
    /// Nothing: config.json asks for a tensor that is not there.
    Missing,
}

impl ModelConfig {
    /// What was read, and the head that the checkpoint has.
    fn new(checkpoint: &Checkpoint, decoder: DecoderConfig, names: DecoderNames, image_token: u32) -> Self {
        let head = match (checkpoint.contains(&names.head), decoder.tied) {
            (true, _) => Head::Stored,
            (false, true) => Head::Embedding,
            (false, false) => Head::Missing,
        };
        Self { decoder, names, head, image_token, deepstack: 0 }
    }

    /// Levels of image features that the first blocks add to samples, which have `images` or none.
    pub fn levels(&self, images: bool) -> usize {
        if images { self.deepstack } else { 0 }
    }

    /// Name of the token embedding's tensor.
    pub fn table_name(&self) -> String {
        format!("{}embed_tokens.weight", self.names.prefix)
    }

    /// Name of the head's tensor. Errors where there is none.
    pub fn head_name(&self) -> Result<String> {
        match self.head {
            Head::Embedding => Ok(self.table_name()),
            Head::Stored => Ok(self.names.head.clone()),
            Head::Missing => bail!(
                "there is no tensor {}, and config.json does not take the embedding for it (tie_word_embeddings is not true): \
                 without an output head the model says nothing",
                self.names.head
            ),
        }
    }

    /// What a checkpoint's user should know before its weights are read.
    pub fn remarks(&self, checkpoint: &Checkpoint) -> Vec<String> {
        let folder = checkpoint.folder().display();
        let mut remarks = Vec::new();
        match self.head_name() {
            Err(error) => remarks.push(format!("{folder}: {error}; programs that load it draw one at random")),
            Ok(name) if self.head == Head::Stored && self.decoder.tied => remarks.push(format!(
                "{folder}: config.json takes the embedding for the output head (tie_word_embeddings), but there is a {name}: it is the \
                 head, as for transformers; other programs may take the embedding"
            )),
            Ok(_) => {}
        }
        if checkpoint.has_leftover_quantization() {
            remarks.push(format!(
                "{folder}: config.json has a quantization_config, but the weights are plain floats: it is taken for a leftover"
            ));
        }
        if checkpoint.folder().join("adapter_config.json").exists() {
            remarks.push(format!(
                "{folder}: an adapter lies beside the weights (adapter_config.json) and is left out; if it belongs to the model, merge it \
                 into the weights first (peft: merge_and_unload)"
            ));
        }
        remarks
    }
}

/// One model family.
pub trait Family<D: ModelOps>: Send + Sync {
    /// `model_type` of config.json.
    fn model_type(&self) -> &'static str;

    /// Whether LMMs-Eval ends this family's answers where a benchmark's task says (`until`): most of its model classes
    /// score the whole answer.
    fn answers_stop(&self) -> bool {
        false
    }

    /// What programs do with this family's files.
    fn support(&self) -> FamilySupport {
        FamilySupport::default()
    }

    /// Reads config.json and finds the tensor names.
    fn config(&self, checkpoint: &Checkpoint) -> Result<ModelConfig>;

    /// How images become patches, placeholders and positions.
    fn vision_input(&self, checkpoint: &Checkpoint, options: ImageOptions) -> Result<Box<dyn VisionInput>>;

    /// Loads the vision tower and its projector.
    fn vision_tower(&self, device: &D, checkpoint: &Checkpoint) -> Result<Box<dyn VisionTower<D>>>;

    /// Errors as [`vision_tower`](Self::vision_tower) does of names, shapes and types, without reading a weight.
    fn check_vision_tower(&self, checkpoint: &Checkpoint) -> Result<()>;
}

/// All known families.
fn registry<D: ModelOps>() -> &'static [&'static dyn Family<D>] {
    &[&qwen2_vl::Qwen2Vl, &qwen2_5_vl::Qwen25Vl, &qwen3_vl::Qwen3Vl, &llava_onevision::LlavaOnevision]
}

/// The type that a checkpoint stores its model in: that of the token embedding, which no format quantizes.
pub fn float_type(checkpoint: &Checkpoint) -> Result<Float> {
    let config = of::<Cpu>(checkpoint)?.config(checkpoint)?;
    checkpoint.float_type(&config.table_name())
}

/// The family of a checkpoint, by `model_type`.
pub fn of<D: ModelOps>(checkpoint: &Checkpoint) -> Result<&'static dyn Family<D>> {
    let model_type = Section::root(checkpoint)?.text("model_type")?;
    let families = registry::<D>();
    if let Some(dense) = model_type.strip_suffix("_moe")
        && families.iter().any(|family| family.model_type() == dense)
    {
        bail!(
            "{}: model_type {model_type:?} is a mixture of experts, which is not supported; of this family only the dense \
             models ({dense}) are",
            checkpoint.folder().join("config.json").display()
        );
    }
    families.iter().copied().find(|family| family.model_type() == model_type).with_context(|| {
        let known: Vec<&str> = families.iter().map(|family| family.model_type()).collect();
        format!(
            "{}: model_type {model_type:?} is not known; known are: {}",
            checkpoint.folder().join("config.json").display(),
            known.join(", ")
        )
    })
}
