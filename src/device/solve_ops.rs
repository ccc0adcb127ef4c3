//! What the statistics and the solver need of a device.

use super::Device;

/// Weighted second-order statistics, factorization and blockwise error propagation on float32 tensors.
pub trait SolveOps: Device {}
