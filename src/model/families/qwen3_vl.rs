//! Qwen3-VL, dense (arXiv 2511.21631): vision tower with interpolated position embeddings and DeepStack, Qwen3 decoder with
//! interleaved M-RoPE.

use super::qwen::{self, Patches, StackedPatches, VISION_PREFIXES, text_section, vision_section};
use super::{Family, Features, ImageOptions, ModelConfig, VisionTower};
use crate::checkpoint::Checkpoint;
use crate::data::image::ImagePatches;
use crate::data::sequence::VisionInput;
use crate::device::{Activation, AttentionShape, ModelOps};
use crate::model::config::{DecoderConfig, Section, mrope_sections, rope_section};
use crate::model::decoder::Linear;
use crate::model::rope::RopeAxes;
use crate::model::source::{Headers, Source, Weights};
use crate::model::vision::{Attention, Mlp, Norm, TowerBlock, TowerSizes};
use crate::tensor::Matrix;
use anyhow::{Result, bail, ensure};

/// Side of a patch where the vision config leaves it out.
const PATCH_SIZE: usize = 16;
/// Width of a decoder head where the text config leaves it out.
const HEAD_DIM: usize = 128;
/// Key of the vision config that says behind which blocks of the tower features for the decoder's first blocks are made.
const DEEPSTACK_KEY: &str = "deepstack_visual_indexes";
/// Blocks that hand on features, where the vision config leaves them out.
const DEEPSTACK_INDEXES: [usize; 3] = [8, 16, 24];

/// The dense models of the Qwen3-VL family.
pub(super) struct Qwen3Vl;

impl<D: ModelOps> Family<D> for Qwen3Vl {
    fn model_type(&self) -> &'static str {
        "qwen3_vl"
    }

    fn config(&self, checkpoint: &Checkpoint) -> Result<ModelConfig> {
        let root = Section::root(checkpoint)?;
        let levels = root.section("vision_config")?.map(|vision| deepstack_list(&vision)).transpose()?;
        let config = qwen::model_config(checkpoint, decoder_config(&root)?)?;
        Ok(ModelConfig { deepstack: levels.map_or(0, |levels| levels.len()), ..config })
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
    if text.flag_or("attention_bias", false)? {
        bail!("{} is true; the attention of qwen3_vl is supported without biases only", text.at("attention_bias"));
    }
    let head_dim = text.count_or("head_dim", HEAD_DIM)?;
    let sections = mrope_sections(&text, head_dim)?;
    if let Some(rope) = rope_section(&text)?
        && !rope.flag_or("mrope_interleaved", true)?
    {
        bail!("{} is false; qwen3_vl is supported with interleaved sections only", rope.at("mrope_interleaved"));
    }
    Ok(DecoderConfig {
        attention: AttentionShape { head_dim, ..decoder.attention },
        // transformers ignores the flag in text_config for this family.
        tied: root.flag_or("tie_word_embeddings", false)?,
        qkv_bias: false,
        qk_norm: true,
        rope_axes: RopeAxes::Interleaved(sections),
        ..decoder
    })
}

/// Merges squares of patches to tokens of the decoder's width.
struct Merger<T> {
    norm: Norm<T>,
    /// Whether the norm is of a merged square, not of each of its patches.
    norm_merged: bool,
    mlp: Mlp<T>,
}

impl<T> Merger<T> {
    /// Reads `module.norm`, `module.linear_fc1` and `module.linear_fc2`. `widths`: of a patch, a merged square, a token.
    fn load<S: Source<Tensor = T>>(
        source: &S,
        module: &str,
        [width, merged, output]: [usize; 3],
        norm_merged: bool,
    ) -> Result<Self> {
        let fc = (format!("{module}.linear_fc1"), format!("{module}.linear_fc2"));
        let normed = if norm_merged { merged } else { width };
        Ok(Self {
            norm: Norm::layer(source, &format!("{module}.norm"), normed)?,
            norm_merged,
            mlp: Mlp::plain(source, (&fc.0, &fc.1), [merged, merged, output], Activation::Gelu)?,
        })
    }

    /// `[patches, width]` → `[patches / per_token, output]`.
    fn apply<D: ModelOps<Tensor = T>>(&self, device: &D, x: &T, per_token: usize) -> Result<T> {
        let (patches, width) = device.shape(x);
        let merge = |x: T| device.reshape(x, patches / per_token, per_token * width);
        let merged = match self.norm_merged {
            false => merge(self.norm.apply(device, x)?)?,
            true => self.norm.apply(device, &merge(device.slice_rows(x, 0..patches)?)?)?,
        };
        self.mlp.apply(device, merged)
    }
}

