//! Patches: normalised squares of pixels, which are what a vision tower takes of an image.

use crate::input;
use crate::parallel::each_chunk;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use vlmq_picture::RgbImage;

/// How pixels become patches.
#[derive(Clone, Debug, PartialEq)]
pub struct PatchSettings {
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Side, in patches, of the square whose patches stand together: what the tower merges to one token; 1 where it merges
    /// none.
    pub merge_size: usize,
    /// Frames of a patch; a still image is repeated.
    pub temporal_patch_size: usize,
    /// Factor from a pixel's byte to what `mean` and `std` are in; 1/255.
    pub rescale_factor: f64,
    /// Mean of each channel.
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
}

impl PatchSettings {
    /// What OpenAI's CLIP was trained with, and transformers' image processors assume.
    const CLIP_MEAN: [f32; 3] = [0.48145466, 0.4578275, 0.40821073];
    #[expect(clippy::excessive_precision, reason = "the digits under which these constants are known")]
    const CLIP_STD: [f32; 3] = [0.26862954, 0.26130258, 0.27577711];

    /// Reads the keys of an image processor; what it leaves out is as in transformers' Qwen2-VL processor: patches of 14
    /// pixels and 2 frames, merged 2 by 2, normalised as CLIP. Errors on values that this program does not implement.
    pub(super) fn from_config(config: &Value) -> Result<Self> {
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
        let settings = Self {
            patch_size: count(config, "patch_size")?.unwrap_or(14),
            merge_size: count(config, "merge_size")?.unwrap_or(2),
            temporal_patch_size: count(config, "temporal_patch_size")?.unwrap_or(2),
            rescale_factor: match config.get("rescale_factor").filter(|value| !value.is_null()) {
                None => 1.0 / 255.0,
                Some(value) => value.as_f64().with_context(|| format!("`rescale_factor` is {value}, not a number"))?,
            },
            mean: channels(config, "image_mean")?.unwrap_or(Self::CLIP_MEAN),
            std: channels(config, "image_std")?.unwrap_or(Self::CLIP_STD),
        };
        settings.validate()?;
        Ok(settings)
    }

    fn validate(&self) -> Result<()> {
        // Every model's patches have 2 frames; each costs an image's pixels in float32 once more.
        for (key, value, most) in [
            ("patch_size", self.patch_size, 64),
            ("merge_size", self.merge_size, 64),
            ("temporal_patch_size", self.temporal_patch_size, 4),
        ] {
            ensure!((1..=most).contains(&value), "`{key}` is {value}; expected 1 to {most}");
        }
        let factor = self.rescale_factor;
        ensure!(factor.is_finite() && factor > 0.0, "`rescale_factor` is {factor}; expected a positive number");
        ensure!(self.mean.iter().all(|mean| mean.is_finite()), "`image_mean` is not finite");
        ensure!(self.std.iter().all(|std| *std > 0.0 && std.is_finite()), "`image_std` must be positive");
        Ok(())
    }

    /// Normalises an image, cuts it into patches and appends them to `data`, [`patch_values`](Self::patch_values) each. What
    /// does not fill a patch at the right and the bottom is left out, as a convolution with that stride does.
    ///
    /// Rows go through the merged grid row by row, and inside each merged square row by row. A row holds channels, frames,
    /// then the patch's pixels row by row.
    pub(super) fn patchify(&self, image: &RgbImage, data: &mut Vec<f32>) {
        let (patch, merge, frames) = (self.patch_size, self.merge_size, self.temporal_patch_size);
        let (rows, columns) = (image.height() as usize / patch, image.width() as usize / patch);
        // Torchvision folds the rescaling into mean and deviation, in float32; so do we, to agree to the last bit.
        let scale = (1.0 / self.rescale_factor) as f32;
        let value =
            |channel: usize, byte: u8| (f32::from(byte) - self.mean[channel] * scale) / (self.std[channel] * scale);
        let table: [[f32; 256]; 3] = std::array::from_fn(|c| std::array::from_fn(|byte| value(c, byte as u8)));
        let bytes = image.as_raw();
        let stride = image.width() as usize * 3;
        let (pixels, first) = (patch * patch, data.len());
        data.resize(first + rows * columns * self.patch_values(), 0.0);
        // Merged squares side by side are worked on together.
        each_chunk(&mut data[first..], merge * columns * self.patch_values(), |cell_y, patches| {
            for (i, values) in patches.chunks_exact_mut(self.patch_values()).enumerate() {
                let (cell_x, inside) = (i / (merge * merge), i % (merge * merge));
                let (row, column) = (cell_y * merge + inside / merge, cell_x * merge + inside % merge);
                let (red, others) = values.split_at_mut(frames * pixels);
                let (green, blue) = others.split_at_mut(frames * pixels);
                for y in 0..patch {
                    let line = &bytes[(row * patch + y) * stride + column * patch * 3..][..patch * 3];
                    let part = y * patch..(y + 1) * patch;
                    let lines = red[part.clone()].iter_mut().zip(&mut green[part.clone()]).zip(&mut blue[part]);
                    for (((r, g), b), &[red, green, blue]) in lines.zip(line.as_chunks::<3>().0) {
                        *r = table[0][usize::from(red)];
                        *g = table[1][usize::from(green)];
                        *b = table[2][usize::from(blue)];
                    }
                }
                for channel in [red, green, blue] {
                    for frame in 1..frames {
                        channel.copy_within(..pixels, frame * pixels);
                    }
                }
            }
        });
    }

    /// Values of a patch.
    pub(super) fn patch_values(&self) -> usize {
        3 * self.temporal_patch_size * self.patch_size * self.patch_size
    }
}

/// Refuses an image one side of which is more than 200 times the other: Qwen's own limit, and beyond all real images.
pub(super) fn refuse_extreme_aspect(height: usize, width: usize) -> Result<()> {
    let (long, short) = (height.max(width), height.min(width));
    ensure!(long <= 200 * short, "is {width}x{height}: one side is more than 200 times the other; crop it");
    Ok(())
}

/// The image processor of a checkpoint folder and the file it stands in: `image_processor` in `processor_config.json`, which
/// wins as in transformers, else `preprocessor_config.json`. Errors when there is neither.
pub(super) fn image_processor(folder: &Path) -> Result<(PathBuf, Value)> {
    if let Some(mut all) = read_json(folder, "processor_config.json")?
        && let Some(inner) = all.get_mut("image_processor").map(Value::take).filter(Value::is_object)
    {
        return Ok((folder.join("processor_config.json"), inner));
    }
    let config = read_json(folder, "preprocessor_config.json")?.with_context(|| {
        format!(
            "{} has neither preprocessor_config.json nor processor_config.json with an image_processor; copy them from \
             the original checkpoint",
            folder.display()
        )
    })?;
    Ok((folder.join("preprocessor_config.json"), config))
}

/// The JSON object in the file `name` of a checkpoint's folder, `None` when there is no such file.
pub(super) fn read_json(folder: &Path, name: &str) -> Result<Option<Value>> {
    let path = folder.join(name);
    let Some(text) = input::read_beside(folder, name, input::MAX_CONFIG_BYTES)? else { return Ok(None) };
    let value = input::json::value(&text, input::MAX_CONFIG_VALUES)
        .with_context(|| format!("{} is not JSON", path.display()))?;
    ensure!(value.is_object(), "{} is not a JSON object", path.display());
    Ok(Some(value))
}

pub(super) fn count(object: &Value, key: &str) -> Result<Option<usize>> {
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
