//! The solve of one layer (method section 3): written once, over the operations of a device.

mod assembly;
mod checks;
mod layer;
mod prepare;
mod propagation;
mod round;

#[cfg(feature = "run")]
pub(crate) use checks::rule_of;
pub use layer::solve_layer;
pub use prepare::{Prepared, prepare};
pub use propagation::{Enqueued, enqueue, solve};
pub use round::{round_to_nearest, rounding_bytes};
