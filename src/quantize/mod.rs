//! The method: settings, importance, statistics, order, solve, block, findings.

mod finding;
mod layer;
pub mod order;
pub mod plain;
pub mod settings;
pub mod solve;
pub mod statistics;

#[cfg(feature = "run")]
pub mod block;
#[cfg(feature = "run")]
pub mod importance;

pub use finding::{Finding, FindingKind};
pub use layer::SolveReport;
pub use order::processing_order;
