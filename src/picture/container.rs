//! What a decoder is given of an image file: its bytes without what no pixel depends on, so that it cannot unpack or keep that.

use crate::jpeg;
use image::ImageFormat;
use std::io::{self, BufRead, Cursor, Read, Seek, SeekFrom};

/// Bytes for a decoder.
pub(crate) enum Pixels<'a> {
    /// The bytes as they are.
    Whole(Cursor<&'a [u8]>),
    /// Put together of parts.
    Parts { part: &'a [u8], further: Box<dyn Iterator<Item = &'a [u8]> + 'a> },
}

impl<'a> Pixels<'a> {
    /// Bytes of a file for its decoder. The other formats' decoders read no more than they are asked for.
    pub(crate) fn of(bytes: &'a [u8], format: ImageFormat) -> Self {
        match format {
            ImageFormat::Png => Self::Parts { part: &[], further: Box::new(png_parts(bytes)) },
            ImageFormat::Jpeg => Self::Parts { part: &[], further: Box::new(jpeg::pixel_parts(bytes)) },
            _ => Self::Whole(Cursor::new(bytes)),
        }
    }
}

impl Read for Pixels<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let there = self.fill_buf()?;
        let length = there.len().min(buffer.len());
        buffer[..length].copy_from_slice(&there[..length]);
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Pixels<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        match self {
            Self::Whole(bytes) => bytes.fill_buf(),
            Self::Parts { part, further } => {
                while part.is_empty() {
                    let Some(next) = further.next() else { break };
                    *part = next;
                }
                Ok(part)
            }
        }
    }

    fn consume(&mut self, length: usize) {
        match self {
            Self::Whole(bytes) => bytes.consume(length),
            Self::Parts { part, .. } => *part = &part[length..],
        }
    }
}

impl Seek for Pixels<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match self {
            Self::Whole(bytes) => bytes.seek(to),
            // Decoders of such files go forward only.
            Self::Parts { .. } => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// A chunk of a PNG file (PNG, section 5.3).
pub(crate) struct Chunk<'a> {
    pub(crate) kind: &'a [u8; 4],
    /// `None` where the file ends before.
    pub(crate) data: Option<&'a [u8]>,
    /// The whole chunk: length, kind, data, checksum.
    whole: &'a [u8],
}

/// The chunks of a PNG file, up to where it ends.
pub(crate) fn png_chunks(bytes: &[u8]) -> impl Iterator<Item = Chunk<'_>> {
    let mut rest = bytes.get(8..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (length, body) = rest.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        let (kind, body) = body.split_first_chunk::<4>()?;
        let whole;
        (whole, rest) = rest.split_at((length + 12).min(rest.len()));
        Some(Chunk { kind, data: body.get(..length), whole })
    })
}

/// A PNG file whose chunks beside the pixels have a name that nobody knows, and with it a wrong checksum: decoders pass over such a
/// chunk as over any that they do not know. Were they left out, a file that ends within one would end within its pixels.
fn png_parts(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    const UNKNOWN: &[u8] = b"noPi";
    let signature = bytes.get(..8).unwrap_or(bytes);
    let chunks = png_chunks(bytes).flat_map(|chunk| {
        // A small first letter: not critical. The only one of these that pixels depend on is transparency, which widens them.
        let needed = chunk.kind[0].is_ascii_uppercase() || chunk.kind == b"tRNS";
        match needed {
            true => [chunk.whole, &[], &[]],
            false => [&chunk.whole[..4], UNKNOWN, &chunk.whole[8..]],
        }
    });
    std::iter::once(signature).chain(chunks)
}

/// EXIF data and XMP of a WebP file, each the first of an extended file's chunks (RFC 9649, section 2.7).
pub(crate) fn webp_metadata(bytes: &[u8]) -> [Option<&[u8]>; 2] {
    let number = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?) as usize);
    let named = |at: usize, name: &[u8]| bytes.get(at..at + 4) == Some(name);
    let (mut exif, mut xmp) = (None, None);
    let mut at = 12;
    let mut end = bytes.len();
    while at < end
        && let Some(length) = number(at + 4)
    {
        let data = Some(bytes.get(at + 8..at + 8 + length));
        if at == 12 {
            if !named(at, b"VP8X") {
                break;
            }
            // As the decoder counts.
            let size = number(4).unwrap_or_default();
            end = end.min(at + 8 + length.next_multiple_of(2) + size.saturating_sub(12));
        } else if named(at, b"EXIF") {
            exif = exif.or(data);
        } else if named(at, b"XMP ") {
            xmp = xmp.or(data);
        }
        at += 8 + length.next_multiple_of(2);
    }
    [exif.flatten(), xmp.flatten()]
}
