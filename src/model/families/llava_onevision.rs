//! LLaVA-OneVision (arXiv 2408.03326): images in tiles, SigLIP without its last layer and norm, projector, Qwen2 decoder.

use super::{Family, Features, ImageOptions, ModelConfig, VisionTower};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::formats::FamilySupport;
use crate::data::anyres::{Anyres, Kept, TileLayout};
use crate::data::image::{ImagePatches, stacked_patches, stacked_shape};
use crate::data::sequence::VisionInput;
use crate::device::{Activation, ModelOps, Span};
use crate::model::config::{DecoderConfig, DecoderNames, Section};
use crate::model::decoder::Linear;
use crate::model::source::{Headers, Source, Weights};
use crate::model::vision::{Attention, Mlp, Norm, TowerBlock, TowerSizes};
use crate::tensor::Matrix;
use anyhow::{Context, Result, bail, ensure};

/// Where generations of transformers have put the decoder, and its head. The first is the hub's.
const DECODER_PLACES: [(&str, &str); 2] =
    [("language_model.model.", "language_model.lm_head.weight"), ("model.language_model.", "lm_head.weight")];
/// Where they have put the vision tower.
const TOWER_PREFIXES: [&str; 4] =
    ["vision_tower.vision_model.", "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower."];
/// Prefixes of the projector and the vector that ends a row.
const REST_PREFIXES: [&str; 2] = ["", "model."];
/// Crops that go through the tower together: 5832 tokens of the real one, 100 MB inside its MLP in float32.
const CROPS: usize = 8;

/// The LLaVA-OneVision family.
pub(super) struct LlavaOnevision;

impl<D: ModelOps> Family<D> for LlavaOnevision {
    fn model_type(&self) -> &'static str {
        "llava_onevision"
    }

    /// compressed-tensors 0.20 makes plain dicts of what modules hand to each other, and transformers 5.23 fails on those of
    /// images: `'dict' object has no attribute 'pooler_output'`. SGLang 0.5.23 has no LlavaOnevisionForConditionalGeneration.
    fn support(&self) -> FamilySupport {
        FamilySupport { must_dequantize: true, unknown_to_sglang: true }
    }

    fn config(&self, checkpoint: &Checkpoint) -> Result<ModelConfig> {
        let root = Section::root(checkpoint)?;
        let decoder = decoder_config(&root)?;
        let layers = (section(&root, "text_config")?.at("num_hidden_layers"), decoder.layers);
        let names = DecoderNames::find(checkpoint, &DECODER_PLACES, layers)?;
        Ok(ModelConfig::new(checkpoint, decoder, names, image_token(&root)?))
    }

    fn vision_input(&self, checkpoint: &Checkpoint, options: ImageOptions) -> Result<Box<dyn VisionInput>> {
        let root = Section::root(checkpoint)?;
        options.refuse_sizes(&root)?;
        let layout = tile_layout(&root)?;
        let tokens = (image_token(&root)?, video_token(&root)?);
        Ok(Box::new(Anyres::read(checkpoint.folder(), layout, options.image_mode, tokens)?))
    }

    fn vision_tower(&self, device: &D, checkpoint: &Checkpoint) -> Result<Box<dyn VisionTower<D>>> {
        Ok(Box::new(Tower::load(&Weights::new(device, checkpoint))?))
    }

    fn check_vision_tower(&self, checkpoint: &Checkpoint) -> Result<()> {
        Tower::load(&Headers(checkpoint)).map(drop)
    }
}

fn section<'a>(root: &Section<'a>, key: &str) -> Result<Section<'a>> {
    root.section(key)?.with_context(|| format!("{} is missing; get the original config.json again", root.at(key)))
}

/// Refuses a model inside this one that is not the one that this file implements.
fn only(section: &Section<'_>, key: &str, wanted: &str) -> Result<()> {
    if section.get(key).is_some() && section.text(key)? != wanted {
        bail!("{} is {:?}, not supported for llava_onevision; known is {wanted}", section.at(key), section.text(key)?);
    }
    Ok(())
}

fn decoder_config(root: &Section<'_>) -> Result<DecoderConfig> {
    let text = section(root, "text_config")?;
    only(&text, "model_type", "qwen2")?;
    // Hub files leave out what equals the defaults of transformers' Qwen2Config.
    let norm_eps = if text.get("rms_norm_eps").is_some() { text.positive("rms_norm_eps")? } else { 1e-6 };
    DecoderConfig::with_norm_eps(root, &text, norm_eps)
}

