//! Checkpoints in and out: Hugging Face folders of safetensors files.

#[cfg(feature = "run")]
pub mod checksum;
mod config;
mod convert;
mod file_layout;
pub mod formats;
#[cfg(feature = "run")]
pub(crate) mod growing;
mod linear;
mod mapped;
pub mod own;
pub(crate) mod planned;
pub mod read;
#[cfg(feature = "run")]
pub(crate) mod scan;
#[cfg(feature = "run")]
pub(crate) mod sealed;
mod shard;
pub(crate) mod side_files;
#[cfg(feature = "run")]
pub mod sums;
pub mod target;
pub mod weight_error;
pub mod work;
pub mod write;

pub use config::Packing;
pub use formats::{Format, GptqVersion, LinearSpec, Loader, Quantization};
pub use mapped::Mapped;
pub use planned::QuantizedCopy;
pub use read::{Checkpoint, StoredTensor};
pub use shard::MAX_TENSORS;
pub use work::WorkFolder;
pub use write::Writer;
