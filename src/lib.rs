//! VLMQ: post-training quantization of vision-language models (arXiv 2508.03351).
//!
//! The pipeline, in the order in which data walks through it:
//!
//! 1. [`checkpoint`] maps a Hugging Face folder into memory and hands out tensors when they are asked for.
//! 2. `data` reads conversations and images and turns each into token ids, pixel patches and positions.
//! 3. `model` runs the vision tower once and then the decoder, one block at a time, on two paths: the *float path*,
//!    where nothing is quantized, and the *quantized path*, where every earlier layer is.
//! 4. [`quantize`] reads every token's importance off the gradient of a local attention loss, accumulates the weighted
//!    second-order [`statistics`](quantize::statistics), and [`solve`](quantize::solve)s each linear layer for its codes.
//! 5. [`checkpoint::write`] packs the codes and writes a folder that other people's software loads.
//! 6. `evaluate` decodes greedily and scores float and quantized checkpoints alike.
//!
//! All arithmetic goes through the operations of a [`device`]; the method itself is written once, above them.
//!
//! Without the default feature `run` the crate holds what quantizing plain matrices needs and nothing else.

pub mod checkpoint;
pub mod codes;
pub mod device;
mod input;
mod parallel;
pub mod progress;
pub mod quantize;
pub mod tensor;

#[cfg(feature = "run")]
pub mod data;
#[cfg(feature = "run")]
pub mod evaluate;
#[cfg(feature = "run")]
pub mod heap;
#[cfg(feature = "run")]
pub mod model;
#[cfg(feature = "run")]
pub mod plan;
#[cfg(feature = "run")]
pub mod report;
#[cfg(feature = "run")]
pub mod run;
