//! Loops compiled for the widest vector instructions that the CPU has, and the functions that such loops may call.
//!
//! Only plain sums and products stand here, nothing fused: every CPU computes the same bits.

/// Runs `work` compiled for the best instruction set of this CPU. What it calls must be `#[inline(always)]` to take part.
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

/// Error function, within 2e-7 (Abramowitz and Stegun 7.1.26).
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let p = 1.061_405_4 * t - 1.453_152;
    let p = p * t + 1.421_413_8;
    let p = p * t - 0.284_496_74;
    let p = p * t + 0.254_829_6;
    (1.0 - p * t * exp(-x * x)).copysign(x)
}

/// Hyperbolic tangent, within 2e-7.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
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
    fn erf_matches_tabulated_values() {
        // Abramowitz and Stegun, table 7.1.
        let table = [(0.0, 0.0), (1.0, 0.842_700_8), (2.0, 0.995_322_3)];
        for (x, expected) in table {
            assert!((erf(x) - expected).abs() <= 2e-7, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x).abs(), erf(x).abs());
        }
        assert_eq!((erf(10.0), erf(-10.0)), (1.0, -1.0));
    }

    #[test]
    fn tanh_matches_the_standard_library() {
        for i in -2000..2000 {
            let x = i as f32 * 0.01;
            assert!((tanh(x) - x.tanh()).abs() < 2e-7, "tanh({x})");
        }
    }

    #[test]
    fn reductions_cover_their_tails() {
        for length in [0, 1, 15, 16, 17, 33] {
            let x: Vec<f32> = (0..length).map(|i| i as f32).collect();
            assert_eq!(sum(&x, |x| x), (0..length).sum::<i32>() as f32);
            assert_eq!(dot(&x, &x), (0..length).map(|i| i * i).sum::<i32>() as f32);
        }
    }
}
