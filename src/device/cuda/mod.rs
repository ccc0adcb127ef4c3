//! The CUDA device: `kernels/` behind the operations of [`crate::device`].
//!
//! [`Cuda`] runs the kernels on a `Runtime` (`runtime.rs`), which is what they need around them: memory, copies, a
//! stream, and the plain matrix products that cuBLAS does best. There are two: a GPU through the driver, and the host
//! itself, for kernels built for the emulator (`kernels/emulator`). All of the library's code for a GPU is the same on both.
//!
//! Work is enqueued on one stream, in order; a call waits only where it hands numbers to the host. Tensors that are parked in
//! host memory, and fetched from it, are copied on a second one, beside the work. All else that the host hands over or gets
//! back goes through page-locked memory (`staging.rs`). What is allocated is counted (`heap.rs`), and comes from a pool that
//! the driver holds to the limit (`pool.rs`).
//!
//! `unsafe` stands in this folder alone. Raw addresses are made in it, from tensors whose shapes were checked against each
//! other just before, and none leaves it.

pub mod bindings;
mod blas;
mod codes;
mod device;
mod driver;
mod emulated;
mod heap;
mod kernels;
mod memory;
mod model_ops;
mod pool;
mod runtime;
mod solve_ops;
mod staging;
mod standalone;
mod tensor;

pub use codes::CudaCodes;
pub use device::Cuda;

pub use standalone::{CodeMatrix, CodesAlong};
pub use tensor::CudaTensor;
