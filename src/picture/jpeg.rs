//! The segments of JPEG files (ISO/IEC 10918-1, annex B).

use std::ops::Range;

const START_OF_SCAN: u8 = 0xda;
const END_OF_IMAGE: u8 = 0xd9;
const APP0: u8 = 0xe0;
const APP1: u8 = 0xe1;
const APP14: u8 = 0xee;
const APP15: u8 = 0xef;
const COMMENT: u8 = 0xfe;

/// Whether a JPEG file has its end marker: the decoder fills what is missing of a shorter one with grey, without a word, as Pillow
/// does not. A thumbnail inside a segment does not count.
pub(crate) fn is_complete(bytes: &[u8]) -> bool {
    segments(bytes).any(|segment| segment.marker == END_OF_IMAGE)
}

/// The file, in parts, without the segments that no pixel depends on. The decoder would keep all of them, and sort those of long XMP
/// anew behind every single one.
pub(crate) fn pixel_parts(bytes: &[u8]) -> Box<dyn Iterator<Item = &[u8]> + '_> {
    let mut left_out = segments(bytes).filter(Segment::says_no_pixel).map(|segment| segment.range);
    let mut at = 0;
    Box::new(std::iter::from_fn(move || {
        if at == bytes.len() {
            return None;
        }
        let next = left_out.next().unwrap_or(bytes.len()..bytes.len());
        let part = &bytes[at..next.start];
        at = next.end;
        Some(part)
    }))
}

/// EXIF data and XMP, each the last of the file's head.
pub(crate) fn metadata(bytes: &[u8]) -> [Option<&[u8]>; 2] {
    let (mut exif, mut xmp) = (None, None);
    let head = segments(bytes).take_while(|segment| segment.marker != START_OF_SCAN);
    for segment in head.filter(|segment| segment.marker == APP1) {
        let of = |name: &[u8]| segment.data.strip_prefix(name).filter(|data| !data.is_empty());
        exif = of(b"Exif\0\0").or(exif);
        xmp = of(b"http://ns.adobe.com/xap/1.0/\0").or(xmp);
    }
    [exif, xmp]
}

struct Segment<'a> {
    marker: u8,
    /// Place of the segment, its marker included.
    range: Range<usize>,
    data: &'a [u8],
}

impl Segment<'_> {
    /// Whether the segment is none of what a decoder needs: JFIF's says nothing of a pixel but is short, Adobe's says how colours are coded.
    fn says_no_pixel(&self) -> bool {
        matches!(self.marker, APP0..=APP15 | COMMENT) && !matches!(self.marker, APP0 | APP14)
    }
}

/// Segments with a length, and the end of the image. Ends where one is cut short.
fn segments(bytes: &[u8]) -> impl Iterator<Item = Segment<'_>> {
    let mut at = 2;
    std::iter::from_fn(move || {
        loop {
            // Entropy-coded data holds 0xff only before 0 (stuffing), a restart marker or the marker that ends it.
            let start = at + bytes.get(at..)?.iter().position(|&byte| byte == 0xff)?;
            at = start + 1;
            match *bytes.get(at)? {
                0xff => continue,
                0x00 | 0x01 | 0xd0..=0xd8 => at += 1,
                END_OF_IMAGE => {
                    at += 1;
                    return Some(Segment { marker: END_OF_IMAGE, range: start..at, data: &[] });
                }
                marker => {
                    let &[high, low] = bytes.get(at + 1..at + 3)? else { return None };
                    let data = at + 3..at + 1 + usize::from(u16::from_be_bytes([high, low])).max(2);
                    at = data.end;
                    return Some(Segment { marker, range: start..at, data: bytes.get(data)? });
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::{is_complete, metadata, pixel_parts};

    #[test]
    fn the_end_of_a_thumbnail_is_not_the_end() {
        let head = [0xff, 0xd8, 0xff, 0xe1, 0, 6, 0xff, 0xda, 0xff, 0xd9];
        let scan = [0xff, 0xda, 0, 3, 7, 1, 0xff, 0x00, 2, 0xff, 0xd3, 3];
        let whole = [&head[..], &scan, &[0xff, 0xff, 0xd9, 9, 9]].concat();
        assert!(is_complete(&whole));
        for length in 0..whole.len() - 2 {
            assert!(!is_complete(&whole[..length]), "{length}");
        }
    }

    #[test]
    fn what_no_pixel_needs_is_left_out() {
        let (start, jfif, adobe) = ([0xff, 0xd8], [0xff, 0xe0, 0, 3, 1], [0xff, 0xee, 0, 3, 2]);
        let exif = |byte| [&[0xff, 0xe1, 0, 9][..], b"Exif\0\0", &[byte]].concat();
        let scan = [0xff, 0xda, 0, 3, 7, 1, 0xff, 0x00, 2];
        let (comment, profile, end) = ([0xff, 0xfe, 0, 4, 0xff, 0xe1], [0xff, 0xff, 0xe2, 0, 2], [0xff, 0xd9, 5]);
        let whole =
            [&start[..], &exif(1), &jfif, &comment, &exif(2), &adobe, &scan, &profile, &exif(3), &scan, &end].concat();
        let parts = pixel_parts(&whole).collect::<Vec<_>>().concat();
        assert_eq!(parts, [&start[..], &jfif, &adobe, &scan, &[0xff], &scan, &end].concat());
        assert_eq!(metadata(&whole), [Some(&[2][..]), None]);
    }
}
