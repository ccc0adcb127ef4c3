//! Files of conversations: JSON Lines, or one JSON list.

pub use super::conversation::{Conversation, Message, Part};
pub use super::source::ImageSource;

use super::{forms, rows};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// Reads all conversations of a file, whichever of the forms in docs/data.md each line has.
///
/// A relative image path counts from `image_root`, or from the file's folder when there is none, and every path must lead
/// below it. Images are not read yet. Errors name the file and line; a file without conversations is an error too.
pub fn read(path: &Path, image_root: Option<&Path>) -> Result<Vec<Conversation>> {
    read_with(path, image_root, &|_| false, &|row| Ok(row))
}

/// As [`read`], every line changed by `prepare` before its form is looked at. Its errors get the file and line, too.
///
/// Of a line it is given the columns that the forms know, and those that it `reads`, as they are; what other columns
/// hold is not kept.
pub fn read_with(
    path: &Path,
    image_root: Option<&Path>,
    reads: &dyn Fn(&str) -> bool,
    prepare: &dyn Fn(Value) -> Result<Value>,
) -> Result<Vec<Conversation>> {
    if let Some(root) = image_root {
        ensure!(root.is_dir(), "the image root {} is not a folder", root.display());
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let root: Arc<Path> = image_root.unwrap_or(folder).into();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let conversations = rows::read(path, reads, &|row, place| {
        let (origin, id) = (place.of(path), format!("{name}:{}", place.number()));
        prepare(row).and_then(|row| forms::conversation(&row, &root, &origin, id)).with_context(|| origin.clone())
    })?;
    ensure!(!conversations.is_empty(), "{} holds no conversations", path.display());
    Ok(conversations)
}

/// The first `samples` conversations (all when `None` or when there are fewer) in a shuffled order that depends on
/// `seed` alone.
pub fn select(mut conversations: Vec<Conversation>, samples: Option<usize>, seed: u64) -> Vec<Conversation> {
    fastrand::Rng::with_seed(seed).shuffle(&mut conversations);
    conversations.truncate(samples.unwrap_or(usize::MAX));
    conversations
}
