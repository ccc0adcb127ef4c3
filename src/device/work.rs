//! Work by kind, as a device does it.

use serde::Serialize;
use std::ops::{Add, Mul};

/// A number for each kind of work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ByKind {
    /// Products by weights and factors, in floating-point operations: two for a multiplication and an addition.
    pub products: f64,
    /// Attention, in floating-point operations; scores that are masked are left out.
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

    /// Seconds of this work at `rates`, which are work a second.
    pub fn seconds(&self, rates: &Self) -> f64 {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_work_over_rates() {
        let rates = ByKind {
            products: 4.0,
            attention: 2.0,
            statistics: 1.0,
            factors: 8.0,
            codes: 16.0,
            values: 32.0,
            checked: 64.0,
        };
        let load = ByKind {
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
