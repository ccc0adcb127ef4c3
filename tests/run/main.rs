//! Whole runs of the program: what they write and say, how they end, and how they go on.
#![cfg(feature = "run")]

mod bad_input;
mod command_line;
mod end_to_end;
mod findings;
#[cfg(target_os = "linux")]
mod fuzz_seeds;
#[cfg(unix)]
mod killed;
#[cfg(unix)]
mod limits;
mod model_check;
mod pipeline;
mod report;
mod resume;
mod resuming;
#[path = "../support/mod.rs"]
mod support;
mod verify;
#[cfg(unix)]
mod work_folder;
