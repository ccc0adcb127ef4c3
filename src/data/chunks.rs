//! Which samples go through a model together.

use super::sequence::Sequence;
use std::ops::Range;

/// Cuts what has these sizes, in order, into runs of at most `most` together; what is larger by itself is a run alone.
pub fn chunks(sizes: impl IntoIterator<Item = u64>, most: u64) -> Vec<Range<usize>> {
    let mut chunks: Vec<Range<usize>> = Vec::new();
    let mut sum = u64::MAX;
    for (i, size) in sizes.into_iter().enumerate() {
        match chunks.last_mut() {
            Some(chunk) if sum.saturating_add(size) <= most => {
                chunk.end = i + 1;
                sum += size;
            }
            _ => {
                chunks.push(i..i + 1);
                sum = size;
            }
        }
    }
    chunks
}

/// [`chunks`] of samples by their tokens.
pub fn chunks_of_tokens(sequences: &[Sequence], most: u64) -> Vec<Range<usize>> {
    chunks(sequences.iter().map(|sequence| sequence.tokens.len() as u64), most)
}

#[cfg(test)]
mod tests {
    use super::chunks;

    #[test]
    fn chunks_hold_no_more_than_they_may_but_for_what_is_larger_alone() {
        assert_eq!(chunks([3, 4, 4, 9, 1, 7], 8), [0..2, 2..3, 3..4, 4..6]);
        assert_eq!(chunks([u64::MAX, u64::MAX], 8), [0..1, 1..2]);
        assert!(chunks([], 8).is_empty());
    }
}
