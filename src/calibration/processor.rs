//! The image processor of the Qwen vision towers: size, resampling, normalisation, patches.

use super::image::ImagePatches;
use crate::tensor::Matrix;
use anyhow::{Context, Result, bail, ensure};
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// How an image becomes patches; `preprocessor_config.json`, or `image_processor` in `processor_config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct PatchSettings {
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Side, in patches, of the square that becomes one token.
    pub merge_size: usize,
    /// Frames of a patch; a still image is repeated.
    pub temporal_patch_size: usize,
    /// Fewest pixels of a resized image.
    pub min_pixels: usize,
    /// Most pixels of a resized image.
    pub max_pixels: usize,
    /// Factor from a pixel's byte to what `mean` and `std` are in; 1/255.
    pub rescale_factor: f64,
    /// Mean of each channel.
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
}

impl Default for PatchSettings {
    /// What transformers' `Qwen2VLImageProcessor` assumes for keys that a file leaves out.
    #[expect(clippy::excessive_precision, reason = "the digits under which these constants are known")]
    fn default() -> Self {
        Self {
            patch_size: 14,
            merge_size: 2,
            temporal_patch_size: 2,
            min_pixels: 56 * 56,
            max_pixels: 28 * 28 * 1280,
            rescale_factor: 1.0 / 255.0,
            mean: [0.48145466, 0.4578275, 0.40821073],
            std: [0.26862954, 0.26130258, 0.27577711],
        }
    }
}

impl PatchSettings {
    /// Reads a checkpoint folder's image processor. `min_pixels` and `max_pixels` replace the file's where given.
    ///
    /// `processor_config.json` wins when it holds an `image_processor`, as in transformers. Size limits may stand at the
    /// root (`min_pixels`, which win), in `size`, or in `size` as `shortest_edge` and `longest_edge`. Errors when there
    /// is neither file, and on values that this processor does not implement.
    pub fn read(folder: &Path, min_pixels: Option<usize>, max_pixels: Option<usize>) -> Result<Self> {
        let nested = folder.join("processor_config.json");
        let plain = folder.join("preprocessor_config.json");
        let (path, config) = match read_json(&nested)?.and_then(|mut all| {
            let inner = all.get_mut("image_processor").map(Value::take);
            inner.filter(Value::is_object)
        }) {
            Some(inner) => (nested, inner),
            None => {
                let config = read_json(&plain)?.with_context(|| {
                    format!(
                        "{} has neither preprocessor_config.json nor processor_config.json with an image_processor; \
                         copy them from the original checkpoint",
                        folder.display()
                    )
                })?;
                (plain, config)
            }
        };
        let mut settings = Self::from_config(&config).with_context(|| path.display().to_string())?;
        settings.min_pixels = min_pixels.unwrap_or(settings.min_pixels);
        settings.max_pixels = max_pixels.unwrap_or(settings.max_pixels);
        settings.validate().with_context(|| match (min_pixels, max_pixels) {
            (None, None) => path.display().to_string(),
            _ => format!("{} with --min-pixels and --max-pixels as given", path.display()),
        })?;
        Ok(settings)
    }

    fn from_config(config: &Value) -> Result<Self> {
        let default = Self::default();
        for (key, wanted) in [
            ("do_resize", Value::Bool(true)),
            ("do_rescale", Value::Bool(true)),
            ("do_normalize", Value::Bool(true)),
            // PIL's number for bicubic.
            ("resample", Value::from(3)),
        ] {
            if let Some(value) = config.get(key).filter(|value| !value.is_null() && **value != wanted) {
                bail!("`{key}` is {value}; only {wanted} is implemented");
            }
        }
        let limit = |root: &str, edge: &str, fallback: usize| -> Result<usize> {
            let size = config.get("size").unwrap_or(&Value::Null);
            for (object, key) in [(config, root), (size, root), (size, edge)] {
                if let Some(value) = count(object, key)? {
                    return Ok(value);
                }
            }
            Ok(fallback)
        };
        Ok(Self {
            patch_size: count(config, "patch_size")?.unwrap_or(default.patch_size),
            merge_size: count(config, "merge_size")?.unwrap_or(default.merge_size),
            temporal_patch_size: count(config, "temporal_patch_size")?.unwrap_or(default.temporal_patch_size),
            min_pixels: limit("min_pixels", "shortest_edge", default.min_pixels)?,
            max_pixels: limit("max_pixels", "longest_edge", default.max_pixels)?,
            rescale_factor: match config.get("rescale_factor").filter(|value| !value.is_null()) {
                None => default.rescale_factor,
                Some(value) => value.as_f64().with_context(|| format!("`rescale_factor` is {value}, not a number"))?,
            },
            mean: channels(config, "image_mean")?.unwrap_or(default.mean),
            std: channels(config, "image_std")?.unwrap_or(default.std),
        })
    }

    fn validate(&self) -> Result<()> {
        for (key, value) in [
            ("patch_size", self.patch_size),
            ("merge_size", self.merge_size),
            ("temporal_patch_size", self.temporal_patch_size),
        ] {
            ensure!((1..=64).contains(&value), "`{key}` is {value}; expected 1 to 64");
        }
        let (min, max) = (self.min_pixels, self.max_pixels);
        ensure!(min > 0 && min <= max, "at least {min} and at most {max} pixels: no image can be both");
        ensure!(
            max as u64 <= super::image::MAX_PIXELS,
            "max_pixels {max} is above {}, the most an image may have",
            super::image::MAX_PIXELS
        );
        let factor = self.rescale_factor;
        ensure!(factor.is_finite() && factor > 0.0, "`rescale_factor` is {factor}; expected a positive number");
        ensure!(self.mean.iter().all(|mean| mean.is_finite()), "`image_mean` is not finite");
        ensure!(self.std.iter().all(|std| *std > 0.0 && std.is_finite()), "`image_std` must be positive");
        Ok(())
    }

