//! A device that counts: its tensors are shapes, its operations check what the real ones check, add up work by kind, and keep books
//! of the bytes that are alive. What the method takes of a device is known by running the method on this one.
//!
//! [`Counting::of`] stands for a device: it has that one's element type, its work space and its limit. What comes back to the host is
//! made up, and such that the method goes its usual way: nothing is broken, every factorization succeeds, no solve has an error.

mod books;
mod device;
mod ledger;
mod model_ops;
mod on_host;
mod pace;
mod solve_ops;
mod tensor;

pub use device::Counting;
pub use ledger::{Holding, Label, Peak, StandsFor};
pub use on_host::OnHost;
pub use solve_ops::CountedCodes;
pub use tensor::CountedTensor;
