//! SHA-256 of files and of what a run makes of them.

use crate::parallel::try_map;
use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A digest under way.
#[derive(Clone, Debug, Default)]
pub struct Checksum(Sha256);

impl Checksum {
    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Adds a field of a structure: its length first, so that two structures never read alike.
    pub fn field(&mut self, bytes: &[u8]) {
        self.update(&(bytes.len() as u64).to_le_bytes());
        self.update(bytes);
    }

    /// 64 lower-case hexadecimal digits, as `sha256sum` prints them.
    pub fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// SHA-256 of `bytes`, as `sha256sum` prints it.
pub fn of_bytes(bytes: &[u8]) -> String {
    let mut checksum = Checksum::default();
    checksum.update(bytes);
    checksum.finish()
}

/// SHA-256 of a file.
pub fn of_file(path: &Path) -> Result<String> {
    of_range_until(path, 0..u64::MAX, &|| Ok(()))
}

/// Bytes read at a time: a megabyte is no faster, and every thread holds as much for good.
const PIECE: usize = 1 << 17;

/// Whether to go on, asked with every piece that is read: an error ends the work.
pub type Check<'a> = &'a (dyn Fn() -> Result<()> + Sync);

/// SHA-256 of the bytes `range` of a file, as far as there are any. They are read, not mapped: a mapped file counts as memory
/// in use.
pub fn of_range(path: &Path, range: Range<u64>) -> Result<String> {
    of_range_until(path, range, &|| Ok(()))
}

/// As [`of_range`], as long as `check` lets it.
pub fn of_range_until(path: &Path, range: Range<u64>, check: Check<'_>) -> Result<String> {
    let mut checksum = Checksum::default();
    let mut buffer = vec![0; PIECE];
    let cannot_read = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(cannot_read)?;
    file.seek(SeekFrom::Start(range.start)).with_context(cannot_read)?;
    let mut file = file.take(range.end - range.start);
    loop {
        check()?;
        match file.read(&mut buffer).with_context(cannot_read)? {
            0 => return Ok(checksum.finish()),
            count => checksum.update(&buffer[..count]),
        }
    }
}

/// A file that is read once, from its first byte on, piece by piece.
pub(super) struct Pieces<'a> {
    path: &'a Path,
    file: File,
    buffer: Vec<u8>,
}

impl<'a> Pieces<'a> {
    /// The file `path`, of which nothing is read yet.
    pub(super) fn of(path: &'a Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self { path, file, buffer: vec![0; PIECE] })
    }

    /// Reads the next `length` bytes, as long as `check` lets it, and has `look` see each piece. Errors where there are fewer.
    pub(super) fn read(&mut self, length: u64, check: Check<'_>, look: &mut dyn FnMut(&[u8])) -> Result<()> {
        let mut left = length;
        while left > 0 {
            check()?;
            let piece = &mut self.buffer[..left.min(PIECE as u64) as usize];
            self.file.read_exact(piece).with_context(|| format!("cannot read {}", self.path.display()))?;
            look(piece);
            left -= piece.len() as u64;
        }
        Ok(())
    }
}

/// SHA-256 of files, by their names in `folder`. Files are read in parallel.
pub fn of_files(folder: &Path, files: &[PathBuf]) -> Result<BTreeMap<String, String>> {
    of_files_until(folder, files, &|| Ok(()))
}

/// As [`of_files`], as long as `check` lets it.
pub fn of_files_until(folder: &Path, files: &[PathBuf], check: Check<'_>) -> Result<BTreeMap<String, String>> {
    let sums =
        try_map(files.len(), |i| Ok((name_in(folder, &files[i]), of_range_until(&files[i], 0..u64::MAX, check)?)))?;
    Ok(sums.into_iter().collect())
}

/// The name under which a file of `folder` has its checksum.
pub(crate) fn name_in(folder: &Path, file: &Path) -> String {
    file.strip_prefix(folder).unwrap_or(file).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_standard() {
        // FIPS 180-4's example.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(of_bytes(b"abc"), abc);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(of_files(folder.path(), &[path]).unwrap()["abc"], abc);
        std::fs::write(folder.path().join("more"), "xabcx").unwrap();
        assert_eq!(of_range(&folder.path().join("more"), 1..4).unwrap(), abc);
        let message = format!("{:#}", of_file(&folder.path().join("none")).unwrap_err());
        assert!(message.contains("cannot read") && message.contains("none"), "{message}");
    }

    #[test]
    fn fields_are_told_apart() {
        let of = |fields: [&str; 2]| {
            let mut checksum = Checksum::default();
            fields.iter().for_each(|field| checksum.field(field.as_bytes()));
            checksum.finish()
        };
        assert_ne!(of(["ab", "c"]), of(["a", "bc"]));
    }
}
