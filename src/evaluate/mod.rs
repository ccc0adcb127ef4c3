//! Evaluation: greedy decoding, log-likelihood, divergence, metrics.

pub mod metrics;
