//! The models: vision towers, the decoder, rotary positions, and the families that put them together.

pub mod positions;
pub mod inspect;
