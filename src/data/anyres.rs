//! Tiles: LLaVA-OneVision's way to show a tower of one fixed size a large image (arXiv 2408.03326, section 3.2).
//!
//! The whole image, squeezed into the tower's square, comes first. Behind it comes the image again, at the best of a list
//! of resolutions, cut into squares. Behind the tower the tiles' features are one large grid again: what only shows padding
//! is cut off, what is left is reduced when there is too much of it, and a learned vector ends each of its rows.

use super::image::{ImagePatches, MAX_PIXELS};
use super::patches::{PatchSettings, count, image_processor, read_json, refuse_extreme_aspect};
use super::sequence::VisionInput;
pub use super::tiles::{Kept, Tiles};
use super::view::View;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use vlmq_picture::{Rgb, RgbImage, imageops, resize};

/// Above this many times what fits, features are reduced (`pack_image_features` in transformers).
const REDUCE_ABOVE: f64 = 1.1;

/// Most resolutions that a list may have; LLaVA-OneVision's has 36.
const MAX_RESOLUTIONS: usize = 4096;

/// What the model's config.json says of tiles.
#[derive(Clone, Debug, PartialEq)]
pub struct TileLayout {
    /// Side of the tower's square image, in pixels.
    pub side: usize,
    /// Side of a patch, in pixels.
    pub patch: usize,
    /// `(height, width)` of the resolutions to choose from, in pixels.
    pub resolutions: Vec<(usize, usize)>,
    /// How many tiles' worth of features an image may keep, the `9` of `anyres_max_9`.
    pub most_tiles: usize,
}

impl TileLayout {
    /// The resolutions of LLaVA-OneVision where a file names none: every multiple of 384 up to 2304 in both directions.
    pub fn default_resolutions() -> Vec<(usize, usize)> {
        let sides = || (1..=6).map(|n| n * 384);
        sides().flat_map(|height| sides().map(move |width| (height, width))).collect()
    }

    /// Reads a list of `[height, width]`, `None` where there is none. Errors where one is no multiple of `side`.
    pub fn resolutions(list: Option<&Value>, side: usize) -> Result<Option<Vec<(usize, usize)>>> {
        let Some(list) = list.filter(|list| !list.is_null()) else { return Ok(None) };
        let pair = |value: &Value| -> Option<(usize, usize)> {
            let [height, width] = value.as_array()?.as_slice() else { return None };
            Some((usize::try_from(height.as_u64()?).ok()?, usize::try_from(width.as_u64()?).ok()?))
        };
        let list = list.as_array().filter(|list| !list.is_empty() && list.len() <= MAX_RESOLUTIONS);
        let list = list.with_context(|| format!("is not a list of 1 to {MAX_RESOLUTIONS} pairs [height, width]"))?;
        let read = |value: &Value| {
            let fits = |&(height, width): &(usize, usize)| {
                [height, width].into_iter().all(|n| n > 0 && n.is_multiple_of(side))
                    && (height as u64).checked_mul(width as u64).is_some_and(|pixels| pixels <= MAX_PIXELS)
            };
            pair(value).filter(fits).with_context(|| {
                format!("holds {value}, not [height, width] in multiples of {side} and at most {MAX_PIXELS} pixels")
            })
        };
        list.iter().map(read).collect::<Result<_>>().map(Some)
    }

    /// Patches along a side of a tile: what does not fill one is left out.
    pub fn grid(&self) -> usize {
        self.side / self.patch
    }

    /// The resolution that keeps most of an image's pixels; of several the one that leaves least space unused, of those the
    /// first (transformers' `select_best_resolution`).
    pub fn best_resolution(&self, height: usize, width: usize) -> (usize, usize) {
        let rank = |&(high, wide): &(usize, usize)| {
            let scale = (wide as f64 / width as f64).min(high as f64 / height as f64);
            let inside = (width as f64 * scale) as usize * (height as f64 * scale) as usize;
            let kept = inside.min(width * height);
            (kept, std::cmp::Reverse(high * wide - kept))
        };
        // `max_by_key` would take the last of equals.
        let best = self.resolutions.iter().rev().max_by_key(|resolution| rank(resolution));
        *best.expect("the list is not empty")
    }

