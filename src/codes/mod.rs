//! Quantized layers as they are handed on and stored: codes with their scales and zeros, how a file lays them out, and the packing
//! of narrow codes into words.

mod layout;
mod linear;
pub mod pack;

pub use layout::{CodeLayout, Order};
pub use linear::QuantizedLinear;
