//! The method: importance, statistics, order, grid, solve, packing.

mod layer;
pub mod pack;
mod order;
pub mod plain;
#[cfg(feature = "run")]
pub mod pipeline;
pub mod report;
pub mod settings;
pub mod solve;
pub mod statistics;

pub use layer::{QuantizedLinear, SolveReport};
pub use order::processing_order;
