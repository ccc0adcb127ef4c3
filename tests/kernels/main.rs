//! The CUDA kernels, one by one, on the emulator; the emulator itself; their machine code, and their C API.

mod activations;
mod attention;
mod block;
mod buffers;
mod c_api;
mod calls;
mod emulator;
mod factor;
mod factors;
mod group_grid;
mod pack;
mod product;
mod rows;
mod sass;
mod solve;
mod solving;
mod statistics;
#[path = "../support/mod.rs"]
mod support;
