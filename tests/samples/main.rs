//! Calibration and evaluation data: its forms, images, templates and tokens, and what is wrong with them.
#![cfg(feature = "run")]

mod anyres;
mod bad_data;
mod bad_templates;
mod brought;
mod forms;
mod golden;
#[path = "../support/mod.rs"]
mod support;
