//! Scores of quantized models: metrics and benchmarks.
#![cfg(feature = "run")]

mod metrics;
mod presets;
#[path = "../support/mod.rs"]
mod support;
