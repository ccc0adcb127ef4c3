//! What a run will take, before it begins: memory, disk and time, and what it then took.
#![cfg(feature = "run")]

mod counting;
mod dry_run;
mod evaluation;
mod host;
mod inspect;
mod memory;
mod published;
mod sparse;
#[path = "../support/mod.rs"]
mod support;
mod work;