    /// `(height, width)` to which an image of `height` x `width` pixels is resized: multiples of a merged cell's side,
    /// `min_pixels` to `max_pixels` in all, the proportions kept as closely as that allows.
    ///
    /// Qwen2-VL's `smart_resize`, to the bit: halves round to even, as Python rounds. Errors when one side is more than
    /// 200 times the other.
    pub fn smart_resize(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        let factor = (self.patch_size * self.merge_size) as f64;
        let (high, wide) = (height as f64, width as f64);
        let aspect = high.max(wide) / high.min(wide);
        ensure!(aspect <= 200.0, "is {width}x{height}: one side is more than 200 times the other; crop it");
        let near = |side: f64| (side / factor).round_ties_even() * factor;
        let pixels = near(high) * near(wide);
        let (min, max) = (self.min_pixels as f64, self.max_pixels as f64);
        let (new_high, new_wide) = if pixels > max {
            let shrink = (high * wide / max).sqrt();
            let down = |side: f64| ((side / shrink / factor).floor() * factor).max(factor);
            (down(high), down(wide))
        } else if pixels < min {
            let grow = (min / (high * wide)).sqrt();
            let up = |side: f64| (side * grow / factor).ceil() * factor;
            (up(high), up(wide))
        } else {
            (near(high), near(wide))
        };
        Ok((new_high as usize, new_wide as usize))
    }

    /// Resizes an image for [`ImagePatches`]. Errors as [`Self::smart_resize`].
    pub fn prepare(self: &Arc<Self>, image: &RgbImage) -> Result<ImagePatches> {
        let (height, width) = self.smart_resize(image.height() as usize, image.width() as usize)?;
        Ok(ImagePatches {
            grid_height: height / self.patch_size,
            grid_width: width / self.patch_size,
            pixels: resize(image, width as u32, height as u32)?,
            settings: Arc::clone(self),
        })
    }

    /// Normalises and cuts an image whose sides are multiples of a merged cell's; layout as in [`ImagePatches::patches`].
    pub(super) fn patchify(&self, image: &RgbImage) -> Matrix {
        let (patch, merge, frames) = (self.patch_size, self.merge_size, self.temporal_patch_size);
        let (rows, columns) = (image.height() as usize / patch, image.width() as usize / patch);
        // Torchvision folds the rescaling into mean and deviation, in float32; so do we, to agree to the last bit.
        let scale = (1.0 / self.rescale_factor) as f32;
        let value =
            |channel: usize, byte: u8| (f32::from(byte) - self.mean[channel] * scale) / (self.std[channel] * scale);
        let table: [[f32; 256]; 3] = std::array::from_fn(|c| std::array::from_fn(|byte| value(c, byte as u8)));
        let bytes = image.as_raw();
        let stride = image.width() as usize * 3;
        let mut data = Vec::with_capacity(rows * columns * 3 * frames * patch * patch);
        for cell_y in (0..rows).step_by(merge) {
            for cell_x in (0..columns).step_by(merge) {
                for row in cell_y..cell_y + merge {
                    for column in cell_x..cell_x + merge {
                        for (channel, table) in table.iter().enumerate() {
                            let frame = data.len();
                            for y in row * patch..(row + 1) * patch {
                                let start = y * stride + column * patch * 3 + channel;
                                let line = bytes[start..].iter().step_by(3).take(patch);
                                data.extend(line.map(|&byte| table[usize::from(byte)]));
                            }
                            for _ in 1..frames {
                                data.extend_from_within(frame..frame + patch * patch);
                            }
                        }
                    }
                }
            }
        }
        Matrix::new(rows * columns, 3 * frames * patch * patch, data).expect("the loops visit every pixel once")
    }
}

/// Antialiased bicubic, byte to byte. The width first, then the height, each rounded to bytes: so torchvision does it, and
/// in one call fast_image_resize would go through the axes the other way round.
fn resize(image: &RgbImage, width: u32, height: u32) -> Result<RgbImage> {
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom)).use_alpha(false);
    let mut resizer = Resizer::new();
    let source = ImageRef::new(image.width(), image.height(), image.as_raw(), PixelType::U8x3)?;
    let mut wide = Image::new(width, image.height(), PixelType::U8x3);
    resizer.resize(&source, &mut wide, &options).context("cannot be resized")?;
    let mut both = Image::new(width, height, PixelType::U8x3);
    resizer.resize(&wide, &mut both, &options).context("cannot be resized")?;
    RgbImage::from_raw(width, height, both.into_vec()).context("cannot be resized")
}

/// The JSON object in a file, `None` when there is no such file.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let value: Value = serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    ensure!(value.is_object(), "{} is not a JSON object", path.display());
    Ok(Some(value))
}

fn count(object: &Value, key: &str) -> Result<Option<usize>> {
    let Some(value) = object.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
    let number = value.as_u64().filter(|&number| number > 0 && number <= u64::from(u32::MAX));
    Ok(Some(number.with_context(|| format!("`{key}` is {value}; expected a positive integer"))? as usize))
}

fn channels(object: &Value, key: &str) -> Result<Option<[f32; 3]>> {
    let Some(value) = object.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
    let numbers: Option<Vec<f32>> =
        value.as_array().and_then(|all| all.iter().map(|one| one.as_f64().map(|one| one as f32)).collect());
    let three = numbers.and_then(|numbers| numbers.try_into().ok());
    Ok(Some(three.with_context(|| format!("`{key}` is {value}; expected three numbers"))?))
}
