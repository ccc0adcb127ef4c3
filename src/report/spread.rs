//! Importance as the report shows it: one number g a token, the mean of its factors for q, k, v and o.
//!
//! Each projection's factors are scaled to a mean square of 1 over the calibration tokens, so that the four count alike in the
//! mean, blocks compare, and 1 is a token as it would weigh without importance.

use super::samples::ReportSample;
use crate::quantize::importance::Factors;
use serde::{Deserialize, Serialize};

/// Bins of a [`BlockImportance`]: below 2⁻⁶, half octaves up to 2⁶, above.
pub const BINS: usize = 26;

/// Blocks whose samples are kept token by token, at most.
pub const SHOWN_BLOCKS: usize = 6;

/// Where the bins meet, from 2⁻⁶ to 2⁶: bin i holds `edge[i − 1] <= g < edge[i]`, the first and the last what is beyond.
pub fn bin_edges() -> Vec<f64> {
    (0..BINS - 1).map(|i| (i as f64 / 2.0 - 6.0).exp2()).collect()
}

/// The bin of an importance.
fn bin(g: f64) -> usize {
    // log2(0) is −∞, which casts to the first bin.
    (((g.log2() + 6.0) * 2.0).floor() + 1.0).clamp(0.0, (BINS - 1) as f64) as usize
}

/// The blocks whose samples are kept token by token: evenly spread behind block 0, in which no token counts more than another.
pub fn shown_blocks(blocks: usize) -> Vec<usize> {
    let (first, last) = (1, blocks.saturating_sub(1));
    let count = SHOWN_BLOCKS.min(last);
    (0..count).map(|i| first + (i * (last - first) + (count - 1) / 2) / (count - 1).max(1)).collect()
}

/// Importance of the calibration tokens in one block.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BlockImportance {
    /// How many text tokens lie in each bin of [`bin_edges`].
    pub text: Vec<u64>,
    /// How many vision tokens do.
    pub vision: Vec<u64>,
    /// g of every token of the report's samples, to 4 digits; `None` in blocks that the report does not show so closely.
    pub samples: Option<Vec<Vec<f32>>>,
}

impl BlockImportance {
    /// Sums up the normalised factors of all chunks, whose tokens are `is_vision` one after another; and of `samples` keeps
    /// each token's.
    pub fn of<'a>(
        factors: &[Factors],
        is_vision: impl Iterator<Item = &'a bool>,
        samples: Option<&[ReportSample]>,
    ) -> Self {
        let means: Vec<f64> = factors.iter().flat_map(means).collect();
        let mut histograms = [vec![0; BINS], vec![0; BINS]];
        for (&g, &is_vision) in means.iter().zip(is_vision) {
            histograms[usize::from(is_vision)][bin(g)] += 1;
        }
        let [text, vision] = histograms;
        let of_sample = |sample: &ReportSample| means[sample.span.clone()].iter().map(|&g| four_digits(g)).collect();
        Self { text, vision, samples: samples.map(|samples| samples.iter().map(of_sample).collect()) }
    }
}

fn means(factors: &Factors) -> Vec<f64> {
    let tokens = factors.projections[0].len();
    let mean = |token: usize| factors.projections.iter().map(|g| f64::from(g[token])).sum::<f64>() / 4.0;
    (0..tokens).map(mean).collect()
}

/// To 4 significant digits: the shortest way to write the number back is then as short.
fn four_digits(g: f64) -> f32 {
    format!("{g:.3e}").parse().expect("a number that was just written")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_hold_what_lies_between_their_edges() {
        let edges = bin_edges();
        assert_eq!(edges.len(), BINS - 1);
        for (i, &edge) in edges.iter().enumerate() {
            assert_eq!((bin(edge * (1.0 - 1e-9)), bin(edge * (1.0 + 1e-9))), (i, i + 1), "{edge}");
        }
        assert_eq!((bin(0.0), bin(1e-30), bin(1e30), bin(f64::INFINITY)), (0, 0, BINS - 1, BINS - 1));
    }

    #[test]
    fn shown_blocks_are_spread_and_leave_the_first_out() {
        assert_eq!(shown_blocks(28), [1, 6, 11, 17, 22, 27]);
        assert_eq!(shown_blocks(80).len(), SHOWN_BLOCKS);
        assert_eq!(shown_blocks(7), [1, 2, 3, 4, 5, 6]);
        assert_eq!(shown_blocks(6), [1, 2, 3, 4, 5]);
        assert_eq!((shown_blocks(2), shown_blocks(1), shown_blocks(0)), (vec![1], vec![], vec![]));
    }

    #[test]
    fn tokens_are_counted_by_kind_and_kept_by_sample() {
        let chunk = |g: [[f32; 2]; 4]| Factors { projections: g.map(|g| g.to_vec()) };
        let factors = [
            chunk([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]]),
            chunk([[0.123_456, 1.0], [0.123_456, 1.0], [0.123_456, 1.0], [0.123_456, 1.0]]),
        ];
        let sample = |span| ReportSample { span, ..ReportSample::default() };
        let samples = [sample(1..3), sample(3..4)];
        let is_vision = [false, true, true, false];
        let found = BlockImportance::of(&factors, is_vision.iter(), Some(&samples));
        assert_eq!(found.samples, Some(vec![vec![0.0, 0.1235], vec![1.0]]));
        let lone = |bins: &[usize]| (0..BINS).map(|i| bins.iter().filter(|&&b| b == i).count() as u64).collect();
        let expected: [Vec<u64>; 2] = [lone(&[bin(2.5), bin(1.0)]), lone(&[0, bin(0.1235)])];
        assert_eq!([found.text, found.vision], expected);
    }
}
