//! Calibration and evaluation data: conversations, images, templates, token sequences.
//!
//! [`dataset::read`] reads a file of conversations, [`dataset::select`] draws a sample, and [`sequence::collect`] turns
//! each into what a model takes: token ids, images cut to patches, and positions.

pub mod anyres;
mod bounded;
mod checked;
pub mod chunks;
mod clock;
mod conversation;
pub mod dataset;
mod forms;
pub mod image;
mod json;
mod methods;
pub mod metric;
pub mod native_resolution;
pub mod patches;
mod paths;
pub mod positions;
mod rows;
pub mod sequence;
pub mod source;
mod splitter;
pub mod template;
mod tiles;
mod tokenizer;
pub mod view;

pub use bounded::TakesTooLong;
