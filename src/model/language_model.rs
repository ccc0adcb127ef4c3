//! A whole model on a device: embedding with image features, all blocks, output head, key/value cache.

pub use super::cache::Cache;

use super::cache::{CachedBlock, attend_cached};
use super::config::DecoderConfig;
use super::decoder::{Block, DeepStack, Layout, Projection};
use super::families::{self, Features, Head, ModelConfig, VisionTower};
use super::labels;
use super::rope::{self, RopeAxes};
use super::source::{Headers, Source, Weights};
use crate::checkpoint::Checkpoint;
use crate::data::image::ImagePatches;
use crate::data::sequence::Sequence;
use crate::device::{ModelOps, Rotary, Span};
use crate::tensor::Matrix;
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use std::ops::Deref;
use std::sync::Arc;

/// Rows of the output head that are looked at together where it is not held.
pub const HEAD_ROWS: usize = 2048;

/// What turns the places of tokens into what goes with them through the decoder.
pub struct Positions {
    frequencies: Vec<f32>,
    axes: RopeAxes,
}

impl Positions {
    /// Empty positions of a decoder.
    pub fn new(decoder: &DecoderConfig) -> Self {
        let frequencies = rope::inverse_frequencies(decoder.rope_theta, decoder.attention.head_dim);
        Self { frequencies, axes: decoder.rope_axes }
    }

    /// Rotary tables and bounds of packed sequences; features of their images for later blocks are not among it.
    pub fn layout<D: ModelOps>(&self, device: &D, sequences: &[&Sequence]) -> Result<Layout<D::Tensor>> {
        let positions: Vec<[u32; 3]> = sequences.iter().flat_map(|s| s.positions.iter().copied()).collect();
        let spans = spans(sequences.iter().map(|s| s.tokens.len()));
        Ok(Layout { rotary: self.rotary(device, &positions)?, spans, deepstack: None })
    }

    fn rotary<D: ModelOps>(&self, device: &D, positions: &[[u32; 3]]) -> Result<Rotary<D::Tensor>> {
        rope::multimodal(device, positions, &self.frequencies, self.axes)
    }
}

/// Rows of packed sequences that stand for image features, in order.
pub fn image_rows(sequences: &[&Sequence], image_token: u32) -> Vec<u32> {
    let tokens = sequences.iter().flat_map(|s| &s.tokens);
    (0..).zip(tokens).filter(|&(_, &token)| token == image_token).map(|(row, _)| row).collect()
}

/// What turns sequences into the decoder's input: embedding table, vision tower, rotary frequencies.
///
/// Of the table, which may be a quarter of a model, rows are read from the file as they are asked for.
pub struct Embedder<D: ModelOps> {
    checkpoint: Arc<Checkpoint>,
    config: ModelConfig,
    tower: Option<Box<dyn VisionTower<D>>>,
    positions: Positions,
}

impl<D: ModelOps> Embedder<D> {
    /// Embedder of a checkpoint, with the vision tower on the device. Without `tower` it is loaded whenever there are images, and given back
    /// behind them.
    pub fn load(device: &D, checkpoint: &Arc<Checkpoint>, config: &ModelConfig, tower: bool) -> Result<Self> {
        check_table(&Headers(checkpoint), config)?;
        Ok(Self {
            checkpoint: Arc::clone(checkpoint),
            config: config.clone(),
            tower: tower.then(|| vision_tower(device, checkpoint)).transpose()?,
            positions: Positions::new(&config.decoder),
        })
    }

    /// Features of all images of some sequences, in order; `None` where there is no image.
    pub fn image_features(&self, device: &D, sequences: &[&Sequence]) -> Result<Option<Features<D::Tensor>>> {
        Ok(self.features_of_each(device, &[sequences])?.pop().flatten())
    }

