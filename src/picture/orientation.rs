//! How a picture is to be turned, wherever Pillow's `exif_transpose` finds that said: in EXIF data of the file's own kind, of a PNG's
//! `eXIf` chunk anywhere or `Raw profile type exif` text, else in XMP.

use crate::container::{Pixels, png_chunks, webp_metadata};
use crate::jpeg;
use flate2::read::ZlibDecoder;
use image::codecs::tiff::TiffDecoder;
use image::metadata::Orientation;
use image::{ImageDecoder, ImageFormat};
use std::borrow::Cow;
use std::io::Read;

/// Most bytes of a PNG's text once it is unpacked, as for Pillow.
const MAX_TEXT: u64 = 1 << 20;

/// Most bytes that are unpacked of a PNG's texts in all. Files have one of each kind.
const MAX_TEXTS: u64 = 16 << 20;

/// What to unpack a text costs at least.
const LEAST_TEXT: u64 = 4 << 10;

/// Most bytes of EXIF data in hexadecimal; in a JPEG file it has up to 65,533.
const MAX_HEX: usize = 8 << 20;

/// How to turn the picture of `bytes`; what is broken says nothing.
pub(crate) fn orientation(format: ImageFormat, bytes: &[u8]) -> Orientation {
    let said = match format {
        ImageFormat::Png => return said(png_metadata(bytes)),
        ImageFormat::Jpeg => jpeg::metadata(bytes),
        ImageFormat::WebP => webp_metadata(bytes),
        // A decoder of its own, with the limits that it begins with: 1 MiB for the values of a tag.
        ImageFormat::Tiff => {
            let found = TiffDecoder::new(Pixels::of(bytes, format)).and_then(|mut decoder| decoder.orientation());
            return found.unwrap_or(Orientation::NoTransforms);
        }
        _ => [None, None],
    };
    self::said(said.map(|found| found.map(Cow::Borrowed)))
}

fn said([exif, xmp]: [Option<Cow<'_, [u8]>>; 2]) -> Orientation {
    let said = exif.as_deref().and_then(in_exif).or_else(|| xmp.as_deref().and_then(in_xmp));
    said.and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms)
}

/// `tiff:Orientation` of XMP, as an attribute or an element of one digit.
fn in_xmp(xmp: &[u8]) -> Option<u8> {
    const NAME: &[u8] = b"tiff:Orientation";
    let places = xmp.windows(NAME.len()).enumerate().filter(|(_, word)| *word == NAME).map(|(at, _)| at + NAME.len());
    places.into_iter().find_map(|at| {
        let rest = &xmp[at..];
        let digit = rest.strip_prefix(b"=\"").or_else(|| rest.strip_prefix(b">"))?.first()?;
        digit.is_ascii_digit().then(|| digit - b'0')
    })
}

/// Tag 274 of the first directory (EXIF 2.3, section 4.6.2), of any type of whole numbers; `None` where there is none, or of another.
fn in_exif(exif: &[u8]) -> Option<u8> {
    let mut tiff = exif;
    while let Some(rest) = tiff.strip_prefix(b"Exif\0\0") {
        tiff = rest;
    }
    let little = match tiff.get(..4)? {
        b"II*\0" => true,
        b"MM\0*" => false,
        _ => return None,
    };
    let number = |at: usize, length: usize| -> Option<u64> {
        let bytes = tiff.get(at..at.checked_add(length)?)?.iter();
        let add = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        Some(if little { bytes.rev().fold(0, add) } else { bytes.fold(0, add) })
    };
    let directory = usize::try_from(number(4, 4)?).ok()?;
    let entries = number(directory, 2)? as usize;
    let entry = (0..entries).map(|i| directory + 2 + 12 * i).find(|&at| number(at, 2) == Some(274))?;
    // SHORT, LONG, SBYTE, SSHORT, SLONG, IFD. Numbers from 1 to 8 look alike with a sign and without.
    let size = match number(entry + 2, 2)? {
        6 => 1,
        3 | 8 => 2,
        4 | 9 | 13 => 4,
        _ => return None,
    };
    let count = usize::try_from(number(entry + 4, 4)?).ok()?;
    let at = match count.checked_mul(size)? {
        0 => return None,
        1..=4 => entry + 8,
        _ => number(entry + 8, 4)? as usize,
    };
    u8::try_from(number(at, size)?).ok()
}

