//! A whole model on a device: embedding with image features, all blocks, output head, key/value cache.

use super::config::DecoderConfig;
use super::decoder::{Attended, Block, DeepStack, Layout, Projection};
use super::families::{self, Features, Head, ModelConfig, VisionTower};
use super::rope::{self, RopeAxes};
use crate::calibration::image::ImagePatches;
use crate::calibration::sequence::Sequence;
use crate::checkpoint::Checkpoint;
use crate::device::{ModelOps, Rotary, Span};
use anyhow::{Context, Result, bail, ensure};

/// What turns the places of tokens into what goes with them through the decoder.
pub struct Positions {
    frequencies: Vec<f32>,
    axes: RopeAxes,
}

impl Positions {
    /// Of a decoder.
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
pub struct Embedder<D: ModelOps> {
    table: D::Tensor,
    tower: Option<Box<dyn VisionTower<D>>>,
    image_token: u32,
    positions: Positions,
}

impl<D: ModelOps> Embedder<D> {
    /// Reads the embedding and, unless `text_only`, the vision tower.
    pub fn load(device: &D, checkpoint: &Checkpoint, config: &ModelConfig, text_only: bool) -> Result<Self> {
        let decoder = &config.decoder;
        let name = format!("{}embed_tokens.weight", config.names.prefix);
        let tower = match text_only {
            true => None,
            false => {
                let family = families::of::<D>(checkpoint)?;
                Some(family.vision_tower(device, checkpoint).with_context(|| {
                    let file = checkpoint.folder().join("config.json");
                    format!("{}: the vision tower of {} as vision_config has it", file.display(), family.model_type())
                })?)
            }
        };
        Ok(Self {
            table: device.upload_model(checkpoint.matrix(&name, decoder.vocab, decoder.hidden)?)?,
            tower,
            image_token: config.image_token,
            positions: Positions::new(decoder),
        })
    }

