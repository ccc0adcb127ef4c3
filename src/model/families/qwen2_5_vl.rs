//! Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with a vision tower of RMS norms and gated MLPs, whose blocks attend inside
//! windows of the image but for a few that see all of it.

use super::qwen::{self, Patches, StackedPatches, VISION_PREFIXES, text_section, vision_section};
use super::{Family, Features, ImageOptions, ModelConfig, VisionTower};
use crate::checkpoint::Checkpoint;
use crate::data::image::ImagePatches;
use crate::data::sequence::VisionInput;
use crate::device::{Activation, ModelOps, Span};
use crate::model::config::{DecoderConfig, Section, mrope_sections};
use crate::model::decoder::Linear;
use crate::model::rope::RopeAxes;
use crate::model::source::{Headers, Source, Weights};
use crate::model::vision::{Attention, Mlp, Norm, TowerBlock, TowerSizes};
use anyhow::{Result, ensure};

/// Side of a patch where the vision config leaves it out.
const PATCH_SIZE: usize = 14;
/// Blocks that see the whole image, where the vision config leaves them out.
const FULL_ATTENTION: [usize; 4] = [7, 15, 23, 31];

/// The Qwen2.5-VL family.
pub(super) struct Qwen25Vl;

impl<D: ModelOps> Family<D> for Qwen25Vl {
    fn model_type(&self) -> &'static str {
        "qwen2_5_vl"
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

// `tokens_per_second` of the vision config moves the frames of a video; an image's time stands still.
fn decoder_config(root: &Section<'_>) -> Result<DecoderConfig> {
    let text = text_section(root)?;
    let decoder = DecoderConfig::read(root, &text)?;
    let sections = mrope_sections(&text, decoder.attention.head_dim)?;
    Ok(DecoderConfig { rope_axes: RopeAxes::Sections(sections), ..decoder })
}

/// Sizes of the tower; Hub files leave out what equals the class's defaults.
struct Sizes {
    tower: TowerSizes,
    window_pixels: usize,
    /// The blocks that see whole images.
    full: Vec<usize>,
}

impl Sizes {
    fn read(vision: &Section<'_>) -> Result<Self> {
        Ok(Self {
            tower: TowerSizes {
                // Here `hidden_size` is the tower's own width; the class's default of 3584 is no tower's.
                width: vision.count("hidden_size")?,
                heads: vision.count_or("num_heads", 16)?,
                inner: vision.count_or("intermediate_size", 3420)?,
                depth: vision.count_or("depth", 32)?,
            },
            window_pixels: vision.count_or("window_size", 112)?,
            full: match vision.get("fullatt_block_indexes") {
                Some(_) => vision.counts("fullatt_block_indexes")?,
                None => FULL_ATTENTION.to_vec(),
            },
        })
    }
}

/// The vision tower: patch embedding, pre-norm blocks with attention inside windows or whole images, 2×2 merger.
struct Tower<T> {
    embedding: Linear<T>,
    blocks: Vec<TowerBlock<T>>,
    /// Whether a block sees whole images, block by block.
    full_attention: Vec<bool>,
    merger_norm: Norm<T>,
    merger: Mlp<T>,
    patches: Patches,
    width: usize,
    frequencies: Vec<f32>,
    /// Side of a window in merged tokens.
    window: usize,
}

impl<T> Tower<T> {
    fn load<S: Source<Tensor = T>>(source: &S) -> Result<Self> {
        let checkpoint = source.checkpoint();
        let root = Section::root(checkpoint)?;
        let output = decoder_config(&root)?.hidden;
        let vision = vision_section(&root)?;
        let patches = Patches::read(&vision, PATCH_SIZE)?;
        let Sizes { tower: TowerSizes { width, heads, inner, depth }, window_pixels, full } = Sizes::read(&vision)?;
        qwen::check_output(&vision, "out_hidden_size", output)?;
        let activation = vision.activation_or("hidden_act", Activation::Silu)?;
        let frequencies = qwen::vision_frequencies(&vision, "hidden_size", width, heads)?;
        let window = window_pixels / patches.merge / patches.side;
        ensure!(
            window > 0,
            "{} is {window_pixels} pixels, less than the {} of one image token",
            vision.at("window_size"),
            patches.merge * patches.side
        );
        let prefix = checkpoint.prefix(&VISION_PREFIXES, "patch_embed.proj.weight")?;
        qwen::check_depth(checkpoint, &vision, prefix, depth)?;
        let block = |i: usize| -> Result<TowerBlock<T>> {
            let at = format!("{prefix}blocks.{i}");
            Ok(TowerBlock {
                attention_norm: Norm::rms(source, &format!("{at}.norm1"), width)?,
                attention: Attention::fused(source, &format!("{at}.attn"), width, heads)?,
                mlp_norm: Norm::rms(source, &format!("{at}.norm2"), width)?,
                mlp: Mlp::gated(source, &format!("{at}.mlp"), (width, inner), activation)?,
            })
        };
        let blocks = (0..depth).map(block).collect::<Result<_>>()?;
        let merged = width * patches.per_token();
        let at = format!("{prefix}merger");
        let fc = (format!("{at}.mlp.0"), format!("{at}.mlp.2"));
        let embedding = format!("{prefix}patch_embed.proj");
        Ok(Self {
            embedding: Linear::load(source, &embedding, (width, patches.values()), false)?,
            blocks,
            full_attention: (0..depth).map(|i| full.contains(&i)).collect(),
            merger_norm: Norm::rms(source, &format!("{at}.ln_q"), width)?,
            merger: Mlp::plain(source, (&fc.0, &fc.1), [merged, merged, output], Activation::Gelu)?,
            patches,
            width,
            frequencies,
            window,
        })
    }
}

impl<D: ModelOps> VisionTower<D> for Tower<D::Tensor> {
    fn encode(&self, device: &D, images: &[&ImagePatches]) -> Result<Features<D::Tensor>> {
        let mut packed = StackedPatches::new(device, images, self.patches.merge)?;
        let per_token = self.patches.per_token();
        let windows = Windows::new(images.iter().map(|image| image.merged_grid()), self.window, per_token);
        let (tokens, patches) = (windows.order.len(), packed.positions.len());

        // Window by window, the patches of a token staying together: a span is then a run of rows, for whole images too,
        // whose windows follow each other.
        packed.positions = windows
            .order
            .iter()
            .flat_map(|&token| &packed.positions[token as usize * per_token..][..per_token])
            .copied()
            .collect();
        let rotary = packed.rotary(device, &self.frequencies)?;
        let x = self.embedding.apply(device, &packed.patches)?;
        drop(packed.patches);
        let x = device.gather_rows(&device.reshape(x, tokens, per_token * self.width)?, &windows.order)?;
        let mut x = device.reshape(x, patches, self.width)?;
        for (block, &full) in self.blocks.iter().zip(&self.full_attention) {
            let spans = if full { &packed.spans } else { &windows.spans };
            block.apply(device, &mut x, Some(&rotary), spans)?;
        }
        let normed = self.merger_norm.apply(device, &x)?;
        let merged = device.reshape(normed, tokens, per_token * self.width)?;
        let features = self.merger.apply(device, merged)?;
        Ok(Features::plain(device.gather_rows(&features, &windows.places())?))
    }
}

/// Image tokens sorted by window. Windows are squares from the upper left corner on, cut off at the right and the bottom.
#[derive(Debug, PartialEq)]
struct Windows {
    /// The token at each place, counted over all images.
    order: Vec<u32>,
    /// The windows, in patches.
    spans: Vec<Span>,
}

impl Windows {
    /// `grids`: height and width of each image in tokens; `side`: of a window, likewise.
    fn new(grids: impl Iterator<Item = (usize, usize)>, side: usize, per_token: usize) -> Self {
        let mut order: Vec<u32> = Vec::new();
        let mut spans = Vec::new();
        for (height, width) in grids {
            let first = order.len();
            for top in (0..height).step_by(side) {
                for left in (0..width).step_by(side) {
                    let start = order.len();
                    for row in top..height.min(top + side) {
                        order
                            .extend((left..width.min(left + side)).map(|column| (first + row * width + column) as u32));
                    }
                    spans.push(Span::own(start * per_token..order.len() * per_token));
                }
            }
        }
        Self { order, spans }
    }