/// Learned embeddings of a square grid of positions, stretched over each image's grid of patches.
struct PositionGrid {
    /// `[side², width]`, row by row. On the host: what images need of it is a few sums a patch.
    table: Matrix,
    side: usize,
}

impl PositionGrid {
    /// Reads `name`, of as many positions as the config says.
    fn load<S: Source>(source: &S, vision: &Section<'_>, name: &str, width: usize) -> Result<Self> {
        let count = vision.count_or("num_position_embeddings", 2304)?;
        let side = count.isqrt();
        ensure!(
            side * side == count,
            "{} is {count}, not the positions of a square grid",
            vision.at("num_position_embeddings")
        );
        Ok(Self { table: source.on_host(name, count, width)?, side })
    }

    /// The two neighbours of place `index` of `size` and their weights: ends lie on ends (align_corners). Arithmetic in
    /// float32 as transformers' `get_vision_interpolation_indices_and_weights` does it.
    fn neighbours(&self, index: u32, size: usize) -> [(usize, f32); 2] {
        let place = index as f32 * (self.side - 1) as f32 / size.saturating_sub(1).max(1) as f32;
        let below = place.floor();
        let above = 1.0 - (place - below - 1.0).abs();
        [(below as usize, 1.0 - (place - below)), ((below as usize + 1).min(self.side - 1), above)]
    }

    /// Embeddings of patches at (row, column) of a grid of `height` x `width` patches, one after another.
    fn append(&self, positions: &[[u32; 2]], (height, width): (usize, usize), out: &mut Vec<f32>) {
        for &[row, column] in positions {
            let start = out.len();
            out.resize(start + self.table.cols(), 0.0);
            for (y, y_weight) in self.neighbours(row, height) {
                for (x, x_weight) in self.neighbours(column, width) {
                    let weight = y_weight * x_weight;
                    for (out, value) in out[start..].iter_mut().zip(self.table.row(y * self.side + x)) {
                        *out += weight * value;
                    }
                }
            }
        }
    }
}

/// Sizes of the tower; Hub files leave out what equals the class's defaults.
fn sizes(vision: &Section<'_>) -> Result<TowerSizes> {
    Ok(TowerSizes {
        width: vision.count_or("hidden_size", 1152)?,
        heads: vision.count_or("num_heads", 16)?,
        inner: vision.count_or("intermediate_size", 4304)?,
        depth: vision.count_or("depth", 27)?,
    })
}

/// The vision tower: patch and position embeddings, pre-norm blocks with full attention inside each image, mergers.
struct Tower<T> {
    embedding: Linear<T>,
    positions: PositionGrid,
    blocks: Vec<TowerBlock<T>>,
    merger: Merger<T>,
    /// Blocks behind which a merger makes features for the decoder's blocks 0, 1, …; ascending.
    deepstack: Vec<(usize, Merger<T>)>,
    patches: Patches,
    frequencies: Vec<f32>,
}

impl<T> Tower<T> {
    fn load<S: Source<Tensor = T>>(source: &S) -> Result<Self> {
        let checkpoint = source.checkpoint();
        let root = Section::root(checkpoint)?;
        let decoder = decoder_config(&root)?;
        let vision = vision_section(&root)?;
        let patches = Patches::read(&vision, PATCH_SIZE)?;
        let TowerSizes { width, heads, inner, depth } = sizes(&vision)?;
        qwen::check_output(&vision, "out_hidden_size", decoder.hidden)?;
        let activation = vision.activation_or("hidden_act", Activation::GeluTanh)?;
        let frequencies = qwen::vision_frequencies(&vision, "hidden_size", width, heads)?;
        let prefix = checkpoint.prefix(&VISION_PREFIXES, "patch_embed.proj.weight")?;
        qwen::check_depth(checkpoint, &vision, prefix, depth)?;
        let indexes = deepstack_indexes(&vision, depth, decoder.layers)?;
        let beyond = format!("{prefix}deepstack_merger_list.{}.norm.weight", indexes.len());
        ensure!(
            !checkpoint.contains(&beyond),
            "{} is {indexes:?}, but there is a tensor {beyond}; weights and config.json do not belong together",
            vision.at(DEEPSTACK_KEY)
        );
        let block = |i: usize| -> Result<TowerBlock<T>> {
            let at = format!("{prefix}blocks.{i}");
            let fc = (format!("{at}.mlp.linear_fc1"), format!("{at}.mlp.linear_fc2"));
            Ok(TowerBlock {
                attention_norm: Norm::layer(source, &format!("{at}.norm1"), width)?,
                attention: Attention::fused(source, &format!("{at}.attn"), width, heads)?,
                mlp_norm: Norm::layer(source, &format!("{at}.norm2"), width)?,
                mlp: Mlp::plain(source, (&fc.0, &fc.1), [width, inner, width], activation)?,
            })
        };
        let widths = [width, width * patches.per_token(), decoder.hidden];
        let merger = |module: String, norm_merged| Merger::load(source, &module, widths, norm_merged);
        let deepstack = indexes.into_iter().enumerate().map(|(level, index)| -> Result<_> {
            Ok((index, merger(format!("{prefix}deepstack_merger_list.{level}"), true)?))
        });
        let embedding = format!("{prefix}patch_embed.proj");
        Ok(Self {
            embedding: Linear::load(source, &embedding, (width, patches.values()), true)?,
            positions: PositionGrid::load(source, &vision, &format!("{prefix}pos_embed.weight"), width)?,
            blocks: (0..depth).map(block).collect::<Result<_>>()?,
            merger: merger(format!("{prefix}merger"), false)?,
            deepstack: deepstack.collect::<Result<_>>()?,
            patches,
            frequencies,
        })
    }

