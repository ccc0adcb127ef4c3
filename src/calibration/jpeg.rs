//! Finds JPEG files that were cut short. The decoder fills what is missing with grey and reports nothing.

/// Whether the file reaches its end-of-image marker (ITU-T T.81, annex B).
///
/// Walks segments by their lengths, so that the end of a thumbnail inside a segment does not count.
pub(super) fn is_complete(bytes: &[u8]) -> bool {
    const END_OF_IMAGE: u8 = 0xd9;
    let mut at = 2;
    loop {
        // Entropy-coded data holds 0xff only before 0 (stuffing), a restart marker or the marker that ends it.
        let Some(step) = bytes.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == 0xff)) else {
            return false;
        };
        at += step + 1;
        match bytes.get(at) {
            None => return false,
            Some(0xff) => continue,
            Some(&END_OF_IMAGE) => return true,
            Some(0x00 | 0x01 | 0xd0..=0xd8) => at += 1,
            Some(_) => {
                let Some(&[high, low]) = bytes.get(at + 1..at + 3) else { return false };
                at += 1 + usize::from(u16::from_be_bytes([high, low])).max(2);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_complete;

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
}
