//! What a device's memory holds while a model is evaluated, by the names under which it is [made](crate::device::Device::label).

/// The last norm, and the vision tower where it is held.
pub const WEIGHTS: &str = "weights";

/// Blocks that are held.
pub const BLOCKS: &str = "blocks";

/// The output head, where it is held.
pub const HEAD: &str = "output head";

/// The vision tower, where it is loaded for some images.
pub const TOWER: &str = "loaded vision tower";

/// A block that is loaded for a pass.
pub const LOADED: &str = "loaded block";

/// Some rows of the output head that are loaded.
pub const ROWS: &str = "loaded rows of the output head";

/// What the vision tower makes of images.
pub const FEATURES: &str = "image features";

/// Residual streams, their rotary tables, and image features for later blocks.
pub const STREAMS: &str = "streams";

/// What one block makes of a stream.
pub const PASS: &str = "pass through a block";

/// What adds image features behind a block.
pub const LEVELS: &str = "image features behind a block";

/// Keys and values that are kept.
pub const CACHE: &str = "keys and values";

/// Logits.
pub const LOGITS: &str = "logits";
