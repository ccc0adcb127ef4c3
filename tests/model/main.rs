//! Models of every family: their activations, and what is wrong with one of them.
#![cfg(feature = "run")]

mod bad_models;
mod families;
mod forward;
mod llava_onevision;
#[path = "../support/mod.rs"]
mod support;
