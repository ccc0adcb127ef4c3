//! Checksums of files of tensors that are still being written: what is there is read behind whoever writes, from the first byte on, so
//! that little is left to read when the last tensor has its place.

use super::checksum::{Check, Checksum, Pieces};
use super::write::Writer;
use anyhow::Result;
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long nothing may come before it is asked whether to go on.
const PATIENCE: Duration = Duration::from_millis(50);

/// The files of a [`Writer`] as they grow.
#[derive(Debug)]
pub(crate) struct Growing {
    /// Each with its tensors in order, and the byte behind each.
    files: Vec<(PathBuf, Vec<(String, u64)>)>,
    /// Names of tensors that have their place.
    written: Mutex<HashSet<String>>,
    more: Condvar,
}

impl Growing {
    /// The files of `writer`, with the tensors that it has written so far.
    pub(crate) fn of(writer: &Writer) -> Self {
        Self { files: writer.file_contents(), written: Mutex::new(writer.written().clone()), more: Condvar::new() }
    }

    /// Says that tensors were written.
    pub(crate) fn grow(&self, names: impl IntoIterator<Item = String>) {
        self.names().extend(names);
        self.more.notify_all();
    }

    /// SHA-256 of the files, once all of their tensors are written, by path. Errors for a file that cannot be read, and with that of
    /// `check`, which is asked all the time.
    pub(crate) fn checksums(&self, check: Check<'_>) -> Result<BTreeMap<PathBuf, String>> {
        let mut sums = BTreeMap::new();
        for (path, tensors) in &self.files {
            let (mut file, mut checksum, mut at) = (Pieces::of(path)?, Checksum::default(), 0);
            for (name, end) in tensors {
                self.wait_for(name, check)?;
                file.read(end - at, check, &mut |piece| checksum.update(piece))?;
                at = *end;
            }
            sums.insert(path.clone(), checksum.finish());
        }
        Ok(sums)
    }

    fn wait_for(&self, name: &str, check: Check<'_>) -> Result<()> {
        let mut written = self.names();
        while !written.contains(name) {
            check()?;
            written = self.more.wait_timeout(written, PATIENCE).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn names(&self) -> MutexGuard<'_, HashSet<String>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::checksum::of_bytes;
    use anyhow::bail;
    use std::fs;

    /// Two tensors of four bytes behind a header of two, of which the second comes first.
    fn growing(folder: &std::path::Path) -> Growing {
        let path = folder.join("weights");
        fs::write(&path, b"hdaaaabbbb").unwrap();
        let tensors = vec![("a".to_owned(), 6), ("b".to_owned(), 10)];
        Growing { files: vec![(path, tensors)], written: Mutex::new(HashSet::from(["b".into()])), more: Condvar::new() }
    }

    #[test]
    fn files_are_read_as_far_as_they_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let growing = growing(folder.path());
        let sums = std::thread::scope(|scope| {
            let sums = scope.spawn(|| growing.checksums(&|| Ok(())));
            growing.grow(["a".to_owned()]);
            sums.join().unwrap().unwrap()
        });
        assert_eq!(sums, BTreeMap::from([(folder.path().join("weights"), of_bytes(b"hdaaaabbbb"))]));
    }

    #[test]
    fn what_never_comes_is_not_waited_for_when_nobody_wants_it() {
        let folder = tempfile::tempdir().unwrap();
        let asked = std::sync::atomic::AtomicUsize::new(0);
        let give_up = || match asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            0..3 => Ok(()),
            _ => bail!("given up"),
        };
        let error = growing(folder.path()).checksums(&give_up).unwrap_err();
        assert_eq!(error.to_string(), "given up");
    }
}