    /// [`image_features`](Self::image_features) of one group of sequences after the other.
    pub fn features_of_each<'s>(
        &self,
        device: &D,
        groups: &[impl AsRef<[&'s Sequence]>],
    ) -> Result<Vec<Option<Features<D::Tensor>>>> {
        let mut loaded = None;
        let mut features = Vec::with_capacity(groups.len());
        for group in groups {
            let images: Vec<&ImagePatches> = group.as_ref().iter().flat_map(|s| &s.images).collect();
            if images.is_empty() {
                features.push(None);
                continue;
            }
            let tower = match (&self.tower, &mut loaded) {
                (Some(tower), _) => tower,
                (None, Some(tower)) => &*tower,
                (None, loaded) => {
                    let _label = device.label(labels::TOWER);
                    &*loaded.insert(vision_tower(device, &self.checkpoint)?)
                }
            };
            features.push(Some(tower.encode(device, &images)?));
        }
        Ok(features)
    }

    /// Packs sequences into the decoder's input `[tokens, hidden]`, the features of their images in the placeholders'
    /// places. Errors where there are not as many of the one as of the other, or a feature is not finite.
    pub fn embed(
        &self,
        device: &D,
        sequences: &[&Sequence],
        features: Option<&Features<D::Tensor>>,
    ) -> Result<(D::Tensor, Layout<D::Tensor>)> {
        let tokens: Vec<u32> = sequences.iter().flat_map(|s| s.tokens.iter().copied()).collect();
        let vocab = self.config.decoder.vocab;
        for sequence in sequences {
            if let Some(token) = sequence.tokens.iter().find(|&&token| token as usize >= vocab) {
                bail!(
                    "sample {} has the token {token}, but the embedding has {vocab} rows; take tokenizer.json and weights \
                     from the same checkpoint",
                    sequence.id
                );
            }
        }
        let mut x = self.embed_tokens(device, &tokens)?;
        let mut deepstack = None;
        if let Some(features) = features {
            let places = image_rows(sequences, self.config.image_token);
            let (rows, _) = device.shape(&features.tokens);
            ensure!(
                rows == places.len(),
                "{} image tokens (id {}) in samples {}, but the vision tower made {rows} features of their images",
                places.len(),
                self.config.image_token,
                sequences.iter().map(|s| s.id.as_str()).collect::<Vec<_>>().join(", ")
            );
            device.scatter_rows(&mut x, &places, &features.tokens)?;
            if !features.deepstack.is_empty() {
                let copies = features.deepstack.iter().map(|level| device.slice_rows(level, 0..rows));
                deepstack = Some(DeepStack { rows: places, levels: copies.collect::<Result<_>>()? });
            }
        }
        let layout = Layout { deepstack, ..self.positions.layout(device, sequences)? };
        if let Some(row) = device.first_non_finite_row(&x)? {
            let sample = layout.spans.iter().position(|span| span.q.contains(&row)).map_or("?", |i| &sequences[i].id);
            bail!(
                "the image features of sample {sample} hold a NaN or an infinity; check the weights of the vision tower \
                 and that sample's images"
            );
        }
        Ok((x, layout))
    }

    /// Rows of the embedding table.
    fn embed_tokens(&self, device: &D, tokens: &[u32]) -> Result<D::Tensor> {
        let decoder = &self.config.decoder;
        let name = self.config.table_name();
        device.upload_stored_with((tokens.len(), decoder.hidden), || {
            self.checkpoint.gathered_rows(&name, decoder.vocab, decoder.hidden, tokens)
        })
    }
}

/// Refuses a residual stream behind block `index` that is broken: scores made of it would look like answers.
fn check_finite<D: ModelOps>(device: &D, x: &D::Tensor, index: usize) -> Result<()> {
    ensure!(
        device.first_non_finite_row(x)?.is_none(),
        "activations behind block {index} hold a NaN or an infinity; check the weights of that block"
    );
    Ok(())
}

/// Consecutive spans of the given lengths.
fn spans(lengths: impl Iterator<Item = usize>) -> Vec<Span> {
    let mut start = 0;
    lengths
        .map(|length| {
            start += length;
            Span::own(start - length..start)
        })
        .collect()
}

/// The embedding table, of a source that keeps nothing of it.
fn check_table(headers: &Headers<'_>, config: &ModelConfig) -> Result<()> {
    headers.matrix(&config.table_name(), config.decoder.vocab, config.decoder.hidden)
}

/// The last norm.
pub fn last_norm<S: Source>(source: &S, config: &ModelConfig) -> Result<S::Tensor> {
    source.vector(&format!("{}norm.weight", config.names.prefix), config.decoder.hidden)
}

/// The output head.
fn output_head<S: Source>(source: &S, config: &ModelConfig) -> Result<S::Tensor> {
    source.matrix(&config.head_name()?, config.decoder.vocab, config.decoder.hidden)
}

/// Hands out the output head, [`HEAD_ROWS`] rows at a time, with the number of the first of them.
pub fn parts_of_head<D: ModelOps>(
    device: &D,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    mut part: impl FnMut(usize, &D::Tensor) -> Result<()>,
) -> Result<()> {
    let (head, decoder) = (config.head_name()?, &config.decoder);
    for first in (0..decoder.vocab).step_by(HEAD_ROWS) {
        let rows = first..(first + HEAD_ROWS).min(decoder.vocab);
        let some = device.upload_stored_with((rows.len(), decoder.hidden), || {
            checkpoint.stored_rows(&head, decoder.vocab, decoder.hidden, rows)
        })?;
        part(first, &some)?;
    }
    Ok(())
}

/// Loads the vision tower of a checkpoint.
fn vision_tower<D: ModelOps>(device: &D, checkpoint: &Checkpoint) -> Result<Box<dyn VisionTower<D>>> {
    let family = families::of::<D>(checkpoint)?;
    family.vision_tower(device, checkpoint).with_context(|| of_vision_config(checkpoint, family.model_type()))
}

fn of_vision_config(checkpoint: &Checkpoint, family: &str) -> String {
    let file = checkpoint.folder().join("config.json");
    format!("{}: the vision tower of {family} as vision_config has it", file.display())
}

/// Refuses a checkpoint in which a tensor that a run reads is missing, or of another shape or type, by the headers alone: the
/// embedding, all blocks, the last norm, the head where there is one, and, where samples have images, the vision tower.
pub fn check_headers<D: ModelOps>(checkpoint: &Checkpoint, config: &ModelConfig, images: bool) -> Result<()> {
    let headers = Headers(checkpoint);
    check_table(&headers, config)?;
    for index in 0..config.decoder.layers {
        Block::load(&headers, &config.decoder, &config.names, index)?;
    }
    last_norm(&headers, config)?;
    if config.head != Head::Missing {
        output_head(&headers, config)?;
    }
    if images {
        let family = families::of::<D>(checkpoint)?;
        let checked = family.check_vision_tower(checkpoint);
        checked.with_context(|| of_vision_config(checkpoint, family.model_type()))?;
    }
    Ok(())
}

/// Where the weights of a model that is evaluated are between passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Residency {
    /// All weights on the device.
    #[default]
    Resident,
    /// Weights in the file, but for the first blocks: the vision tower is loaded for the images, and for every pass one of the other blocks
    /// after the other and the head part by part, so that no more than one of these is on the device.
    Streamed {
        /// Blocks that are held.
        held: usize,
    },
}

