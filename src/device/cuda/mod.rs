//! The CUDA device: `kernels/` behind the operations of [`crate::device`].

pub mod bindings;