    /// What is left of the features of `tiles` (rows, columns) of an image of `original` (height, width) pixels.
    ///
    /// transformers' `unpad_image` and `pack_image_features`, with Python's rounding. Of a very long or narrow image no row or
    /// no column may be left, which is as there; errors where it is the reduction that leaves none.
    pub fn kept(&self, original: (usize, usize), tiles: (usize, usize)) -> Result<Kept> {
        let (height, width) = original;
        let (high, wide) = (tiles.0 * self.grid(), tiles.1 * self.grid());
        let (mut rows, mut columns) = (0..high, 0..wide);
        if width as f64 / height as f64 > wide as f64 / high as f64 {
            let padding = (high - python_whole(height as f64 * (wide as f64 / width as f64)).min(high)) / 2;
            rows = padding..high - padding;
        } else {
            let padding = (wide - python_whole(width as f64 * (high as f64 / height as f64)).min(wide)) / 2;
            columns = padding..wide - padding;
        }
        let most = self.most_tiles * self.grid() * self.grid();
        let ratio = ((rows.len() * columns.len()) as f64 / most as f64).sqrt();
        let reduced =
            (ratio > REDUCE_ABOVE).then(|| (floor_quotient(rows.len(), ratio), floor_quotient(columns.len(), ratio)));
        ensure!(
            reduced.is_none_or(|(high, wide)| high > 0 && wide > 0),
            "is {width}x{height}: so long and narrow that nothing is left once its features are reduced; crop it"
        );
        Ok(Kept { rows, columns, reduced })
    }

    /// Tokens of an image: those of all of it, then those of its tiles, or the one vector that ends a row.
    pub fn tokens(&self, image: &ImagePatches) -> usize {
        self.grid().pow(2) + image.tiles.as_ref().map_or(1, |tiles| tiles.kept.tokens())
    }
}

/// `int(round(x, 7))` as Python computes it: rounded to the nearest decimal of 7 places, then cut.
fn python_whole(x: f64) -> usize {
    format!("{x:.7}").parse::<f64>().expect("a number that was just written") as usize
}

/// `int(n // ratio)` as Python computes it: from the exact remainder, not from the rounded quotient.
fn floor_quotient(n: usize, ratio: f64) -> usize {
    let n = n as f64;
    ((n - n % ratio) / ratio).round() as usize
}

/// How a family that cuts images into tiles takes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageMode {
    /// The whole image and tiles of it at a higher resolution (LLaVA-OneVision, arXiv 2408.03326, section 3.2).
    Anyres,
    /// The whole image only, padded to a square.
    Single,
}

/// [`VisionInput`] of LLaVA-OneVision.
#[derive(Clone, Debug)]
pub struct Anyres {
    layout: TileLayout,
    patches: Arc<PatchSettings>,
    background: Rgb<u8>,
    mode: Option<ImageMode>,
    image_token_id: u32,
    video_token_id: Option<u32>,
}

impl Anyres {
    /// Reads a checkpoint folder's image processor, which must agree with `layout`. With no `mode` an image is cut into
    /// tiles where it is the only one of its sample, as the model was trained. The tokens are those of config.json that stand
    /// for a vector of the vision tower, and for a video.
    ///
    /// Errors, naming file and key, when there is no such file, on values that this processor does not implement, and where
    /// the model expects other images.
    pub fn read(
        folder: &Path,
        layout: TileLayout,
        mode: Option<ImageMode>,
        (image_token_id, video_token_id): (u32, Option<u32>),
    ) -> Result<Self> {
        let (path, config) = image_processor(folder)?;
        let patches = Self::settings(&config, &layout).with_context(|| path.display().to_string())?;
        if let Some(processor) = read_json(folder, "processor_config.json")? {
            check_processor(&processor, &layout)
                .with_context(|| folder.join("processor_config.json").display().to_string())?;
        }
        // Cut like Python's int(), and in float64 as there: 0.5 gives 127.
        let background = Rgb(patches.mean.map(|mean| (f64::from(mean) * 255.0) as u8));
        Ok(Self { layout, patches: Arc::new(patches), background, mode, image_token_id, video_token_id })
    }