/// Some packed sequences on their way through the decoder.
pub struct Stream<T> {
    /// The residual stream, `[tokens, hidden]`.
    pub x: T,
    /// What goes with them.
    pub layout: Layout<T>,
}

/// A model for evaluation.
pub struct LanguageModel<D: ModelOps> {
    embedder: Embedder<D>,
    /// What the blocks and the head are.
    config: ModelConfig,
    /// The first ones, all where they are not streamed.
    blocks: Vec<Block<D::Tensor>>,
    norm: D::Tensor,
    /// `None` where it is streamed.
    head: Option<D::Tensor>,
}

impl<D: ModelOps> LanguageModel<D> {
    /// Reads a float checkpoint, or a quantized one in any format that this crate writes. Errors where there is no output head.
    /// What is wrong with a tensor that is streamed shows when it is read: [`check_headers`] finds it before.
    pub fn load(device: &D, checkpoint: &Arc<Checkpoint>, residency: Residency) -> Result<Self> {
        let config = families::of::<D>(checkpoint)?.config(checkpoint)?;
        Self::with_config(device, checkpoint, [&config, &config], residency)
    }

    /// A model in part: blocks and head as the first of these configurations says, all else as the second, which is the checkpoint's. A
    /// device that [counts](crate::device::counting) needs no more of what is alike. Errors where there is no output head.
    pub fn with_config(
        device: &D,
        checkpoint: &Arc<Checkpoint>,
        [part, whole]: [&ModelConfig; 2],
        residency: Residency,
    ) -> Result<Self> {
        part.head_name()?;
        let weights = Weights::new(device, checkpoint);
        let (resident, held) = match residency {
            Residency::Resident => (true, part.decoder.layers),
            Residency::Streamed { held } => (false, held.min(part.decoder.layers)),
        };
        let label = device.label(labels::BLOCKS);
        let block = |i| Block::load(&weights, &part.decoder, &part.names, i);
        let blocks = (0..held).map(block).collect::<Result<_>>()?;
        drop(label);
        let label = device.label(labels::HEAD);
        let head = resident.then(|| output_head(&weights, part)).transpose()?;
        drop(label);
        let _label = device.label(labels::WEIGHTS);
        Ok(Self {
            blocks,
            norm: last_norm(&weights, part)?,
            head,
            embedder: Embedder::load(device, checkpoint, whole, resident)?,
            config: part.clone(),
        })
    }

    /// Embedding table and vision tower.
    pub fn embedder(&self) -> &Embedder<D> {
        &self.embedder
    }