fn image_token(root: &Section<'_>) -> Result<u32> {
    root.token(spelled(root, ["image_token_id", "image_token_index"]))
}

fn video_token(root: &Section<'_>) -> Result<Option<u32>> {
    let key = spelled(root, ["video_token_id", "video_token_index"]);
    root.get(key).map(|_| root.token(key)).transpose()
}

/// transformers has spelled tokens both ways.
fn spelled(root: &Section<'_>, [new, old]: [&'static str; 2]) -> &'static str {
    if root.get(new).is_some() { new } else { old }
}

fn vision_section<'a>(root: &Section<'a>) -> Result<Section<'a>> {
    let vision = section(root, "vision_config")?;
    only(&vision, "model_type", "siglip_vision_model")?;
    Ok(vision)
}

/// Side of image and patch, and what the root says of tiles; defaults are those of transformers' configuration classes.
fn tile_layout(root: &Section<'_>) -> Result<TileLayout> {
    let vision = vision_section(root)?;
    let (side, patch) = (vision.count_or("image_size", 224)?, vision.count_or("patch_size", 16)?);
    // A tower of a real size has 27 patches in a row; counts are squared and multiplied below.
    ensure!(
        patch <= side && side / patch <= 1024 && patch <= 1024,
        "{} is {side} and {} is {patch}: an image has at least one patch and at most 1024 in a row",
        vision.at("image_size"),
        vision.at("patch_size")
    );
    let resolutions = TileLayout::resolutions(root.get("image_grid_pinpoints"), side);
    let resolutions = resolutions.with_context(|| root.at("image_grid_pinpoints"))?;
    let ratio = match root.get("vision_aspect_ratio") {
        Some(_) => root.text("vision_aspect_ratio")?,
        None => "anyres_max_9",
    };
    let most_tiles = ratio.strip_prefix("anyres_max_").and_then(|n| n.parse().ok()).filter(|n| (1..=1024).contains(n));
    let most_tiles =
        most_tiles.with_context(|| format!("{} is {ratio:?}, not anyres_max_N", root.at("vision_aspect_ratio")))?;
    let resolutions = resolutions.unwrap_or_else(TileLayout::default_resolutions);
    ensure!(
        resolutions.iter().all(|&(height, width)| height.is_multiple_of(side) && width.is_multiple_of(side)),
        "{} is missing, which means multiples of 384, but {} is {side}",
        root.at("image_grid_pinpoints"),
        vision.at("image_size")
    );
    Ok(TileLayout { side, patch, resolutions, most_tiles })
}

/// Sizes of the tower; defaults are those of transformers' configuration class.
fn sizes(vision: &Section<'_>) -> Result<TowerSizes> {
    Ok(TowerSizes {
        width: vision.count_or("hidden_size", 768)?,
        heads: vision.count_or("num_attention_heads", 12)?,
        inner: vision.count_or("intermediate_size", 3072)?,
        depth: vision.count_or("num_hidden_layers", 12)?,
    })
}

/// SigLIP, its last norm left out, and the projector.
struct Tower<T> {
    embedding: Linear<T>,
    /// Embeddings of positions, `[patches, width]`.
    positions: T,
    blocks: Vec<TowerBlock<T>>,
    projector: Mlp<T>,
    /// Ends a row of tiles' features, `[1, hidden]`.
    newline: T,
    layout: TileLayout,
}