/// EXIF data and XMP of a PNG.
fn png_metadata(bytes: &[u8]) -> [Option<Cow<'_, [u8]>>; 2] {
    let (mut exif, mut raw, mut xmp) = (None, None, None);
    let mut left = MAX_TEXTS;
    for chunk in png_chunks(bytes).take_while(|chunk| chunk.kind != b"IEND") {
        let Some(data) = chunk.data else { break };
        match chunk.kind {
            b"eXIf" => exif = Some(Cow::Borrowed(data)),
            b"tEXt" | b"zTXt" | b"iTXt" => {
                let is = |keyword: &[u8]| data.strip_prefix(keyword).is_some_and(|rest| rest.starts_with(&[0]));
                if is(b"Raw profile type exif") {
                    raw = text(chunk.kind, data, &mut left).or(raw);
                } else if is(b"XML:com.adobe.xmp") {
                    xmp = text(chunk.kind, data, &mut left).or(xmp);
                }
            }
            _ => {}
        }
    }
    [exif.or_else(|| raw.as_deref().and_then(from_hex).map(Cow::Owned)), xmp]
}

/// Text of a chunk (PNG, section 11.3.3), of which no more than `left` is unpacked; `None` where it is broken or too long.
fn text<'a>(kind: &[u8; 4], data: &'a [u8], left: &mut u64) -> Option<Cow<'a, [u8]>> {
    let behind_zero = |data: &'a [u8]| data.iter().position(|&byte| byte == 0).map(|end| &data[end + 1..]);
    let rest = behind_zero(data)?;
    let (packed, text) = match kind {
        b"tEXt" => (false, rest),
        // The method of compression: there is one.
        b"zTXt" => (true, rest.strip_prefix(&[0])?),
        _ => {
            let (&[flag, _], rest) = rest.split_first_chunk::<2>()?;
            // A language, and the keyword in it.
            (flag == 1, behind_zero(behind_zero(rest)?)?)
        }
    };
    if !packed {
        return Some(Cow::Borrowed(text));
    }
    let most = MAX_TEXT.min(*left);
    let mut unpacked = Vec::new();
    let read = ZlibDecoder::new(text).take(most + 1).read_to_end(&mut unpacked);
    *left = left.saturating_sub(LEAST_TEXT.max(unpacked.len() as u64));
    (read.is_ok() && unpacked.len() as u64 <= most).then_some(Cow::Owned(unpacked))
}

/// What ImageMagick writes: three lines of head, then the bytes in hexadecimal.
fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    let text = Some(text).filter(|text| text.len() <= MAX_HEX)?;
    let lines = text.split(|&byte| byte == b'\n').skip(3);
    let digits: Vec<u8> = lines.flatten().filter(|byte| !byte.is_ascii_whitespace()).copied().collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.chunks_exact(2).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of one entry.
    fn tiff(little: bool, tag: u16, kind: u16, count: u32, value: [u8; 4]) -> Vec<u8> {
        let mut bytes = if little { b"II*\0".to_vec() } else { b"MM\0*".to_vec() };
        let mut put = |number: u32, length: usize| match little {
            true => bytes.extend(&number.to_le_bytes()[..length]),
            false => bytes.extend(&number.to_be_bytes()[4 - length..]),
        };
        put(8, 4);
        put(1, 2);
        put(tag.into(), 2);
        put(kind.into(), 2);
        put(count, 4);
        bytes.extend(value);
        bytes
    }

    #[test]
    fn exif_of_every_integer_type() {
        for (little, kind, count, value, expected) in [
            (true, 3, 1, [6, 0, 0, 0], Some(6)),
            (false, 3, 1, [0, 6, 0, 0], Some(6)),
            (true, 4, 1, [8, 0, 0, 0], Some(8)),
            (false, 9, 1, [0, 0, 0, 3], Some(3)),
            (true, 6, 1, [5, 0, 0, 0], Some(5)),
            (true, 3, 2, [6, 0, 1, 0], Some(6)),
            // Pillow leaves a BYTE a string of bytes.
            (true, 1, 1, [6, 0, 0, 0], None),
            (true, 2, 1, [b'6', 0, 0, 0], None),
            (true, 3, 0, [6, 0, 0, 0], None),
            (true, 4, 9, [0xff; 4], None),
        ] {
            let exif = tiff(little, 274, kind, count, value);
            assert_eq!(in_exif(&exif), expected, "{kind} {count} {value:?}");
            assert_eq!(in_exif(&[b"Exif\0\0", &exif[..]].concat()), expected);
            for length in 0..exif.len() {
                assert!(in_exif(&exif[..length]).is_none_or(|found| Some(found) == expected));
            }
        }
        assert_eq!(in_exif(&tiff(true, 275, 3, 1, [6, 0, 0, 0])), None);
    }

    #[test]
    fn xmp_in_both_spellings() {
        for (xmp, expected) in [
            ("<x tiff:Orientation=\"6\"/>", Some(6)),
            ("<tiff:Orientation>3</tiff:Orientation>", Some(3)),
            ("<tiff:Orientation >3</tiff:Orientation>", None),
            ("tiff:Orientation='6' tiff:Orientation=\"8\"", Some(8)),
            ("", None),
        ] {
            assert_eq!(in_xmp(xmp.as_bytes()), expected, "{xmp}");
        }
    }
}
