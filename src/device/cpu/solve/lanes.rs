//! Rounding to the grid, sixteen rows at a time: plain arrays whose loops the compiler turns into vector instructions.
//!
//! No product here is fused with a sum: the same codes come out on every CPU.

use crate::device::GridRule;

/// Rows that are quantized side by side.
pub(super) const LANES: usize = 16;

/// One value of each of the rows.
pub(super) type Lane = [f32; LANES];

/// A column's lanes where many lie side by side: on a cache line of their own, or every vector costs two loads.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Column(pub(super) Lane);

/// Adding and subtracting 1.5·2²³ rounds a value below 2²² to the nearest integer, ties to even, without SSE4's
/// rounding instruction, which the baseline x86-64 target lacks.
const ROUND: f32 = 12_582_912.0;

/// Steps of the range search.
const STEPS: u32 = 80;

/// Scale and zero of a group, one a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct LaneGrid {
    pub(super) scale: Lane,
    pub(super) zero: Lane,
}

/// `(code − zero, weight)` of each row's value on the row's grid.
#[inline(always)]
pub(super) fn round(w: &Lane, grid: &LaneGrid, largest: f32) -> (Lane, Lane) {
    let (mut level, mut value) = ([0.0; LANES], [0.0; LANES]);
    for l in 0..LANES {
        level[l] = self::level(w[l] / grid.scale[l], grid.zero[l], largest);
        value[l] = grid.scale[l] * level[l];
    }
    (level, value)
}

/// Codes from levels: an integer below 2⁸ stands in the lowest byte of itself plus 2²³.
#[inline(always)]
pub(super) fn codes(level: &Lane, grid: &LaneGrid) -> [u8; LANES] {
    let mut codes = [0; LANES];
    for l in 0..LANES {
        codes[l] = (level[l] + grid.zero[l] + 8_388_608.0).to_bits() as u8;
    }
    codes
}

/// `x`, a weight in units of the scale, as code − zero.
#[inline(always)]
pub(super) fn level(x: f32, zero: f32, largest: f32) -> f32 {
    let (low, high) = (-zero, largest - zero);
    // Both ends are integers, so clamping before rounding is clamping after it.
    let x = if x < high { x } else { high };
    let x = if x > low { x } else { low };
    (x + ROUND) - ROUND
}

/// Least and largest weight of each row's group, one lane a column, and 0.
#[inline(always)]
pub(super) fn range_of(group: &[Lane]) -> (Lane, Lane) {
    let (mut lo, mut hi) = ([0.0f32; LANES], [0.0f32; LANES]);
    for w in group {
        for l in 0..LANES {
            lo[l] = if w[l] < lo[l] { w[l] } else { lo[l] };
            hi[l] = if w[l] > hi[l] { w[l] } else { hi[l] };
        }
    }
    (lo, hi)
}

#[inline(always)]
pub(super) fn candidate(lo: &Lane, hi: &Lane, shrink: f32, rule: &GridRule) -> LaneGrid {
    let mut grid = LaneGrid { scale: [0.0; LANES], zero: [0.0; LANES] };
    for l in 0..LANES {
        (grid.scale[l], grid.zero[l]) = rule.scale_and_zero(lo[l] * shrink, hi[l] * shrink);
    }
    grid
}

/// The range `p·[lo, hi]`, p = 1 − k/100, k = 0…79, with the least `Σ|w − q|^2.4`; the widest of equals.
#[inline(always)]
pub(super) fn least_power(group: &[Lane], lo: &Lane, hi: &Lane, rule: &GridRule) -> LaneGrid {
    let largest = rule.largest_code();
    // Errors in units of the range: powers of tiny weights would underflow.
    let unit: Lane = std::array::from_fn(|l| 1.0 / hi[l].max(-lo[l]).max(f32::MIN_POSITIVE));
    let mut best = candidate(lo, hi, 1.0, rule);
    let mut least = [f64::INFINITY; LANES];
    for k in 0..STEPS {
        let grid = candidate(lo, hi, 1.0 - k as f32 / 100.0, rule);
        // float64, or the sum's rounding would choose among candidates that are nearly alike.
        let mut loss = [0.0f64; LANES];
        for w in group {
            let (_, value) = round(w, &grid, largest);
            for l in 0..LANES {
                loss[l] += f64::from(power((w[l] - value[l]) * unit[l]));
            }
        }
        for l in 0..LANES {
            if loss[l] < least[l] {
                least[l] = loss[l];
                best.scale[l] = grid.scale[l];
                best.zero[l] = grid.zero[l];
            }
        }
    }
    best
}

/// `|x|^2.4 = a·a^(1/5)` with `a = x²`, within 1e-6 relative; `powf` would be a call a weight and candidate.
///
/// `z = a^(−1/5)` comes from Newton's `z·(6 − a·z⁵)/5`, which needs no division; its start, linear in the bits of `a`,
/// is within 3.3 %, and three steps square that error away.
#[inline(always)]
fn power(x: f32) -> f32 {
    let a = x * x;
    let start = 1_277_920_000.0 - 0.2 * a.to_bits() as i32 as f32;
    let mut z = f32::from_bits(start as i32 as u32);
    for _ in 0..3 {
        let z2 = z * z;
        z *= 1.2 - 0.2 * (a * z2 * z2 * z);
    }
    let z2 = z * z;
    a * (a * z2 * z2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_is_the_power() {
        assert_eq!(power(0.0), 0.0);
        let mut worst = 0.0f64;
        for i in 0..20_000 {
            let x = 10f32.powf(-7.0 + i as f32 / 2_500.0);
            let exact = f64::from(x).powf(2.4);
            worst = worst.max((f64::from(power(-x)) / exact - 1.0).abs());
        }
        assert!(worst < 1e-6, "{worst}");
    }

    #[test]
    fn rounding_is_to_even_and_clamped() {
        let grid = LaneGrid { scale: [0.5; LANES], zero: [3.0; LANES] };
        let mut w = [0.0; LANES];
        w[..8].copy_from_slice(&[0.25, 0.75, -0.25, -0.75, 1e30, -1e30, 1.9, -1.25]);
        let (level, value) = round(&w, &grid, 7.0);
        assert_eq!(level[..8], [0.0, 2.0, 0.0, -2.0, 4.0, -3.0, 4.0, -2.0]);
        assert_eq!(value[4], 2.0);
        assert_eq!(codes(&level, &grid)[..8], [3, 5, 3, 1, 7, 0, 7, 1]);
    }
}
