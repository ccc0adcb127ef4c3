//! What the tests of kernels/decoder share: lengths of rows, and values that are rounded once.

use crate::buffers::{BF16, F16, F32};
use crate::support::kernels::Variant;
use vlmq::device::cuda::bindings::vlmq_dtype;
use vlmq::tensor::Matrix;

/// Half the distance of neighbours, relative: what one rounding to the type may change.
fn rounding(dtype: vlmq_dtype) -> f64 {
    match dtype {
        F32 => 2f64.powi(-24),
        BF16 => 2f64.powi(-8),
        _ => 2f64.powi(-11),
    }
}

/// Lengths of a row: less than an access, odd, whole accesses, several rounds of a block.
pub(crate) fn lengths() -> &'static [usize] {
    match Variant::current() {
        Variant::Plain => &[1, 2, 8, 17, 33, 64, 127, 128, 129, 2048, 3584, 4100],
        _ => &[1, 33, 128, 520],
    }
}

/// A matrix of the CPU device.
pub(crate) fn matrix(rows: usize, cols: usize, values: &[f32]) -> Matrix {
    Matrix::new(rows, cols, values.to_vec()).unwrap()
}

/// Fails unless each value is the reference rounded once, up to `slack` of the largest reference.
pub(crate) fn assert_rounded_once(dtype: vlmq_dtype, values: &[f32], reference: &[f32], slack: f64, what: &str) {
    assert_eq!(values.len(), reference.len(), "{what}");
    let largest = reference.iter().fold(0f64, |a, &b| a.max(f64::from(b).abs()));
    // Below the normal numbers of f16 its values lie 2^-24 apart.
    let smallest = if dtype == F16 { 2f64.powi(-25) } else { 0.0 };
    for (i, (&value, &expected)) in values.iter().zip(reference).enumerate() {
        let error = (f64::from(value) - f64::from(expected)).abs();
        let allowed = rounding(dtype) * f64::from(expected).abs() + slack * largest + smallest;
        assert!(error <= allowed, "{what}: {value} instead of {expected} at {i}");
    }
}
