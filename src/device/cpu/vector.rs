//! Loops compiled for the widest vector instructions that the CPU has, and the functions that such loops may call.
//!
//! Only plain sums and products stand here, nothing fused: every CPU computes the same bits.

/// Runs `work` compiled for the best instruction set of this CPU. What it calls must be `#[inline(always)]` to take part. The compiler
/// leaves a long closure out of it, and one that is handed a function: those want a type of their own ([`pulp::NullaryFnOnce`]).
pub(crate) fn dispatch<R>(work: impl FnOnce() -> R) -> R {
    struct Work<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Work<F> {
        type Output = R;

        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Work(work))
}

/// Partial sums of a reduction: their number is fixed, so the order of additions is too.
pub(crate) const LANES: usize = 16;

/// `Σ a·b` in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// `Σ f(x)` in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail: f32 = chunks.remainder().iter().map(|&x| f(x)).sum();
    for x in chunks {
        for lane in 0..LANES {
            sums[lane] += f(x[lane]);
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// `Σ (scale·x)²` in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn scaled_squares(x: &[f32], scales: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (chunks, scale_chunks) = (x.chunks_exact(LANES), scales.chunks_exact(LANES));
    let tail = chunks.remainder().iter().zip(scale_chunks.remainder());
    let tail: f32 = tail.map(|(x, scale)| (x * scale) * (x * scale)).sum();
    for (x, scale) in chunks.zip(scale_chunks) {
        for lane in 0..LANES {
            let scaled = x[lane] * scale[lane];
            sums[lane] += scaled * scaled;
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// `e^x` to about one unit in the last place; at least the smallest normal number, at most a finite one. NaN stays NaN.
///
/// Argument reduction by ln 2 in two parts and the polynomial of Cephes' `expf` (S. Moshier).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Written so that NaN passes.
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let power_of_two = f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f80_0000));
    (p * r * r + r + 1.0) * power_of_two
}

/// Complementary error function, to 2e-6 of its value where that is a normal number (x < 9.1), less than 1e-36 beyond.
///
/// For x ≥ 0 it is `t·P(t)·e^(−x²)` with `t = 1/(1 + x/2)`; P is the polynomial of degree 8 whose largest relative error
/// over [0, 10] is least (4e-8).
#[inline(always)]
pub(crate) fn erfc(x: f32) -> f32 {
    let y = x.abs();
    let t = 1.0 / (1.0 + 0.5 * y);
    let p = -0.059_068_97;
    let p = p * t + 0.284_575;
    let p = p * t - 0.487_199_96;
    let p = p * t + 0.278_067_2;
    let p = p * t - 0.026_625_7;
    let p = p * t + 0.202_686_88;
    let p = p * t + 0.243_103_76;
    let p = p * t + 0.282_375_3;
    let p = p * t + 0.282_086_43;
    // The upper half of y has a square without rounding, which at y = 9 would be worth 40 units in the last place.
    let high = f32::from_bits(y.to_bits() & 0xffff_f000);
    let above = p * t * exp(-high * high) * exp((high - y) * (high + y));
    if x < 0.0 { 2.0 - above } else { above }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in 0..200_000 {
            let x = -87.0 + i as f32 * (175.0 / 200_000.0);
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.4e-7, "exp({x}) = {}, {error:e} off", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e9) < 1.3e-38 && exp(1e9).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn erfc_keeps_its_digits_in_the_tail() {
        // By mpmath.
        let table = [
            (0.0, 1.0),
            (0.5, 0.479_500_122_186_953),
            (1.0, 0.157_299_207_050_285_13),
            (2.828_427, 6.334_250_198_949_64e-5),
            (4.0, 1.541_725_790_028e-8),
            (9.0, 4.137_031_746_513_81e-37),
            (-1.0, 1.842_700_792_949_715),
            (-10.0, 2.0),
        ];
        for (x, expected) in table {
            let error = (f64::from(erfc(x)) - expected).abs() / expected;
            assert!(error < 2e-6, "erfc({x}) = {:e}, {error:e} off", erfc(x));
        }
        assert!(erfc(1e9) < 1e-36 && erfc(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_cover_their_tails() {
        for length in [0, 1, 15, 16, 17, 33] {
            let x: Vec<f32> = (0..length).map(|i| i as f32).collect();
            assert_eq!(sum(&x, |x| x), (0..length).sum::<i32>() as f32);
            assert_eq!(dot(&x, &x), (0..length).map(|i| i * i).sum::<i32>() as f32);
            let scales: Vec<f32> = (0..length).map(|i| (i % 3) as f32).collect();
            let expected: i32 = (0..length).map(|i| (i * (i % 3)).pow(2)).sum();
            assert_eq!(scaled_squares(&x, &scales), expected as f32);
        }
    }
}