impl<T> Tower<T> {
    fn load<S: Source<Tensor = T>>(source: &S) -> Result<Self> {
        let checkpoint = source.checkpoint();
        let root = Section::root(checkpoint)?;
        let hidden = decoder_config(&root)?.hidden;
        let layout = tile_layout(&root)?;
        refuse_other_features(&root)?;

        let vision = vision_section(&root)?;
        let TowerSizes { width, heads, inner, depth } = sizes(&vision)?;
        ensure!(
            width.is_multiple_of(heads) && (width / heads).is_multiple_of(2),
            "{} is {width}, which {heads} heads do not share in even widths",
            vision.at("hidden_size")
        );
        let activation = vision.activation_or("hidden_act", Activation::GeluTanh)?;
        let prefix = checkpoint.prefix(&TOWER_PREFIXES, "embeddings.patch_embedding.bias")?;
        let block = |i: usize| -> Result<TowerBlock<T>> {
            let at = format!("{prefix}encoder.layers.{i}");
            let fc = (format!("{at}.mlp.fc1"), format!("{at}.mlp.fc2"));
            Ok(TowerBlock {
                attention_norm: Norm::layer(source, &format!("{at}.layer_norm1"), width)?,
                attention: Attention::separate(source, &format!("{at}.self_attn"), width, heads)?,
                mlp_norm: Norm::layer(source, &format!("{at}.layer_norm2"), width)?,
                mlp: Mlp::plain(source, (&fc.0, &fc.1), [width, inner, width], activation)?,
            })
        };
        let embedding = format!("{prefix}embeddings.patch_embedding");
        let values = vision.count_or("num_channels", 3)? * layout.patch * layout.patch;
        let table = format!("{prefix}embeddings.position_embedding.weight");
        let rest = checkpoint.prefix(&REST_PREFIXES, "image_newline")?;
        let linears = [1, 2].map(|n| format!("{rest}multi_modal_projector.linear_{n}"));
        let activation = root.activation_or("projector_hidden_act", Activation::Gelu)?;
        Ok(Self {
            embedding: Linear::load(source, &embedding, (width, values), true)?,
            positions: source.matrix(&table, layout.grid().pow(2), width)?,
            blocks: (0..depth).map(block).collect::<Result<_>>()?,
            projector: Mlp::plain(source, (&linears[0], &linears[1]), [width, hidden, hidden], activation)?,
            newline: source.vector(&format!("{rest}image_newline"), hidden)?,
            layout,
        })
    }

    /// Features of some crops, `[crops · patches, hidden]`.
    fn features<D: ModelOps<Tensor = T>>(&self, device: &D, crops: &[Crop<'_>]) -> Result<T> {
        let patches = self.layout.grid().pow(2);
        let pixels = crops.iter().map(|crop| (crop.image, crop.index));
        let pixels = device.upload_model_with(stacked_shape(pixels.clone()), || Ok(stacked_patches(pixels)))?;
        let mut x = self.embedding.apply(device, &pixels)?;
        drop(pixels);
        let places: Vec<u32> = (0..crops.len()).flat_map(|_| 0..patches as u32).collect();
        device.add_assign(&mut x, &device.gather_rows(&self.positions, &places)?)?;
        let spans: Vec<Span> = (0..crops.len()).map(|i| Span::own(i * patches..(i + 1) * patches)).collect();
        for block in &self.blocks {
            block.apply(device, &mut x, None, &spans)?;
        }
        self.projector.apply(device, x)
    }

    /// Rows that all are the vector that ends a row of features.
    fn newlines<D: ModelOps<Tensor = T>>(&self, device: &D, rows: usize) -> Result<T> {
        device.gather_rows(&self.newline, &vec![0; rows])
    }
}

/// One crop of an image.
struct Crop<'a> {
    image: &'a ImagePatches,
    index: usize,
    /// The image's first token.
    start: usize,
}

impl Crop<'_> {
    /// For each patch that is kept, its number and its feature's row: among all tokens or, of tiles that are reduced, in the
    /// grid of them. `side` is that of a crop's grid.
    fn places(&self, side: usize) -> Vec<(usize, usize)> {
        let patches = (0..side).flat_map(|row| (0..side).map(move |column| (row, column))).enumerate();
        let Some((tile, tiles)) = self.index.checked_sub(1).zip(self.image.tiles.as_ref()) else {
            return patches.map(|(patch, _)| (patch, self.start + patch)).collect();
        };
        let kept = &tiles.kept;
        let corner = (tile / tiles.columns * side, tile % tiles.columns * side);
        let (start, stride) = match kept.reduced {
            Some(_) => (0, kept.columns.len()),
            // One token more ends each row.
            None => (self.start + side * side, kept.columns.len() + 1),
        };
        let place = |(patch, (row, column)): (usize, (usize, usize))| {
            let (row, column) = (corner.0 + row, corner.1 + column);
            let inside = kept.rows.contains(&row) && kept.columns.contains(&column);
            inside.then(|| (patch, start + (row - kept.rows.start) * stride + column - kept.columns.start))
        };
        patches.filter_map(place).collect()
    }

    /// How its image's tiles are reduced, if it is one of them.
    fn reduced(&self) -> Option<&Kept> {
        let tiles = self.image.tiles.as_ref().filter(|_| self.index > 0)?;
        Some(&tiles.kept).filter(|kept| kept.reduced.is_some())
    }

    fn is_last(&self) -> bool {
        self.index + 1 == self.image.crops().len()
    }
}

