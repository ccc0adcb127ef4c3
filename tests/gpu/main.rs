//! The library's CUDA device, on emulated kernels or on a GPU.

mod device;
mod faults;
#[cfg(feature = "run")]
mod memory;
#[cfg(feature = "run")]
mod pipeline;
#[path = "../support/mod.rs"]
mod support;