    fn settings(config: &Value, layout: &TileLayout) -> Result<PatchSettings> {
        let side = layout.side;
        for key in ["size", "crop_size"] {
            let Some(size) = config.get(key).filter(|size| !size.is_null()) else { continue };
            let edge = count(size, "shortest_edge")?;
            let sides = [count(size, "height")?.or(edge), count(size, "width")?.or(edge)];
            ensure!(
                sides == [Some(side); 2],
                "`{key}` is {size}, but vision_config.image_size of config.json is {side}; take both files from the same \
                 checkpoint"
            );
        }
        if config.get("size").is_none_or(Value::is_null) && side != 384 {
            bail!("`size` is missing, which means 384 by 384, but vision_config.image_size of config.json is {side}");
        }
        let resolutions = TileLayout::resolutions(config.get("image_grid_pinpoints"), side);
        let resolutions =
            resolutions.context("`image_grid_pinpoints`")?.unwrap_or_else(TileLayout::default_resolutions);
        ensure!(
            resolutions == layout.resolutions,
            "`image_grid_pinpoints` is not that of config.json; take both files from the same checkpoint"
        );
        // A center crop of `crop_size` takes nothing away from an image of that size, and `do_pad` adds tiles of zeros to
        // those of a batch, which the model takes off again.
        for key in ["do_center_crop", "do_pad"] {
            if let Some(value) = config.get(key).filter(|value| !value.is_null() && !value.is_boolean()) {
                bail!("`{key}` is {value}, not true or false");
            }
        }
        let read = PatchSettings::from_config(config)?;
        Ok(PatchSettings { patch_size: layout.patch, merge_size: 1, temporal_patch_size: 1, ..read })
    }

    /// The whole image and tiles of the best resolution, row by row.
    fn tiled(&self, image: &RgbImage) -> Result<ImagePatches> {
        let (height, width) = (image.height() as usize, image.width() as usize);
        let side = self.layout.side;
        let (high, wide) = self.layout.best_resolution(height, width);
        let (rows, columns) = (high / side, wide / side);
        let kept = self.layout.kept((height, width), (rows, columns))?;
        let (new_high, new_wide) = fit((height, width), (high, wide));
        let resized = resize(image, new_wide as u32, new_high as u32)?;
        let padded = padded(&resized, (high, wide), Rgb([0; 3]));
        let mut crops = vec![resize(image, side as u32, side as u32)?];
        crops.extend((0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))).map(|(row, column)| {
            let (x, y) = ((column * side) as u32, (row * side) as u32);
            imageops::crop_imm(&padded, x, y, side as u32, side as u32).to_image()
        }));
        Ok(ImagePatches::tiled(image, crops, Tiles { rows, columns, kept }, Arc::clone(&self.patches)))
    }

    /// The whole image in the middle of a square.
    fn single(&self, image: &RgbImage) -> Result<ImagePatches> {
        let (width, height) = image.dimensions();
        let square = width.max(height);
        ensure!(
            u64::from(square).pow(2) <= MAX_PIXELS,
            "is {width}x{height}: padded to a square it has more than {MAX_PIXELS} pixels, scale it down"
        );
        let padded = padded(image, (square as usize, square as usize), self.background);
        let side = self.layout.side as u32;
        Ok(ImagePatches::whole(image, resize(&padded, side, side)?, Arc::clone(&self.patches)))
    }
}