/// Features that are not the output of the tower's last layer, of all patches, are not implemented.
fn refuse_other_features(root: &Section<'_>) -> Result<()> {
    only(root, "vision_feature_select_strategy", "full")?;
    if let Some(layer) = root.get("vision_feature_layer").filter(|layer| layer.as_i64() != Some(-1)) {
        bail!("{} is {layer}, not supported for llava_onevision; known is -1", root.at("vision_feature_layer"));
    }
    ensure!(
        root.flag_or("multimodal_projector_bias", true)?,
        "{} is false; a projector without biases is not supported for llava_onevision",
        root.at("multimodal_projector_bias")
    );
    let vision = vision_section(root)?;
    if let Some(eps) = vision.get("layer_norm_eps").filter(|eps| eps.as_f64() != Some(1e-6)) {
        bail!("{} is {eps}, not supported for llava_onevision; known is 1e-6", vision.at("layer_norm_eps"));
    }
    Ok(())
}

impl<D: ModelOps> VisionTower<D> for Tower<D::Tensor> {
    /// A few crops are encoded at a time and their features put in their places at once, so that of the tower's output no
    /// more is held, however large or many the images are; tiles that are reduced wait for the last of their image.
    fn encode(&self, device: &D, images: &[&ImagePatches]) -> Result<Features<D::Tensor>> {
        let (side, mut total) = (self.layout.grid(), 0);
        let mut crops = Vec::new();
        for &image in images {
            crops.extend((0..image.crops().len()).map(|index| Crop { image, index, start: total }));
            total += self.layout.tokens(image);
        }
        ensure!(total > 0, "no images to encode");
        // Every token ends a row until a feature takes its place.
        let mut tokens = self.newlines(device, total)?;
        let mut grid = None;
        for batch in crops.chunks(CROPS) {
            let features = self.features(device, batch)?;
            for (i, crop) in batch.iter().enumerate() {
                let places = crop.places(side);
                let from: Vec<u32> = places.iter().map(|(patch, _)| (i * side * side + patch) as u32).collect();
                let to: Vec<u32> = places.iter().map(|&(_, row)| row as u32).collect();
                let kept = (!from.is_empty()).then(|| device.gather_rows(&features, &from)).transpose()?;
                let Some(reduced) = crop.reduced() else {
                    kept.map_or(Ok(()), |kept| device.scatter_rows(&mut tokens, &to, &kept))?;
                    continue;
                };
                let mut joined = grid.take().map_or_else(|| self.newlines(device, reduced.joined()), Ok)?;
                kept.map_or(Ok(()), |kept| device.scatter_rows(&mut joined, &to, &kept))?;
                if !crop.is_last() {
                    grid = Some(joined);
                    continue;
                }
                let (high, wide) = reduced.size();
                let row = |row: usize| (0..wide).map(move |column| row * (wide + 1) + column);
                let start = crop.start + side * side;
                let to: Vec<u32> = (0..high).flat_map(row).map(|place| (start + place) as u32).collect();
                device.scatter_rows(&mut tokens, &to, &reduce(device, joined, reduced)?)?;
            }
        }
        Ok(Features::plain(tokens))
    }
}

/// Bilinear reduction of a grid of features, one row a cell: along its columns, then, transposed, along its rows.
fn reduce<D: ModelOps>(device: &D, x: D::Tensor, kept: &Kept) -> Result<D::Tensor> {
    let (high, wide) = (kept.rows.len(), kept.columns.len());
    let (new_high, new_wide) = kept.size();
    let (_, width) = device.shape(&x);
    let along = |x: D::Tensor, from: usize, to: usize, others: usize| -> Result<D::Tensor> {
        let weights = device.upload_model_with((to, from), || Ok(bilinear(from, to)))?;
        let x = device.matmul(&weights, &device.reshape(x, from, others * width)?)?;
        // Transposed, for the other direction or back.
        let order: Vec<u32> = (0..others).flat_map(|j| (0..to).map(move |i| (i * others + j) as u32)).collect();
        device.gather_rows(&device.reshape(x, to * others, width)?, &order)
    };
    let x = along(x, high, new_high, wide)?;
    along(x, wide, new_wide, new_high)
}

/// Weights `[to, from]` of linear interpolation between the centres of cells, as PyTorch's `interpolate` has them without
/// `align_corners`: two for each row, however much is left out between.
fn bilinear(from: usize, to: usize) -> Matrix {
    let mut weights = Matrix::zeros(to, from);
    for i in 0..to {
        let at = ((i as f64 + 0.5) * from as f64 / to as f64 - 0.5).max(0.0);
        let (low, part) = (at as usize, at.fract() as f32);
        let row = weights.row_mut(i);
        row[low] += 1.0 - part;
        row[(low + 1).min(from - 1)] += part;
    }
    weights
}
