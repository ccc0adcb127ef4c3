//! The hidden folder beside an output in which it grows: `.NAME.vlmq`. It is all that a killed run leaves behind.

use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

/// Held by the run that is alive; the system lets go of it with the process, however that ends.
const LOCK: &str = "lock";

/// The checkpoint that grows.
const CHECKPOINT: &str = "checkpoint";

/// The file that makes a run of the folder's contents, which another process may go on with: written when all else is there,
/// removed first.
pub const RUN: &str = "run.json";

/// An output's work folder, locked for this process. Dropping it removes it unless it is to be [kept](Self::keep).
#[derive(Debug)]
pub struct WorkFolder {
    target: PathBuf,
    path: PathBuf,
    keep: bool,
    /// Open as long as the folder is ours.
    _lock: File,
}

impl WorkFolder {
    /// Takes the work folder of `target`, and creates it where there is none. What an earlier run left in it is there, and
    /// kept.
    ///
    /// Errors as [`check_target`] does, where another process writes this output (naming it), and for a folder of that name
    /// that is not ours.
    pub fn open(target: &Path) -> Result<Self> {
        check_target(target)?;
        let path = path_of(target)?;
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => check_ours(&path)?,
            Err(error) => {
                let parent = parent_of(target).display();
                return Err(error).with_context(|| format!("cannot create a folder in {parent}; choose another --out"));
            }
        }
        let lock = lock(&path, target)?;
        let keep = path.join(RUN).exists();
        Ok(Self { target: target.to_path_buf(), path, keep, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the checkpoint grows.
    pub fn checkpoint(&self) -> PathBuf {
        self.path.join(CHECKPOINT)
    }

    /// Whether there is a checkpoint that grows: it has left when the run was finished.
    pub fn has_checkpoint(&self) -> bool {
        self.checkpoint().exists()
    }

    /// Whether the folder outlives this process.
    pub fn keep(&mut self, keep: bool) {
        self.keep = keep;
    }

    /// Whether it does.
    pub fn is_kept(&self) -> bool {
        self.keep
    }

    /// Removes what is in the folder.
    pub fn clear(&mut self) -> Result<()> {
        self.keep = false;
        self.empty().with_context(|| format!("cannot clear {}", self.path.display()))
    }

    fn empty(&self) -> std::io::Result<()> {
        match fs::remove_file(self.path.join(RUN)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_name() == LOCK {
                continue;
            }
            match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(entry.path())?,
                false => fs::remove_file(entry.path())?,
            }
        }
        Ok(())
    }

    /// Writes a small file into the folder: either all of it is there afterwards, on the disk, or what was there before.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (path, partial) = (self.path.join(name), self.path.join(format!("{name}.partial")));
        let write = || {
            let mut file = File::create(&partial)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&partial, &path)
        };
        write().with_context(|| cannot_write(&path))?;
        sync_folder(&self.path)
    }

    /// Makes the finished checkpoint appear under the output's name and removes the rest. Errors where something of that name
    /// has appeared meanwhile.
    pub fn finish(&mut self) -> Result<()> {
        refuse_existing(&self.target)?;
        fs::rename(self.checkpoint(), &self.target)
            .with_context(|| format!("cannot rename the finished folder to {}", self.target.display()))?;
        self.keep = false;
        sync_folder(parent_of(&self.target))
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // The lock last: as long as it is there, nobody takes the folder for free.
        let removed = self.empty().and_then(|()| fs::remove_file(self.path.join(LOCK)));
        if let Err(error) = removed.and_then(|()| fs::remove_dir(&self.path)) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Takes the lock, and says in it who has it.
fn lock(folder: &Path, target: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let cannot_lock = || format!("cannot lock {}", path.display());
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| cannot_write(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            let holder = if holder.is_empty() { "unknown" } else { holder.trim() };
            bail!(
                "{} is being written by another run (process {holder}); wait for its end, or end it",
                target.display()
            );
        }
        Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
            log::warn!(
                "{}: this file system has no locks; see to it that no two runs write one output",
                folder.display()
            );
        }
        Err(TryLockError::Error(error)) => return Err(error).with_context(cannot_lock),
    }
    // Whoever held it may have removed the folder while we waited at the door: then this lock is of a file without a name.
    ensure!(
        same_file(&file, &path),
        "{} was being written by another run, which has just ended; start again",
        target.display()
    );
    let write = || {
        file.set_len(0)?;
        write!(&file, "{}", std::process::id())
    };
    write().with_context(|| cannot_write(&path))?;
    Ok(file)
}

