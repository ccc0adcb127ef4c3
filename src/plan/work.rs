//! Work by kind, and how long it takes.

use crate::model::families::VisionLoad;
use crate::plan::ChunkSize;
use crate::progress::Stage;
use serde::Serialize;
use std::ops::{Add, Mul};

/// A number for each kind of work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ByKind {
    /// Products by weights and factors, in floating-point operations: two for a multiplication and an addition.
    pub products: f64,
    /// Attention, in floating-point operations; its scores masked or not count alike.
    pub attention: f64,
    /// Statistics, in floating-point operations.
    pub statistics: f64,
    /// Factorizations, in floating-point operations.
    pub factors: f64,
    /// Weights that get their codes.
    pub codes: f64,
    /// Values that are read, computed one by one and written; a nonlinearity counts as three.
    pub values: f64,
    /// Bytes that go through a checksum.
    pub checked: f64,
}

/// Work by kind.
pub type Load = ByKind;

/// Work a second by kind, all threads together.
pub type Rates = ByKind;

impl ByKind {
    fn with(self, other: Self, of: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            products: of(self.products, other.products),
            attention: of(self.attention, other.attention),
            statistics: of(self.statistics, other.statistics),
            factors: of(self.factors, other.factors),
            codes: of(self.codes, other.codes),
            values: of(self.values, other.values),
            checked: of(self.checked, other.checked),
        }
    }

    /// Floating-point operations of all products.
    pub fn flops(&self) -> f64 {
        self.products + self.attention + self.statistics + self.factors
    }

    /// Seconds of this work at `rates`.
    pub fn seconds(&self, rates: &Rates) -> f64 {
        let seconds = self.with(*rates, |work, rate| work / rate);
        seconds.flops() + seconds.codes + seconds.values + seconds.checked
    }
}

impl Add for ByKind {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.with(other, |a, b| a + b)
    }
}

impl Mul<f64> for ByKind {
    type Output = Self;

    fn mul(self, by: f64) -> Self {
        self.with(self, |a, _| a * by)
    }
}

/// A stage and what it is expected to take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageEstimate {
    /// The stage.
    pub stage: Stage,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// The work.
    pub load: Load,
}

impl Load {
    /// A vision tower of `weights` values on the images of some chunks.
    pub(crate) fn of_vision(load: &VisionLoad, weights: usize, chunks: &[ChunkSize]) -> Self {
        let sum = |of: fn(&ChunkSize) -> usize| chunks.iter().map(of).sum::<usize>() as f64;
        let patches = sum(|chunk| chunk.all_patches);
        let (depth, windowed, width) = (load.depth as f64, load.windowed as f64, load.width as f64);
        let pairs = (depth - windowed) * sum(|chunk| chunk.patch_pairs) + windowed * patches * load.window as f64;
        let inner = load.inner as f64 * if load.gated { 5.0 } else { 4.0 };
        // Where patches are merged, what is behind that runs on the merged ones, wider in proportion: the same product.
        Self {
            products: 2.0 * patches * weights as f64,
            attention: 4.0 * pairs * width,
            values: patches * (depth * (7.0 * width + inner) + 2.0 * load.patch as f64) + weights as f64,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_work_over_rates() {
        let rates = Rates {
            products: 4.0,
            attention: 2.0,
            statistics: 1.0,
            factors: 8.0,
            codes: 16.0,
            values: 32.0,
            checked: 64.0,
        };
        let load = Load {
            products: 4.0,
            attention: 4.0,
            statistics: 4.0,
            factors: 4.0,
            codes: 4.0,
            values: 4.0,
            checked: 4.0,
        };
        assert_eq!(load.seconds(&rates), 1.0 + 2.0 + 4.0 + 0.5 + 0.25 + 0.125 + 0.0625);
        assert_eq!((load + load * 2.0).seconds(&rates), 3.0 * load.seconds(&rates));
        assert_eq!(load.flops(), 16.0);
    }
}
