//! Image files of tests, by the type of their coder: where a format is a value, as for `image::open` and `save`, the coders of every
//! format are compiled into each test program.

use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::PngDecoder;
use image::{DynamicImage, RgbImage};
use std::fs;
use std::io::Cursor;
use std::path::Path;

/// Writes a PNG file.
pub fn save_png(picture: &RgbImage, path: impl AsRef<Path>) {
    fs::write(path, vlmq_picture::write_png(picture).unwrap()).unwrap();
}

/// The pixels of a PNG file, as the image crate reads it.
pub fn open_png(path: impl AsRef<Path>) -> RgbImage {
    decode_png(&fs::read(path).unwrap())
}

/// The same of the bytes of one.
pub fn decode_png(bytes: &[u8]) -> RgbImage {
    DynamicImage::from_decoder(PngDecoder::new(Cursor::new(bytes)).unwrap()).unwrap().into_rgb8()
}

/// The pixels of a JPEG file's bytes.
pub fn decode_jpeg(bytes: &[u8]) -> RgbImage {
    DynamicImage::from_decoder(JpegDecoder::new(Cursor::new(bytes)).unwrap()).unwrap().into_rgb8()
}
