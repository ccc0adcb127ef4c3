//! Folders made of bytes.

use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A file's name and content.
pub type File<'a> = (&'a str, &'a [u8]);

/// The sources of the crate, for whoever includes these files.
pub fn sources() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    if here.ends_with("fuzz") { here.join("..") } else { here.to_path_buf() }
}

/// Files out of one input: a line `-- NAME --` begins each. What comes before the first is `first`.
pub fn parts<'a>(bytes: &'a [u8], first: &'a str) -> Vec<File<'a>> {
    let mut files = Vec::new();
    let (mut name, mut start, mut at) = (first, 0, 0);
    while at < bytes.len() {
        let end = bytes[at..].iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |length| at + length + 1);
        if let Some(next) = marker(&bytes[at..end]) {
            files.push((name, &bytes[start..at]));
            (name, start) = (next, end);
        }
        at = end;
    }
    files.push((name, &bytes[start..]));
    // An input that begins with a marker has no unnamed part.
    files.retain(|&(name, content)| !(name == first && content.is_empty()));
    files
}

/// The name in a marker, if it is a plain one.
fn marker(line: &[u8]) -> Option<&str> {
    let name = line.strip_prefix(b"-- ")?.strip_suffix(b" --\n")?;
    let plain = name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(byte));
    let name = std::str::from_utf8(name).ok()?;
    (plain && (1..64).contains(&name.len()) && !name.starts_with('.')).then_some(name)
}

/// A folder with these files; of two of one name the later one.
pub fn folder(files: &[File<'_>]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content).expect("room for a small file");
    }
    folder
}
