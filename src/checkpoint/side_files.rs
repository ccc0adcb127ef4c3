//! What stands beside the weights of a checkpoint and goes into a copy as it is.

use super::work::{cannot_write, parent_of};
use crate::input::check_link;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The one sub-folder that belongs to a checkpoint: transformers keeps further chat templates there.
pub(crate) const TEMPLATES: &str = "additional_chat_templates";

/// The files of a checkpoint that go into a copy as they are, by their names in `source`, in order; sub-folders that stay behind
/// are named in a warning.
pub(crate) fn side_files(source: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let shown = source.join(&folder);
        let cannot_read = || format!("cannot read the folder {}", shown.display());
        for entry in fs::read_dir(&shown).with_context(cannot_read)? {
            let entry = entry.with_context(cannot_read)?;
            let (path, name) = (entry.path(), folder.join(entry.file_name()));
            let name_text = entry.file_name().to_string_lossy().into_owned();
            if name_text.starts_with('.') {
                continue;
            }
            // Follows links: download caches keep the files elsewhere. What a stranger's link leads to is not copied.
            let kind = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
            // Not below itself: links may go round in circles.
            if kind.is_dir() && name_text == TEMPLATES && folder == Path::new("") {
                check_link(&path, source)?;
                folders.push(name);
            } else if kind.is_dir() {
                log::warn!("the sub-folder {} is not copied", path.display());
            } else if kind.is_file() && !is_replaced(&name_text) {
                check_link(&path, source)?;
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Copies them.
pub(crate) fn copy_side_files(source: &Path, target: &Path) -> Result<()> {
    for name in side_files(source)? {
        let to = target.join(&name);
        let folder = parent_of(&to);
        fs::create_dir_all(folder).with_context(|| cannot_write(folder))?;
        copy(&source.join(&name), &to)?;
    }
    Ok(())
}

/// Whether a file of the source holds weights, or describes them, and so has no place in the copy.
pub(crate) fn is_replaced(name: &str) -> bool {
    name.ends_with(".safetensors")
        || name.ends_with(".safetensors.index.json")
        || name.starts_with("pytorch_model") && (name.ends_with(".bin") || name.ends_with(".bin.index.json"))
        || name == "quantize_config.json"
        || name == "config.json"
}

/// Copies contents only: a read-only source must not make a read-only copy.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).with_context(|| format!("cannot read {}", from.display()))?;
    let mut copy = File::create(to).with_context(|| cannot_write(to))?;
    std::io::copy(&mut source, &mut copy)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
