//! The programs: quantizing a checkpoint, counting what that takes, evaluating, inspecting, verifying.

mod ahead;
mod awaited;
mod blocks;
mod devices;
mod dry_run;
mod encode;
pub mod evaluation;
mod findings;
mod input;
pub mod inspect;
mod places;
mod quantization;
mod resume;
mod start;
mod tail;
pub mod verify;
mod walk;

pub use crate::report::settings::{CHUNK_TOKENS, RunSettings};
pub use devices::{Runs, dry_run, plan, run};
pub use dry_run::DryRun;
pub use input::linear_specs;
pub use quantization::count;
pub use resume::Unfinished;
