//! The method: importance, statistics, order, grid, solve, packing.

mod finding;
mod layer;
mod order;
pub mod pack;
pub mod plain;
pub mod settings;
pub mod solve;
pub mod statistics;

#[cfg(feature = "run")]
pub mod block;
#[cfg(feature = "run")]
pub mod card;
#[cfg(feature = "run")]
pub mod check;
#[cfg(feature = "run")]
pub mod importance;
#[cfg(feature = "run")]
pub mod inspect;
#[cfg(feature = "run")]
pub mod pipeline;
#[cfg(feature = "run")]
pub mod plan;
#[cfg(feature = "run")]
pub mod provenance;
#[cfg(feature = "run")]
pub mod report;
#[cfg(feature = "run")]
pub mod split;
#[cfg(feature = "run")]
pub mod verify;

pub use finding::{Finding, FindingKind};
pub use layer::{QuantizedLinear, SolveReport};
pub use order::processing_order;