    /// The decoder's input for one more token of each sequence, at the given text positions.
    pub fn embed_next(&self, device: &D, tokens: &[u32], positions: &[u32]) -> Result<Stream<D::Tensor>> {
        let _label = device.label(labels::STREAMS);
        let positions: Vec<[u32; 3]> = positions.iter().map(|&p| [p; 3]).collect();
        let rotary = self.embedder.positions.rotary(device, &positions)?;
        let layout = Layout { rotary, spans: spans(tokens.iter().map(|_| 1)), deepstack: None };
        Ok(Stream { x: self.embedder.embed_tokens(device, tokens)?, layout })
    }

    /// Block `index`, from where it is.
    fn block(&self, device: &D, index: usize) -> Result<Lent<'_, D::Tensor>> {
        match self.blocks.get(index) {
            Some(block) => Ok(Lent::Held(block)),
            None => {
                let _label = device.label(labels::LOADED);
                let weights = Weights::new(device, &self.embedder.checkpoint);
                Block::load(&weights, &self.config.decoder, &self.config.names, index).map(Lent::Loaded)
            }
        }
    }

    /// Runs all blocks and the last norm over packed sequences: `[tokens, hidden]` → `[tokens, hidden]`.
    pub fn forward(&self, device: &D, x: D::Tensor, layout: Layout<D::Tensor>) -> Result<D::Tensor> {
        let mut streams = [Stream { x, layout }];
        self.forward_all(device, &mut streams, None)?;
        let [stream] = streams;
        Ok(stream.x)
    }

    /// Runs all blocks and the last norm over each of some streams. With `caches`, one a sequence in the order of the streams, every
    /// sequence attends to its cache as well, which grows by what is new.
    pub fn forward_all(
        &self,
        device: &D,
        streams: &mut [Stream<D::Tensor>],
        mut caches: Option<&mut [Cache<D::Tensor>]>,
    ) -> Result<()> {
        let decoder = &self.config.decoder;
        let sequences = streams.iter().map(|stream| stream.layout.spans.len()).sum::<usize>();
        if let Some(caches) = &caches {
            ensure!(caches.len() == sequences, "{} caches for {sequences} sequences", caches.len());
        }
        for index in 0..decoder.layers {
            let _label = device.label(labels::PASS);
            let block = self.block(device, index)?;
            let mut rest = caches.as_deref_mut();
            for Stream { x, layout } in streams.iter_mut() {
                let attended = match rest.take() {
                    None => block.output_input(device, decoder, x, layout)?,
                    Some(caches) => {
                        let (own, others) = caches.split_at_mut(layout.spans.len());
                        rest = Some(others);
                        attend_cached(device, &CachedBlock { block: &block, index, decoder }, x, layout, own)?
                    }
                };
                block.add_output(device, x, Projection::O, &attended)?;
                drop(attended);
                let inner = block.down_input(device, decoder, x)?;
                block.add_output(device, x, Projection::Down, &inner)?;
                let label = device.label(labels::LEVELS);
                layout.add_deepstack(device, x, index)?;
                drop(label);
                check_finite(device, x, index)?;
            }
        }
        let _label = device.label(labels::STREAMS);
        for Stream { x, .. } in streams {
            *x = device.rms_norm(x, &self.norm, decoder.norm_eps)?;
        }
        Ok(())
    }

    /// An empty cache.
    pub fn cache(&self) -> Cache<D::Tensor> {
        Cache { blocks: Vec::with_capacity(self.config.decoder.layers) }
    }

    /// Logits `[rows, vocab]` of some rows of the output of [`forward`](Self::forward).
    pub fn logits(&self, device: &D, hidden: &D::Tensor, rows: &[u32]) -> Result<Matrix> {
        let label = device.label(labels::STREAMS);
        let hidden = device.gather_rows(hidden, rows)?;
        drop(label);
        let logits_of = |head: &D::Tensor| {
            let _label = device.label(labels::LOGITS);
            device.download(&device.linear(&hidden, head, None)?)
        };
        if let Some(head) = &self.head {
            return logits_of(head);
        }
        let mut logits = Matrix::zeros(rows.len(), self.config.decoder.vocab);
        let _label = device.label(labels::ROWS);
        parts_of_head(device, &self.embedder.checkpoint, &self.config, |first, part| {
            let some = logits_of(part)?;
            for row in 0..some.rows() {
                logits.row_mut(row)[first..][..some.cols()].copy_from_slice(some.row(row));
            }
            Ok(())
        })?;
        Ok(logits)
    }
}

/// A block that stays where it is, or one that goes.
enum Lent<'a, T> {
    Held(&'a Block<T>),
    Loaded(Block<T>),
}

impl<T> Deref for Lent<'_, T> {
    type Target = Block<T>;

    fn deref(&self) -> &Block<T> {
        match self {
            Self::Held(block) => block,
            Self::Loaded(block) => block,
        }
    }
}
