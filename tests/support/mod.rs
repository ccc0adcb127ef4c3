//! What several test files share.

// Each test program includes this folder and uses a part of it.
#![allow(dead_code, unreachable_pub)]

pub mod activations;
pub mod checkpoint;
pub mod golden;
pub mod kernels;
#[cfg(feature = "run")]
pub mod program;

use std::path::{Path, PathBuf};

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
