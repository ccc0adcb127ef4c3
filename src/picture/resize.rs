//! Scaling.

use anyhow::{Context, Result};
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;

/// A picture of another size, by antialiased bicubic interpolation. Errors when it would have no pixels or too many.
///
/// The width first, then the height, each rounded to bytes: so torchvision does it, and in one call fast_image_resize would go
/// through the axes the other way round.
pub fn resize(image: &RgbImage, width: u32, height: u32) -> Result<RgbImage> {
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom)).use_alpha(false);
    let mut resizer = Resizer::new();
    // Images of one type of pixel: else code for all types is compiled.
    let mut resized = |from: &RgbImage, width, height| -> Result<RgbImage> {
        let mut to = RgbImage::new(width, height);
        let source = TypedImageRef::<U8x3>::from_buffer(from.width(), from.height(), from.as_raw())?;
        let mut target = TypedImage::<U8x3>::from_buffer(width, height, &mut to)?;
        resizer.resize_typed(&source, &mut target, &options).context("cannot be resized")?;
        Ok(to)
    };
    let wide = resized(image, width, image.height())?;
    resized(&wide, width, height)
}
