//! Images at their own resolution: the Qwen towers' resizing, and one token for each merged square of patches.

use super::image::{ImagePatches, MAX_PIXELS};
use super::patches::{PatchSettings, count, image_processor, refuse_extreme_aspect};
use super::positions::mrope_positions;
use super::sequence::VisionInput;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use vlmq_picture::{RgbImage, resize};

/// How an image is resized before it is cut into patches.
#[derive(Clone, Debug, PartialEq)]
pub struct NativeResolution {
    /// Sizes by which an image is cut.
    pub patches: Arc<PatchSettings>,
    /// Fewest pixels of a resized image.
    pub min_pixels: usize,
    /// Most pixels of a resized image.
    pub max_pixels: usize,
}

impl NativeResolution {
    /// Reads a checkpoint folder's image processor. `min_pixels` and `max_pixels` replace the file's where given.
    ///
    /// `processor_config.json` wins when it holds an `image_processor`, as in transformers. Size limits may stand at the
    /// root (`min_pixels`, which win), in `size`, or in `size` as `shortest_edge` and `longest_edge`. Errors when there
    /// is neither file, and on values that this processor does not implement.
    pub fn read(folder: &Path, min_pixels: Option<usize>, max_pixels: Option<usize>) -> Result<Self> {
        let (path, config) = image_processor(folder)?;
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
            patches: Arc::new(PatchSettings::from_config(config)?),
            // What transformers' `Qwen2VLImageProcessor` assumes.
            min_pixels: limit("min_pixels", "shortest_edge", 56 * 56)?,
            max_pixels: limit("max_pixels", "longest_edge", 28 * 28 * 1280)?,
        })
    }

    fn validate(&self) -> Result<()> {
        let (min, max) = (self.min_pixels, self.max_pixels);
        ensure!(min > 0 && min <= max, "at least {min} and at most {max} pixels: no image can be both");
        ensure!(max as u64 <= MAX_PIXELS, "max_pixels {max} is above {MAX_PIXELS}, the most an image may have");
        Ok(())
    }

    /// `(height, width)` to which an image of `height` x `width` pixels is resized: multiples of a merged cell's side,
    /// `min_pixels` to `max_pixels` in all, the proportions kept as closely as that allows.
    ///
    /// Qwen2-VL's `smart_resize`, to the bit: halves round to even, as Python rounds. Errors when one side is more than
    /// 200 times the other, or where rounding makes more than [`MAX_PIXELS`] of it.
    pub fn smart_resize(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        let factor = (self.patches.patch_size * self.patches.merge_size) as f64;
        refuse_extreme_aspect(height, width)?;
        let (high, wide) = (height as f64, width as f64);
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
        // Rounded up to cells, the sides of a long image may make more of it than was asked; on the way it is as high as
        // before.
        let pixels = new_high.max(high) * new_wide;
        ensure!(
            pixels <= MAX_PIXELS as f64,
            "is {width}x{height}: resized to {new_wide}x{new_high} in cells of {factor} it takes more than {MAX_PIXELS} \
             pixels; crop it"
        );
        Ok((new_high as usize, new_wide as usize))
    }

    /// Resizes an image for [`ImagePatches`]. Errors as [`Self::smart_resize`].
    pub fn prepare(&self, image: &RgbImage) -> Result<ImagePatches> {
        let (height, width) = self.smart_resize(image.height() as usize, image.width() as usize)?;
        let resized = resize(image, width as u32, height as u32)?;
        Ok(ImagePatches::whole(image, resized, Arc::clone(&self.patches)))
    }
}

/// [`VisionInput`] of families that take images at their own resolution: one token per merged square of patches, M-RoPE positions.
#[derive(Clone, Debug)]
pub struct NativeVision {
    settings: NativeResolution,
    image_token_id: u32,
    video_token_id: Option<u32>,
}

impl NativeVision {
    /// Vision input of an image processor's settings, and of `image_token_id` and `video_token_id` of config.json.
    pub fn new(settings: NativeResolution, image_token_id: u32, video_token_id: Option<u32>) -> Self {
        Self { settings, image_token_id, video_token_id }
    }
}

impl VisionInput for NativeVision {
    fn image_token_id(&self) -> u32 {
        self.image_token_id
    }

    fn video_token_id(&self) -> Option<u32> {
        self.video_token_id
    }

    fn image_markup(&self) -> (&'static str, &'static str) {
        ("<|vision_start|>", "<|vision_end|>")
    }

    fn prepare(&self, image: &RgbImage, _: usize) -> Result<ImagePatches> {
        self.settings.prepare(image)
    }

    fn image_tokens(&self, patches: &ImagePatches) -> usize {
        let (height, width) = patches.merged_grid();
        height * width
    }

    fn positions(&self, tokens: &[u32], images: &[ImagePatches]) -> Result<Vec<[u32; 3]>> {
        let grids: Vec<_> = images.iter().map(ImagePatches::merged_grid).collect();
        mrope_positions(tokens, self.image_token_id, &grids)
    }

    fn pixel_limits(&self) -> Option<[usize; 2]> {
        Some([self.settings.min_pixels, self.settings.max_pixels])
    }
}
