//! Pixels to image files.

use anyhow::Result;
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;

/// Bytes of a JPEG file of a quality from 1 to 100. Errors on a picture without pixels or with sides above 65,535.
pub fn write_jpeg(picture: &RgbImage, quality: u8) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    picture.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, quality))?;
    Ok(bytes)
}

/// Bytes of a PNG file. Errors on a picture without pixels.
pub fn write_png(picture: &RgbImage) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // By its encoder: of a format that is a value the encoders of all formats would be compiled.
    picture.write_with_encoder(PngEncoder::new(&mut bytes))?;
    Ok(bytes)
}
