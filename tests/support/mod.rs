//! What several test programs share; what one alone uses lies in its own folder.

// Each program includes all of this and uses a part of it. Nowhere else is unused code of tests let through.
#![allow(dead_code, unreachable_pub)]

pub mod alone;
pub mod checkpoint;
pub mod devices;
pub mod golden;
pub mod kernels;
#[cfg(feature = "run")]
pub mod picture;
pub mod process;
#[cfg(feature = "run")]
pub mod program;
pub mod ties;

use std::path::{Path, PathBuf};
use vlmq::tensor::Matrix;

/// A file of tests/data.
pub fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

/// A file of tests/golden.
pub fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

/// The whole chain of causes of an error, as the program prints it.
pub fn message<T>(result: anyhow::Result<T>) -> String {
    match result {
        Ok(_) => "no error".to_owned(),
        Err(error) => format!("{error:#}"),
    }
}

/// Numbers without pattern or period in [-1, 1), of 24 bits each.
pub fn uniform(seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    })
}

/// Sums of four uniform values, columns of different loudness, each column leaning on its neighbour.
pub fn noise(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut values = uniform(seed);
    let mut next = || values.next().unwrap();
    let mut x = Matrix::zeros(rows, cols);
    for r in 0..rows {
        let mut before = 0.0;
        for (c, value) in x.row_mut(r).iter_mut().enumerate() {
            before = 0.4 * before + next() + next() + next() + next();
            *value = before * (1.0 + (c % 7) as f32 * 0.3);
        }
    }
    x
}