/// `processor_config.json` repeats what the number of tokens depends on.
fn check_processor(processor: &Value, layout: &TileLayout) -> Result<()> {
    let tokens = layout.grid().pow(2);
    for (key, wanted) in [
        ("num_image_tokens", Value::from(tokens)),
        ("vision_feature_select_strategy", Value::from("full")),
        ("vision_aspect_ratio", Value::from(format!("anyres_max_{}", layout.most_tiles))),
    ] {
        if let Some(value) = processor.get(key).filter(|value| !value.is_null() && **value != wanted) {
            bail!("`{key}` is {value}, but config.json asks for {wanted}; take both files from the same checkpoint");
        }
    }
    Ok(())
}

/// (height, width) of an image enlarged or reduced to fit into `into`, its proportions kept.
fn fit((height, width): (usize, usize), into: (usize, usize)) -> (usize, usize) {
    let (high, wide) = (into.0 as f64 / height as f64, into.1 as f64 / width as f64);
    if wide < high {
        (((height as f64 * wide).ceil() as usize).min(into.0), into.1)
    } else {
        (into.0, ((width as f64 * high).ceil() as usize).min(into.1))
    }
}

/// `image` in the middle of a larger one; of an odd number of rows or columns to add, the bottom or the right gets more.
fn padded(image: &RgbImage, (height, width): (usize, usize), color: Rgb<u8>) -> RgbImage {
    let mut out = RgbImage::from_pixel(width as u32, height as u32, color);
    let (x, y) = ((width as u32 - image.width()) / 2, (height as u32 - image.height()) / 2);
    imageops::replace(&mut out, image, i64::from(x), i64::from(y));
    out
}

impl VisionInput for Anyres {
    fn image_token_id(&self) -> u32 {
        self.image_token_id
    }

    fn video_token_id(&self) -> Option<u32> {
        self.video_token_id
    }

    fn image_markup(&self) -> (&'static str, &'static str) {
        ("", "\n")
    }

    fn prepare(&self, image: &RgbImage, of: usize) -> Result<ImagePatches> {
        refuse_extreme_aspect(image.height() as usize, image.width() as usize)?;
        let tiles = match self.mode {
            Some(mode) => mode == ImageMode::Anyres,
            None => of == 1,
        };
        if tiles { self.tiled(image) } else { self.single(image) }
    }

    fn image_tokens(&self, patches: &ImagePatches) -> usize {
        self.layout.tokens(patches)
    }

    /// The whole image; then, as one picture, what is left of the tiles once padding is cut off.
    fn views(&self, patches: &ImagePatches) -> Vec<View> {
        let whole = View::of_first_crop(patches);
        let Some(Tiles { rows, columns, kept }) = &patches.tiles else { return vec![whole] };
        let (grid, patch) = (self.layout.grid(), self.layout.patch);
        let side = (grid * patch) as u32;
        let mut joined = RgbImage::new(*columns as u32 * side, *rows as u32 * side);
        for (i, tile) in patches.crops()[1..].iter().enumerate() {
            let covered = imageops::crop_imm(tile, 0, 0, side, side).to_image();
            let (row, column) = (i / columns, i % columns);
            imageops::replace(&mut joined, &covered, (column as u32 * side).into(), (row as u32 * side).into());
        }
        let pixels = |patches: usize| (patches * patch) as u32;
        let (left, top) = (pixels(kept.columns.start), pixels(kept.rows.start));
        let (width, height) = (pixels(kept.columns.len()), pixels(kept.rows.len()));
        let picture = imageops::crop_imm(&joined, left, top, width, height).to_image();
        let (rows, columns) = kept.size();
        vec![whole, View { picture, rows, columns, row_ends: true }]
    }

    fn positions(&self, tokens: &[u32], _: &[ImagePatches]) -> Result<Vec<[u32; 3]>> {
        Ok((0..tokens.len() as u32).map(|position| [position; 3]).collect())
    }
}