    /// The place of each token.
    fn places(&self) -> Vec<u32> {
        let mut places = vec![0; self.order.len()];
        for (place, &token) in self.order.iter().enumerate() {
            places[token as usize] = place as u32;
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(windows: &Windows) -> Vec<usize> {
        windows.spans.iter().map(|span| span.q.end).collect()
    }

    #[test]
    fn windows_are_those_of_transformers() {
        // 34×46 patches, windows of 112 pixels (transformers 5.23, get_vision_window_index).
        let windows = Windows::new([(17, 23)].into_iter(), 4, 4);
        assert_eq!(windows.spans.len(), 30);
        assert_eq!(ends(&windows)[..7], [64, 128, 192, 256, 320, 368, 432]);
        assert_eq!(windows.order[..6], [0, 1, 2, 3, 23, 24]);
        assert_eq!(*ends(&windows).last().unwrap(), 34 * 46);
    }

    #[test]
    fn windows_may_be_cut_off_and_images_follow_each_other() {
        let windows = Windows::new([(3, 3), (2, 1)].into_iter(), 2, 4);
        assert_eq!(windows.order, [0, 1, 3, 4, 2, 5, 6, 7, 8, 9, 10]);
        assert_eq!(ends(&windows), [16, 24, 32, 36, 44]);
        let back: Vec<u32> = windows.places().iter().map(|&place| windows.order[place as usize]).collect();
        assert_eq!(back, (0..11).collect::<Vec<u32>>());
    }
}
