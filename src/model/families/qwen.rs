//! What the Qwen families have in common: config sections, names, images at their own resolution, the towers' positions.

use super::{ImageOptions, ModelConfig};
use crate::checkpoint::Checkpoint;
use crate::data::image::{ImagePatches, stacked_patches, stacked_shape};
use crate::data::native_resolution::{NativeResolution, NativeVision};
use crate::data::sequence::VisionInput;
use crate::device::{ModelOps, Rotary, Span};
use crate::model::config::{DecoderConfig, DecoderNames, Section};
use crate::model::rope;
use anyhow::{Context, Result, ensure};

/// Where generations of transformers have put the decoder, and its head.
const DECODER_PLACES: [(&str, &str); 2] = [("model.language_model.", "lm_head.weight"), ("model.", "lm_head.weight")];
/// Where they have put the vision tower.
pub(super) const VISION_PREFIXES: [&str; 2] = ["model.visual.", "visual."];
/// Most values of the patches that become one token, which sizes are multiplied with: 5,000 times those of Qwen's.
const MAX_PATCH_VALUES: usize = 1 << 24;
/// Base of the vision towers' rotary frequencies, a constant of the model classes.
const VISION_ROPE_THETA: f64 = 10_000.0;

/// Hub originals keep the text keys at the root, transformers from 4.52 on in text_config.
pub(super) fn text_section<'a>(root: &Section<'a>) -> Result<Section<'a>> {
    Ok(root.section("text_config")?.unwrap_or_else(|| root.clone()))
}

pub(super) fn vision_section<'a>(root: &Section<'a>) -> Result<Section<'a>> {
    root.section("vision_config")?.with_context(|| format!("{} is missing", root.at("vision_config")))
}

/// The decoder's shape is the family's to read; names and image token are found alike.
pub(super) fn model_config(checkpoint: &Checkpoint, decoder: DecoderConfig) -> Result<ModelConfig> {
    let root = Section::root(checkpoint)?;
    let layers = (text_section(&root)?.at("num_hidden_layers"), decoder.layers);
    let names = DecoderNames::find(checkpoint, &DECODER_PLACES, layers)?;
    Ok(ModelConfig::new(checkpoint, decoder, names, root.token("image_token_id")?))
}

/// Images at their own resolution, as the processor's file says and the vision tower expects.
pub(super) fn vision_input(
    checkpoint: &Checkpoint,
    options: ImageOptions,
    model: &Patches,
) -> Result<Box<dyn VisionInput>> {
    let root = Section::root(checkpoint)?;
    options.refuse_mode(&root)?;
    let settings = NativeResolution::read(checkpoint.folder(), options.min_pixels, options.max_pixels)?;
    let patches = &settings.patches;
    let processor = [patches.patch_size, patches.temporal_patch_size, patches.merge_size];
    ensure!(
        processor == [model.side, model.frames, model.merge],
        "{} asks for [patch_size, temporal_patch_size, spatial_merge_size] of {:?}, but the image processor's file says \
         {processor:?}; take both files from the same checkpoint",
        root.at("vision_config"),
        [model.side, model.frames, model.merge]
    );
    let video_token = root.get("video_token_id").map(|_| root.token("video_token_id")).transpose()?;
    Ok(Box::new(NativeVision::new(settings, root.token("image_token_id")?, video_token)))
}

/// How a vision tower cuts images; Hub files leave out what equals the class's defaults.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patches {
    pub(super) side: usize,
    pub(super) frames: usize,
    pub(super) merge: usize,
    channels: usize,
}

impl Patches {
    /// `side`: the family's default of `patch_size`. Errors beyond [`MAX_PATCH_VALUES`].
    pub(super) fn read(vision: &Section<'_>, side: usize) -> Result<Self> {
        let patches = Self {
            side: vision.count_or("patch_size", side)?,
            frames: vision.count_or("temporal_patch_size", 2)?,
            merge: vision.count_or("spatial_merge_size", 2)?,
            channels: match vision.get("in_channels") {
                Some(_) => vision.count("in_channels")?,
                None => vision.count_or("in_chans", 3)?,
            },
        };
        let Self { side, frames, merge, channels } = patches;
        let product = |factors: &[usize]| factors.iter().try_fold(1usize, |all, &factor| all.checked_mul(factor));
        let merged = product(&[channels, frames, side, side, merge, merge]);
        ensure!(
            merged.is_some_and(|values| values <= MAX_PATCH_VALUES),
            "{} asks for {merge} x {merge} patches of {channels} x {frames} x {side} x {side} values to a token; the limit is \
             {MAX_PATCH_VALUES} values",
            vision.at("patch_size")
        );
        Ok(patches)
    }

