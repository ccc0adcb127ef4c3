//! What a device's memory holds while a block is quantized, by the names under which it is [made](crate::device::Device::label).

/// The vision tower.
pub const TOWER: &str = "vision tower";

/// The residual streams of samples, their rotary tables, and image features for later blocks.
pub const STREAMS: &str = "residual streams";

/// Weights of the block on both paths.
pub const WEIGHTS: &str = "weights of a block";

/// Weights of the block behind it, which are there before their time where a device works beside its host.
pub const AHEAD: &str = "weights of the next block";

/// H and C of a layer's inputs.
pub const STATISTICS: &str = "statistics";

/// Statistics in processing order, and their factors.
pub const FACTORS: &str = "factors";

/// What a solve carries from block to block of columns, and its codes.
pub const SOLVER: &str = "solver's state";

/// What a pass makes of the chunk at work.
pub const PASS: &str = "intermediate results of a chunk";

/// H and C of a layer's outputs, by which its scales are refitted.
pub const REFIT: &str = "statistics of the outputs";

/// A layer that is rounded to nearest on the host, and its codes.
pub const ROUNDING: &str = "rounding to nearest";
