//! Image files to pixels, within bounds.

use crate::container::Pixels;
use crate::jpeg;
use crate::orientation::orientation;
use anyhow::{Context, Result, bail, ensure};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, Luma, Rgb, RgbImage};

/// Most pixels an image may have: the limit at which Pillow warns of a decompression bomb.
pub const MAX_PIXELS: u64 = 89_478_485;

/// Memory that a decoder may take beside that for pixels.
const DECODER_BYTES: u64 = 16 << 20;

/// The picture of an image file's bytes in RGB, upright.
///
/// PNG, JPEG, WebP, GIF, BMP and TIFF, told apart by content; of several pictures in a file the first. The orientation is applied;
/// alpha is dropped, not blended; grey and palettes are expanded; of 16-bit samples the high byte is kept. All as Pillow's
/// `exif_transpose` and `convert("RGB")`, apart from 16-bit grey, which Pillow clips to white.
///
/// Errors when the file is broken, of another kind, or has more than [`MAX_PIXELS`], which is found before any pixel is decoded.
pub fn read(bytes: &[u8]) -> Result<RgbImage> {
    use ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    let Ok(format @ (Png | Jpeg | WebP | Gif | Bmp | Tiff)) = image::guess_format(bytes) else {
        ensure!(!is_heif(bytes), "is HEIC or AVIF, as telephones take them; convert it to JPEG or PNG");
        bail!("is neither PNG, JPEG, WebP, GIF, BMP nor TIFF; convert it to one of these");
    };
    let mut reader = ImageReader::with_format(Pixels::of(bytes, format), format);
    // 16-bit RGBA, and once more for the decoder's own buffers.
    let limits = |pixels: u64| {
        let mut limits = Limits::default();
        limits.max_alloc = Some(pixels * 16 + DECODER_BYTES);
        limits
    };
    reader.limits(limits(MAX_PIXELS));
    let mut decoder = reader.into_decoder().context("is broken")?;
    let (width, height) = decoder.dimensions();
    ensure!(width > 0 && height > 0, "has no pixels");
    let pixels = u64::from(width) * u64::from(height);
    ensure!(pixels <= MAX_PIXELS, "is {width}x{height}; the limit is {MAX_PIXELS} pixels, scale it down");
    ensure!(format != Jpeg || jpeg::is_complete(bytes), "is broken: it ends before its end marker");
    decoder.set_limits(limits(pixels)).context("is broken")?;
    let mut decoded = DynamicImage::from_decoder(decoder).context("is broken")?;
    decoded.apply_orientation(orientation(format, bytes));
    Ok(to_rgb(decoded))
}

/// Whether the file is a HEIF container (ISO/IEC 23008-12), which no decoder here reads.
fn is_heif(bytes: &[u8]) -> bool {
    const BRANDS: [&[u8]; 8] = [b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif"];
    bytes.get(4..8) == Some(b"ftyp") && bytes.get(8..12).is_some_and(|brand| BRANDS.contains(&brand))
}

/// Keeps the high byte of 16-bit samples, where the image crate's own conversion would round.
fn to_rgb(image: DynamicImage) -> RgbImage {
    let high = |sample: u16| (sample >> 8) as u8;
    let from_fn = |pixel: &dyn Fn(u32, u32) -> [u16; 3]| {
        RgbImage::from_fn(image.width(), image.height(), |x, y| Rgb(pixel(x, y).map(high)))
    };
    match &image {
        DynamicImage::ImageLuma16(grey) => from_fn(&|x, y| {
            let Luma([sample]) = *grey.get_pixel(x, y);
            [sample; 3]
        }),
        DynamicImage::ImageLumaA16(grey) => from_fn(&|x, y| [grey.get_pixel(x, y).0[0]; 3]),
        DynamicImage::ImageRgb16(color) => from_fn(&|x, y| color.get_pixel(x, y).0),
        DynamicImage::ImageRgba16(color) => from_fn(&|x, y| {
            let [red, green, blue, _] = color.get_pixel(x, y).0;
            [red, green, blue]
        }),
        _ => image.into_rgb8(),
    }
}