    /// Embeddings of all patches' positions, `[patches, width]`.
    fn position_embeddings(&self, images: &[&ImagePatches], packed: &StackedPatches<T>) -> Result<Matrix> {
        let mut values = Vec::with_capacity(packed.positions.len() * self.positions.table.cols());
        for (image, span) in images.iter().zip(&packed.spans) {
            let grid = (image.grid_height, image.grid_width);
            self.positions.append(&packed.positions[span.q.clone()], grid, &mut values);
        }
        Matrix::new(packed.positions.len(), self.positions.table.cols(), values)
    }
}

/// `deepstack_visual_indexes` as it stands.
fn deepstack_list(vision: &Section<'_>) -> Result<Vec<usize>> {
    Ok(if vision.get(DEEPSTACK_KEY).is_some() { vision.counts(DEEPSTACK_KEY)? } else { DEEPSTACK_INDEXES.to_vec() })
}

/// `deepstack_visual_indexes`: blocks of the tower, ascending, no more than the decoder has blocks to take their features.
fn deepstack_indexes(vision: &Section<'_>, depth: usize, layers: usize) -> Result<Vec<usize>> {
    let indexes = deepstack_list(vision)?;
    ensure!(
        indexes.is_sorted_by(|a, b| a < b) && indexes.iter().all(|&index| index < depth),
        "{} is {indexes:?}, not ascending numbers of the {depth} blocks of the vision tower",
        vision.at(DEEPSTACK_KEY)
    );
    ensure!(
        indexes.len() <= layers,
        "{} is {indexes:?}, but the language model has only {layers} blocks to take these features",
        vision.at(DEEPSTACK_KEY)
    );
    Ok(indexes)
}

impl<D: ModelOps> VisionTower<D> for Tower<D::Tensor> {
    fn encode(&self, device: &D, images: &[&ImagePatches]) -> Result<Features<D::Tensor>> {
        let packed = StackedPatches::new(device, images, self.patches.merge)?;
        let rotary = packed.rotary(device, &self.frequencies)?;
        let mut x = self.embedding.apply(device, &packed.patches)?;
        let shape = device.shape(&x);
        let positions = device.upload_model_with(shape, || self.position_embeddings(images, &packed))?;
        device.add_assign(&mut x, &positions)?;
        drop(positions);
        drop(packed.patches);
        let per_token = self.patches.per_token();
        let mut deepstack = Vec::with_capacity(self.deepstack.len());
        for (index, block) in self.blocks.iter().enumerate() {
            block.apply(device, &mut x, Some(&rotary), &packed.spans)?;
            if let Some((_, merger)) = self.deepstack.get(deepstack.len()).filter(|(at, _)| *at == index) {
                deepstack.push(merger.apply(device, &x, per_token)?);
            }
        }
        Ok(Features { tokens: self.merger.apply(device, &x, per_token)?, deepstack })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_grid_is_stretched_from_corner_to_corner() {
        // The value at (row, column) is 10 row + column, which interpolation keeps.
        let table = Matrix::new(9, 1, (0..9).map(|i| (10 * (i / 3) + i % 3) as f32).collect()).unwrap();
        let grid = PositionGrid { table, side: 3 };
        let mut out = Vec::new();
        grid.append(&[[0, 0], [1, 0], [0, 1], [2, 4], [4, 4]], (5, 5), &mut out);
        assert_eq!(out, [0.0, 5.0, 0.5, 12.0, 22.0]);
        // An axis of one place stands at the beginning.
        out.clear();
        grid.append(&[[0, 0], [0, 1]], (1, 2), &mut out);
        assert_eq!(out, [0.0, 2.0]);
    }
}