/// Whether an open file is the one that has this name now.
fn same_file(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let identity = |found: fs::Metadata| (found.dev(), found.ino());
        file.metadata().map(identity).ok() == fs::metadata(path).map(identity).ok()
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

/// Refuses a folder that has the name and was not made here: it would be emptied.
fn check_ours(path: &Path) -> Result<()> {
    let cannot_read = || format!("cannot read {}", path.display());
    let found = fs::symlink_metadata(path).with_context(cannot_read)?;
    let ours =
        found.is_dir() && (path.join(LOCK).exists() || fs::read_dir(path).with_context(cannot_read)?.next().is_none());
    ensure!(ours, "{} is in the way: runs keep their work there, but this is not a run's; move it", path.display());
    Ok(())
}

/// `.NAME.vlmq` beside an output.
fn path_of(target: &Path) -> Result<PathBuf> {
    let name = target
        .file_name()
        .with_context(|| format!("{:?} is no name for an output folder; choose another --out", target.display()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".vlmq");
    Ok(parent_of(target).join(hidden))
}

/// Refuses an output folder that could not be created: one that exists, has no name, or lies where nothing can be written.
/// Leaves nothing behind, not for a moment.
pub fn check_target(target: &Path) -> Result<()> {
    refuse_existing(target)?;
    path_of(target)?;
    let parent = parent_of(target);
    ensure!(
        parent.is_dir(),
        "the output {} cannot be written: there is no folder {}; create it first",
        target.display(),
        parent.display()
    );
    // Where the system cannot be asked, creating the work folder shows it.
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{Access, access};
        access(parent, Access::WRITE_OK | Access::EXEC_OK)
            .map_err(std::io::Error::from)
            .with_context(|| format!("cannot create a folder in {}; choose another --out", parent.display()))?;
    }
    Ok(())
}

fn refuse_existing(target: &Path) -> Result<()> {
    // A dangling link exists too, and a rename would replace it.
    if fs::symlink_metadata(target).is_err() {
        return Ok(());
    }
    sweep(target);
    bail!("{} exists. Remove it or choose another output folder with --out.", target.display())
}

/// Removes what a run left behind that was killed between the rename of its output and its own end.
fn sweep(target: &Path) {
    let Ok(path) = path_of(target) else { return };
    if !path.join(LOCK).exists() || path.join(CHECKPOINT).exists() {
        return;
    }
    if let Ok(lock) = lock(&path, target) {
        drop(WorkFolder { target: target.to_path_buf(), path, keep: false, _lock: lock });
    }
}

pub(crate) fn parent_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

pub(crate) fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

/// Creates `path` with `length` bytes of space.
///
/// On Linux the space is taken now, so that a disk too small fails here and not after hours of solving.
pub(crate) fn reserve(path: &Path, length: u64) -> Result<File> {
    let create = || {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        #[cfg(target_os = "linux")]
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length.max(1)) {
            // Some file systems cannot: then a full disk shows when the data comes.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(error) => return Err(std::io::Error::from(error)),
        }
        file.set_len(length)?;
        Ok(file)
    };
    create().with_context(|| format!("{} of {length} bytes", cannot_write(path)))
}

/// Brings the entries of a folder to the disk, where the system has a way to.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .with_context(|| format!("cannot bring {} to the disk", folder.display()))?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}
