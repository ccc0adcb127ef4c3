//! The method: importance, statistics, order, grid, solve, packing.

mod layer;
mod order;
pub mod pack;
pub mod plain;
pub mod report;
pub mod settings;
pub mod solve;
pub mod statistics;

#[cfg(feature = "run")]
pub mod block;
#[cfg(feature = "run")]
pub mod importance;
#[cfg(feature = "run")]
pub mod inspect;
#[cfg(feature = "run")]
pub mod pipeline;

pub use layer::{QuantizedLinear, SolveReport};
pub use order::processing_order;
