//! The models: vision towers, the decoder, rotary positions, and the families that put them together.

mod cache;
pub mod config;
pub mod decoder;
pub mod families;
pub mod labels;
pub mod language_model;
pub mod parts;
pub mod rope;
pub mod source;
pub mod vision;
