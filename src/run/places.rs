//! The samples of a run in chunks, and the tokens of them that tell what came of the model.
//!
//! Calibration samples flatter it: weights that were bent to few tokens serve those tokens well, and no others. So some samples that
//! were not drawn are held out: they go through the decoder on both paths, but into no statistics.

use crate::data::sequence::Sequence;

/// Samples that are held out, at most: as many more than are drawn, where the data has them.
pub(super) const HELD_OUT: usize = 16;

/// Calibration chunks whose tokens are looked at where nothing is left to hold out: four of usually 2048 tokens hold as many
/// samples.
const CHUNKS: usize = 4;

/// Tokens that are looked at, at most: with so many a share of one half is known to ± 2 %.
pub(super) const MOST_TOKENS: usize = 512;

/// Tokens of answers with which nothing else is asked: what a template repeats, every model knows.
const ENOUGH_ANSWERS: usize = 64;

/// Samples, packed into chunks: those that the model is calibrated with, then those that are held out.
#[derive(Clone, Debug, Default)]
pub(super) struct Chunked<'a> {
    /// The chunks.
    pub(super) chunks: Vec<Vec<&'a Sequence>>,
    /// How many of them, from the first, go into statistics.
    pub(super) calibrated: usize,
}

impl Chunked<'_> {
    /// Whether chunk `index` goes into no statistics.
    pub(super) fn is_held_out(&self, index: usize) -> bool {
        index >= self.calibrated
    }

    /// Whether tokens of chunk `index` are predicted in the end, for which both its paths are run: those held out, or where
    /// there are none, some spread over all.
    pub(super) fn is_checked(&self, index: usize) -> bool {
        match self.chunks.len() > self.calibrated {
            true => self.is_held_out(index),
            false => spread(self.calibrated).any(|chunk| chunk == index),
        }
    }

    /// Samples that are held out.
    pub(super) fn held_out(&self) -> usize {
        self.chunks[self.calibrated..].iter().map(Vec::len).sum()
    }
}

/// Some of so many chunks, evenly spread.
fn spread(chunks: usize) -> impl Iterator<Item = usize> {
    let count = CHUNKS.min(chunks);
    (0..count).map(move |i| (i * chunks + chunks / 2) / count)
}

/// Places in a chunk, and what comes next there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Places {
    /// Index of the chunk.
    pub(super) chunk: usize,
    /// Tokens of the chunk, ascending.
    pub(super) rows: Vec<u32>,
    /// The token behind each of them.
    pub(super) next: Vec<u32>,
}

/// Places in front of at most [`MOST_TOKENS`] tokens of the samples that are checked, spread evenly: of answers where there are enough,
/// else of all text.
pub(super) fn places(packed: &Chunked<'_>, image_token: u32) -> Vec<Places> {
    let (mut answers, mut texts) = (Vec::new(), Vec::new());
    for (chunk, sequences) in packed.chunks.iter().enumerate().filter(|(i, _)| packed.is_checked(*i)) {
        let mut first = 0;
        for sequence in sequences {
            // What stands first, nothing predicts.
            for (token, &next) in sequence.tokens.iter().enumerate().skip(1).filter(|(_, next)| **next != image_token) {
                let place = (chunk, (first + token - 1) as u32, next);
                texts.push(place);
                if sequence.answer.contains(&token) {
                    answers.push(place);
                }
            }
            first += sequence.tokens.len();
        }
    }
    let from = if answers.len() >= ENOUGH_ANSWERS { answers } else { texts };
    let count = MOST_TOKENS.min(from.len());
    let mut places: Vec<Places> = Vec::new();
    for (chunk, row, next) in (0..count).map(|i| from[i * from.len() / count]) {
        if places.last().is_none_or(|last| last.chunk != chunk) {
            places.push(Places { chunk, ..Places::default() });
        }
        let last = places.last_mut().expect("one was pushed if none was there");
        last.rows.push(row);
        last.next.push(next);
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(tokens: Vec<u32>, answer: std::ops::Range<usize>) -> Sequence {
        let positions = vec![[0; 3]; tokens.len()];
        Sequence { id: String::new(), tokens, vision_tokens: 0, images: Vec::new(), positions, answer }
    }

    #[test]
    fn places_are_spread_over_answers_or_over_text() {
        let all = |chunks: Vec<Vec<&'static Sequence>>| Chunked { calibrated: chunks.len(), chunks };
        assert!(places(&all(Vec::new()), 9).is_empty());
        // Without an answer every token of text but the first, behind images too.
        let some: &Sequence = Box::leak(Box::new(sequence(vec![1, 9, 9, 2, 3], 0..0)));
        let found = places(&all(vec![vec![some, some]]), 9);
        assert_eq!(found, [Places { chunk: 0, rows: vec![2, 3, 7, 8], next: vec![2, 3, 2, 3] }]);
        // Enough answers, and ten chunks of which four are looked at.
        let long: &Sequence = Box::leak(Box::new(sequence((0..400).map(|i| 10 + i).collect(), 100..300)));
        let found = places(&all((0..10).map(|_| vec![some, long]).collect()), 9);
        assert_eq!(found.iter().map(|places| places.chunk).collect::<Vec<_>>(), [1, 3, 6, 8]);
        assert_eq!(found.iter().map(|places| places.rows.len()).sum::<usize>(), MOST_TOKENS);
        for Places { rows, next, .. } in &found {
            assert!(rows.is_sorted_by(|a, b| a < b) && rows[0] >= 5 + 99 && rows[rows.len() - 1] < 5 + 299);
            assert!(rows.iter().zip(next).all(|(row, next)| *next == 10 + row + 1 - 5));
        }
    }

    #[test]
    fn samples_held_out_are_all_that_is_looked_at() {
        let some = sequence(vec![1, 2, 3], 0..0);
        let packed = Chunked { chunks: vec![vec![&some, &some], vec![&some], vec![&some, &some]], calibrated: 2 };
        assert_eq!([0, 1, 2].map(|i| packed.is_held_out(i)), [false, false, true]);
        assert_eq!([0, 1, 2].map(|i| packed.is_checked(i)), [false, false, true]);
        assert_eq!(packed.held_out(), 2);
        assert_eq!(places(&packed, 9), [Places { chunk: 2, rows: vec![0, 1, 3, 4], next: vec![2, 3, 2, 3] }]);
    }

    #[test]
    fn chunks_are_spread() {
        let found = |chunks| spread(chunks).collect::<Vec<_>>();
        assert_eq!((found(0), found(1), found(4)), (vec![], vec![0], vec![0, 1, 2, 3]));
        assert_eq!(found(128), [16, 48, 80, 112]);
    }
}