    /// Features of all images of some sequences, in order; `None` where there is no image.
    pub fn image_features(&self, device: &D, sequences: &[&Sequence]) -> Result<Option<Features<D::Tensor>>> {
        let images: Vec<&ImagePatches> = sequences.iter().flat_map(|s| &s.images).collect();
        match &self.tower {
            Some(tower) if !images.is_empty() => Ok(Some(tower.encode(device, &images)?)),
            _ => Ok(None),
        }
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
        let (vocab, _) = device.shape(&self.table);
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
            let places = image_rows(sequences, self.image_token);
            let (rows, _) = device.shape(&features.tokens);
            ensure!(
                rows == places.len(),
                "{} image tokens (id {}) in samples {}, but the vision tower made {rows} features of their images",
                places.len(),
                self.image_token,
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
        device.gather_rows(&self.table, tokens)
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

/// Keys and values of one sequence, per block: `[tokens, kv_heads · head_dim]`.
pub struct Cache<T> {
    blocks: Vec<(T, T)>,
}

/// A model that is wholly on the device, for evaluation.
pub struct LanguageModel<D: ModelOps> {
    decoder: DecoderConfig,
    embedder: Embedder<D>,
    blocks: Vec<Block<D::Tensor>>,
    norm: D::Tensor,
    /// `None`: tied to the embedding.
    head: Option<D::Tensor>,
}

impl<D: ModelOps> LanguageModel<D> {
    /// Reads a float checkpoint, or a quantized one in any format that this crate writes.
    pub fn load(device: &D, checkpoint: &Checkpoint) -> Result<Self> {
        let config = families::of::<D>(checkpoint)?.config(checkpoint)?;
        let decoder = config.decoder.clone();
        let blocks = (0..decoder.layers)
            .map(|i| Block::load(device, checkpoint, &decoder, &config.names, i))
            .collect::<Result<_>>()?;
        let norm =
            device.upload_model(checkpoint.vector(&format!("{}norm.weight", config.names.prefix), decoder.hidden)?)?;
        let head = match config.head {
            Head::Embedding => None,
            Head::Stored | Head::Missing => {
                Some(device.upload_model(checkpoint.matrix(&config.head_name()?, decoder.vocab, decoder.hidden)?)?)
            }
        };
        let embedder = Embedder::load(device, checkpoint, &config, false)?;
        Ok(Self { decoder, embedder, blocks, norm, head })
    }

    /// Embedding table and vision tower.
    pub fn embedder(&self) -> &Embedder<D> {
        &self.embedder
    }

    /// The decoder's input for one more token of each sequence, at the given text positions.
    pub fn embed_next(&self, device: &D, tokens: &[u32], positions: &[u32]) -> Result<(D::Tensor, Layout<D::Tensor>)> {
        let positions: Vec<[u32; 3]> = positions.iter().map(|&p| [p; 3]).collect();
        let rotary = self.embedder.positions.rotary(device, &positions)?;
        let layout = Layout { rotary, spans: spans(tokens.iter().map(|_| 1)), deepstack: None };
        Ok((self.embedder.embed_tokens(device, tokens)?, layout))
    }

    /// Runs all blocks and the last norm over packed sequences: `[tokens, hidden]` → `[tokens, hidden]`.
    pub fn forward(&self, device: &D, mut x: D::Tensor, layout: &Layout<D::Tensor>) -> Result<D::Tensor> {
        for (index, block) in self.blocks.iter().enumerate() {
            let attention = block.output_input(device, &self.decoder, &x, layout)?;
            block.add_output(device, &mut x, Projection::O, &attention)?;
            let inner = block.down_input(device, &self.decoder, &x)?;
            block.add_output(device, &mut x, Projection::Down, &inner)?;
            layout.add_deepstack(device, &mut x, index)?;
            check_finite(device, &x, index)?;
        }
        device.rms_norm(&x, &self.norm, self.decoder.norm_eps)
    }

    /// As [`forward`](Self::forward), with every sequence attending to its cache as well, which grows by what is new.
    pub fn forward_cached(
        &self,
        device: &D,
        mut x: D::Tensor,
        layout: &Layout<D::Tensor>,
        caches: &mut [Cache<D::Tensor>],
    ) -> Result<D::Tensor> {
        ensure!(caches.len() == layout.spans.len(), "{} caches for {} sequences", caches.len(), layout.spans.len());
        for (index, block) in self.blocks.iter().enumerate() {
            let input = block.attention_input(device, &self.decoder, &x)?;
            let Attended { mut q, k, v } = block.attended(device, &input, &layout.rotary)?;
            for (cache, span) in caches.iter_mut().zip(&layout.spans) {
                let (k, v) = (device.slice_rows(&k, span.k.clone())?, device.slice_rows(&v, span.k.clone())?);
                match cache.blocks.get_mut(index) {
                    Some((keys, values)) => {
                        device.append_rows(keys, &k)?;
                        device.append_rows(values, &v)?;
                    }
                    None => cache.blocks.push((k, v)),
                }
                let (keys, values) = &cache.blocks[index];
                let own = Span { q: 0..span.q.len(), k: 0..device.shape(keys).0 };
                let queries = device.slice_rows(&q, span.q.clone())?;
                let out = device.attention(&queries, keys, values, &[own], self.decoder.attention)?;
                let rows: Vec<u32> = (span.q.start as u32..span.q.end as u32).collect();
                device.scatter_rows(&mut q, &rows, &out)?;
            }
            block.add_output(device, &mut x, Projection::O, &q)?;
            let inner = block.down_input(device, &self.decoder, &x)?;
            block.add_output(device, &mut x, Projection::Down, &inner)?;
            layout.add_deepstack(device, &mut x, index)?;
            check_finite(device, &x, index)?;
        }
        device.rms_norm(&x, &self.norm, self.decoder.norm_eps)
    }

    /// An empty cache.
    pub fn cache(&self) -> Cache<D::Tensor> {
        Cache { blocks: Vec::with_capacity(self.blocks.len()) }
    }

    /// Logits `[rows, vocab]` of some rows of the output of [`forward`](Self::forward).
    pub fn logits(&self, device: &D, hidden: &D::Tensor, rows: &[u32]) -> Result<D::Tensor> {
        let rows = device.gather_rows(hidden, rows)?;
        device.linear(&rows, self.head.as_ref().unwrap_or(&self.embedder.table), None)
    }
}
