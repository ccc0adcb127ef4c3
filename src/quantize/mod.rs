//! The method: importance, statistics, order, grid, solve, packing.

mod layer;
pub mod pack;
pub mod settings;
pub mod solve;
pub mod statistics;

pub use layer::{QuantizedLinear, SolveReport};
