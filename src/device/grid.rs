//! The grid of codes that a group of weights is rounded to, as every device has to build it.

use crate::tensor::Float;
use anyhow::Error;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Widths of codes that grids, files and kernels know.
pub const WIDTHS: [u32; 4] = [2, 3, 4, 8];

/// [`WIDTHS`] as messages have them, such as `2, 3, 4 or 8` with the `conjunction` `or`.
pub fn told_widths(conjunction: &str) -> String {
    let [first @ .., last] = WIDTHS.map(|bits| bits.to_string());
    format!("{} {conjunction} {last}", first.join(", "))
}

/// How a group's range becomes its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grid {
    /// The full range of the group's weights.
    Minmax,
    /// The shrunken range with the least `Σ|w − q|^2.4` out of 80.
    Mse,
    /// The candidate, out of 24 (16 symmetric), that the group's own solve has the least loss with: the group's share of
    /// `‖(W − Ŵ)·R‖²`, its columns' errors carried on inside the group and each weighed by R's diagonal, as the solver
    /// weighs them. In a group wider than [`BLOCK`](super::BLOCK) errors are carried on inside blocks. Without
    /// statistics the loss is `Σ|w − q|²`.
    ///
    /// First the range shrunk to `1 − 3k/64`, k = 0…15; then, where the zero is free, the best of them with the zero one
    /// step up or down and the scale times 7/8, 1, 9/8 and 5/4, all exact in float32. The first of
    /// equals. Where the full range's scale does not fit its storage type, none is tried.
    Loss,
}

impl Grid {
    /// The power of the differences between weights and rounded weights that are summed up to choose a range; `None` where no such sum
    /// is taken.
    pub fn error_power(self) -> Option<f64> {
        match self {
            Self::Mse => Some(2.4),
            Self::Minmax | Self::Loss => None,
        }
    }

    /// Whether a range is chosen by what the solver would make of the group, so that its factor is looked at.
    pub fn reads_factor(self) -> bool {
        match self {
            Self::Loss => true,
            Self::Minmax | Self::Mse => false,
        }
    }
}

/// Candidates of [`Grid::Loss`] that shrink the range.
pub const LOSS_SHRINKS: usize = 16;

/// Factors of the scale, of candidates of [`Grid::Loss`] that move the zero.
pub const LOSS_STRETCHES: [f32; 4] = [0.875, 1.0, 1.125, 1.25];

/// The error of a scale that its storage type cannot hold, because weights are too large or not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaleMisfit {
    /// Output row of the weights.
    pub row: usize,
    /// Storage type of the scale.
    pub scale_type: Float,
}

impl fmt::Display for ScaleMisfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { row, scale_type } = self;
        write!(f, "the scale of a group of weights in output row {row} does not fit {scale_type:?}")
    }
}

impl std::error::Error for ScaleMisfit {}

/// How the range of a group of weights becomes a scale `s`, a zero `z` and codes.
///
/// With `lo = min(0, min w)`, `hi = max(0, max w)` and `m = 2^bits − 1`: asymmetric `s = (hi − lo)/m`,
/// `z = round(−lo/s)` clamped to `[smallest_zero, m]`; symmetric `s = 2·max(−lo, hi)/m`, `z = 2^(bits−1)`. `s` is
/// rounded to the storage type first (the smallest positive value where that gives 0), so that everything after it is
/// exact for the weights that will be served. A group of zeros has `s = 1`, `z = 2^(bits−1)`. The code of `w` is
/// `clamp(round(w/s) + z, 0, m)`, ties to even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GridRule {
    /// Width of a code, one of [`WIDTHS`].
    pub bits: u32,
    /// Zero fixed at the middle.
    pub symmetric: bool,
    /// Full range or the best of 80 shrunken ones.
    pub grid: Grid,
    /// Storage type of scales.
    pub scale_type: Float,
    /// Smallest zero that the file format can hold.
    pub smallest_zero: u8,
}

impl GridRule {
    /// Largest code, `2^bits − 1`.
    pub fn largest_code(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Zero of a symmetric grid and of a group of zeros, `2^(bits−1)`.
    pub fn middle(&self) -> f32 {
        (1u32 << (self.bits - 1)) as f32
    }

    /// The error of a scale in output row `row` that is infinite or not a number.
    pub(crate) fn misfit(&self, row: usize) -> Error {
        Error::new(ScaleMisfit { row, scale_type: self.scale_type })
    }

    /// Share of the range that candidate `k` of [`Grid::Loss`] keeps.
    pub fn loss_shrink(k: usize) -> f32 {
        1.0 - 3.0 * k as f32 / 64.0
    }

    /// A grid with its scale stretched and its zero `step` further, as far as codes go.
    pub fn shifted(&self, (scale, zero): (f32, f32), stretch: f32, step: f32) -> (f32, f32) {
        (self.stored(scale * stretch), (zero + step).clamp(f32::from(self.smallest_zero), self.largest_code()))
    }

    /// `scale` in its storage type, and not 0.
    pub(crate) fn stored(&self, scale: f32) -> f32 {
        match self.scale_type.round(scale) {
            0.0 => self.scale_type.smallest(),
            scale => scale,
        }
    }

    /// Scale and zero for weights in `[lo, hi]`, `lo ≤ 0 ≤ hi`. A scale that the storage type cannot hold comes back
    /// infinite.
    pub fn scale_and_zero(&self, lo: f32, hi: f32) -> (f32, f32) {
        if lo == 0.0 && hi == 0.0 {
            return (1.0, self.middle());
        }
        let range = if self.symmetric { 2.0 * hi.max(-lo) } else { hi - lo };
        let scale = self.stored(range / self.largest_code());
        let zero = if self.symmetric {
            self.middle()
        } else {
            (-lo / scale).round_ties_even().clamp(f32::from(self.smallest_zero), self.largest_code())
        };
        (scale, zero)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_told_as_a_list() {
        assert_eq!(told_widths("or"), "2, 3, 4 or 8");
        assert_eq!(told_widths("and"), "2, 3, 4 and 8");
    }
}
