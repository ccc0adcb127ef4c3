//! Checkpoints: reading, writing, other loaders, and files that are wrong.

#[cfg(all(feature = "run", unix))]
mod bad_files;
#[cfg(feature = "run")]
mod headers;
mod loaders;
mod read;
#[path = "../support/mod.rs"]
mod support;
mod write;