    /// Values of a patch.
    pub(super) fn values(&self) -> usize {
        self.channels * self.frames * self.side * self.side
    }

    /// Patches that are merged to one token.
    pub(super) fn per_token(&self) -> usize {
        self.merge * self.merge
    }
}

/// The width of a tower's output, where `key` gives it, must be the decoder's: its rows take the places of embeddings.
pub(super) fn check_output(vision: &Section<'_>, key: &str, hidden: usize) -> Result<()> {
    let output = vision.count_or(key, hidden)?;
    ensure!(
        output == hidden,
        "{} is {output}, but the language model is {hidden} wide; weights and config.json do not belong together",
        vision.at(key)
    );
    Ok(())
}

/// The tower under `prefix` must end where `depth` of the vision config says: blocks left out would be missed by nobody.
pub(super) fn check_depth(checkpoint: &Checkpoint, vision: &Section<'_>, prefix: &str, depth: usize) -> Result<()> {
    let next = format!("{prefix}blocks.{depth}.norm1.weight");
    ensure!(
        !checkpoint.contains(&next),
        "{} is {depth}, but there is a tensor {next}; weights and config.json do not belong together",
        vision.at("depth")
    );
    Ok(())
}

/// Inverse frequencies of a vision tower's rotary embedding: half of the head's for each of row and column.
pub(super) fn vision_frequencies(vision: &Section<'_>, key: &str, width: usize, heads: usize) -> Result<Vec<f32>> {
    ensure!(
        width.is_multiple_of(heads) && (width / heads).is_multiple_of(4),
        "{} is {width}, which {heads} heads do not share in multiples of 4, as the rotary embedding needs",
        vision.at(key)
    );
    Ok(rope::inverse_frequencies(VISION_ROPE_THETA, width / heads / 2))
}

/// The patches of some images one after another, where they stand, and one span an image.
pub(super) struct StackedPatches<T> {
    /// The patches, `[patches, values]`.
    pub(super) patches: T,
    /// (row, column) of every patch in its image.
    pub(super) positions: Vec<[u32; 2]>,
    /// Rows of each image.
    pub(super) spans: Vec<Span>,
}

impl<T> StackedPatches<T> {
    pub(super) fn new<D: ModelOps<Tensor = T>>(device: &D, images: &[&ImagePatches], merge: usize) -> Result<Self> {
        let mut positions = Vec::new();
        let mut spans = Vec::new();
        for image in images {
            let start = positions.len();
            positions.extend(patch_positions(image.grid_height, image.grid_width, merge));
            spans.push(Span::own(start..positions.len()));
        }
        let crops = images.iter().flat_map(|image| (0..image.crops().len()).map(move |crop| (*image, crop)));
        let patches = device.upload_model_with(stacked_shape(crops.clone()), || Ok(stacked_patches(crops)))?;
        Ok(Self { patches, positions, spans })
    }

    /// Rotary tables of the patches.
    pub(super) fn rotary<D: ModelOps<Tensor = T>>(&self, device: &D, frequencies: &[f32]) -> Result<Rotary<T>> {
        rope::axial(device, &self.positions, frequencies)
    }
}

/// (row, column) of every patch in the order of the patches: merge blocks row by row, inside each its own rows.
fn patch_positions(height: usize, width: usize, merge: usize) -> impl Iterator<Item = [u32; 2]> {
    let blocks = (0..height / merge).flat_map(move |by| (0..width / merge).map(move |bx| (by, bx)));
    blocks.flat_map(move |(by, bx)| {
        (0..merge).flat_map(move |iy| (0..merge).map(move |ix| [(by * merge + iy) as u32, (bx * merge + ix) as u32]))
    })
}
