//! Evaluation: greedy decoding, log-likelihood, divergence, metrics.
