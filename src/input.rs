//! Files that strangers wrote: how much of one is read, and where it may lie.
//!
//! Whoever reads a checkpoint or data has not written it. A file may be huge, or no file at all but a pipe that never ends,
//! and a link or a path in it may lead to something that is none of its author's business.

pub(crate) mod json;

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Most bytes of config.json and the other small JSON files of a checkpoint. The largest known, a tokenizer_config.json
/// that lists all added tokens, has 1 MB.
pub(crate) const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Most values in such a file, about 100 bytes each in memory: that tokenizer_config.json has some 50,000.
pub(crate) const MAX_CONFIG_VALUES: usize = 1 << 18;

/// Most bytes of a list of shards: 100 bytes a tensor, [`MAX_TENSORS`](crate::checkpoint::MAX_TENSORS) of them.
pub(crate) const MAX_INDEX_BYTES: u64 = 128 << 20;

/// Most bytes of tokenizer.json. Qwen's has 7 MB, the largest known (Gemma 3) 33 MB.
#[cfg(feature = "run")]
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 128 << 20;

/// Most values in tokenizer.json: that of Gemma 3, with 262,144 tokens and 514,906 merges, has 1.9 million.
#[cfg(feature = "run")]
pub(crate) const MAX_TOKENIZER_VALUES: usize = 3 << 20;

/// Most bytes of a chat template; known ones have up to 20 kB. A compiler takes a time that grows with the square of its
/// longest expression: some seconds with this.
#[cfg(feature = "run")]
pub(crate) const MAX_TEMPLATE_BYTES: u64 = 64 << 10;

/// Most bytes of a file of conversations: LLaVA's instruction mix has 1.0 GB.
#[cfg(feature = "run")]
pub(crate) const MAX_DATA_BYTES: u64 = 4 << 30;

/// Most bytes of one line or entry of such a file: a largest image in base64 takes 342 MiB.
#[cfg(feature = "run")]
pub(crate) const MAX_ROW_BYTES: u64 = 512 << 20;

/// Most values in one: a conversation of a thousand turns with images has ten thousand.
#[cfg(feature = "run")]
pub(crate) const MAX_ROW_VALUES: usize = 1 << 18;

/// Opens a file of at most `limit` bytes for reading.
///
/// Errors, naming the path, where there is none, where it is a folder, a pipe or a device (asked before it is opened:
/// opening a pipe would wait for a writer), and where it is longer.
pub(crate) fn open(path: &Path, limit: u64) -> Result<File> {
    let cannot_read = || format!("cannot read {}", path.display());
    let found = std::fs::metadata(path).with_context(cannot_read)?;
    ensure!(found.is_file(), "{} is not a file, but {}", path.display(), kind(&found));
    ensure!(found.len() <= limit, "{} has {} bytes; the limit for such a file is {limit}", path.display(), found.len());
    File::open(path).with_context(cannot_read)
}

/// What stands in a file's place.
pub(crate) fn kind(found: &std::fs::Metadata) -> &'static str {
    if found.is_dir() { "a folder" } else { "a pipe, a socket or a device" }
}

/// Reads a file that somebody of this machine has named. Errors as [`open`].
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = open(path, limit)?;
    let mut bytes = Vec::new();
    // A file that grows meanwhile, or that claims to be empty as those in /proc do, ends here as well.
    file.take(limit + 1).read_to_end(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(bytes.len() as u64 <= limit, "{} grew beyond {limit} bytes, the limit for such a file", path.display());
    Ok(bytes)
}

/// Reads the file `name` of a checkpoint's folder, `None` where there is none. Errors as [`read`] and [`check_link`].
pub(crate) fn read_beside(folder: &Path, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
    let path = folder.join(name);
    match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        Ok(_) => {}
    }
    check_link(&path, folder)?;
    read(&path, limit).map(Some)
}

/// Refuses an entry of a checkpoint's folder that is a link out of it: with the folder somebody else's link may have come,
/// and what it leads to would be read, or copied into the output.
///
/// A download cache of Hugging Face keeps files as `models--NAME/blobs/HASH` and fills folders with links to these: such
/// links may lead anywhere. Weights are not asked: their files are large, linked for good reason, and nothing but tensors
/// of the checkpoint is taken from them.
pub(crate) fn check_link(path: &Path, folder: &Path) -> Result<()> {
    let cannot_read = |path: &Path| format!("cannot read {}", path.display());
    if !std::fs::symlink_metadata(path).with_context(|| cannot_read(path))?.is_symlink() {
        return Ok(());
    }
    let target = path.canonicalize().with_context(|| cannot_read(path))?;
    let home = folder.canonicalize().with_context(|| cannot_read(folder))?;
    ensure!(
        target.starts_with(&home) || is_blob(&target) || is_blob_beside(&target, &home),
        "{} is a link to {}, outside the checkpoint's folder; put a copy of that file in its place",
        path.display(),
        target.display()
    );
    Ok(())
}

/// Whether a path is `models--NAME/blobs/HASH`.
fn is_blob(path: &Path) -> bool {
    let mut names = path.ancestors().skip(1).filter_map(|parent| parent.file_name()?.to_str());
    names.next() == Some("blobs") && names.next().is_some_and(|name| name.starts_with("models--"))
}

/// Whether a path is `ANY/blobs/HASH` and the folder `ANY/snapshots/REVISION`: such a cache that was given another name.
fn is_blob_beside(path: &Path, folder: &Path) -> bool {
    let mut names = folder.ancestors().skip(1);
    let snapshots = names.next().and_then(Path::file_name);
    snapshots.is_some_and(|name| name == "snapshots")
        && names.next().map(|cache| cache.join("blobs")).as_deref() == path.parent()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_may_have_any_name() {
        let folder = Path::new("/c/mine/snapshots/0123");
        assert!(is_blob_beside(Path::new("/c/mine/blobs/ab"), folder));
        for other in ["/c/other/blobs/ab", "/c/mine/blobs/x/ab", "/c/mine/ab", "/blobs/ab"] {
            assert!(!is_blob_beside(Path::new(other), folder), "{other}");
        }
        assert!(!is_blob_beside(Path::new("/c/blobs/ab"), Path::new("/c/models/0123")));
    }

    #[test]
    fn blobs_are_those_of_a_download_cache() {
        assert!(is_blob(Path::new("/c/models--some--model/blobs/0123")));
        for other in ["/c/models--x/0123", "/c/blobs/0123", "/c/models--x/blobs/a/0123", "/c/datasets--x/blobs/0123"] {
            assert!(!is_blob(Path::new(other)), "{other}");
        }
    }
}
