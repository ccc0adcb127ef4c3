//! The hidden folder beside an output in which it grows: `.NAME.vlmq`. It is all that a killed run leaves behind.

use super::own::{self, Foreign};
use super::own::{cannot_write, parent_of};
use super::target::{check_place, exists, plain, work_folder_of};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

/// What a run keeps in its work folder: nothing else is written there, taken from there or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Held by the run that is alive; the system lets go of it with the process, however that ends.
    Lock,
    /// What makes a run of the folder's contents, which another process may go on with: written when all else is there, removed
    /// first.
    Run,
    /// That, half written.
    RunPartial,
    /// The checkpoint that grows, a folder.
    Checkpoint,
    /// Image features for later blocks.
    Levels,
    /// One of two, by its number: space taken on the disk for a state to come.
    Spare(u8),
    /// What there is behind so many blocks.
    State(usize),
}

impl Kept {
    /// Name of the file in the folder.
    pub fn name(self) -> String {
        match self {
            Self::Lock => "lock".to_owned(),
            Self::Run => "run.json".to_owned(),
            Self::RunPartial => "run.json.partial".to_owned(),
            Self::Checkpoint => "checkpoint".to_owned(),
            Self::Levels => "levels".to_owned(),
            Self::Spare(number) => format!("spare-{number}"),
            Self::State(blocks) => format!("state-{blocks}"),
        }
    }

    /// What has this name; `None` where it is none of a run's.
    pub fn of(name: &OsStr) -> Option<Self> {
        let name = name.to_str()?;
        let state = || name.strip_prefix("state-")?.parse().ok().map(Self::State);
        let fixed = [Self::Lock, Self::Run, Self::RunPartial, Self::Checkpoint, Self::Levels];
        let all = fixed.into_iter().chain(Self::SPARES).chain(state());
        // Numbers can be written in many ways.
        all.into_iter().find(|kept| kept.name() == name)
    }

    /// Where space for states may be. While there is a state, one of the two is taken by it.
    pub const SPARES: [Self; 2] = [Self::Spare(0), Self::Spare(1)];
}

/// An output's work folder, locked for this process. Dropping it removes it unless it is to be [kept](Self::keep), or holds
/// anything that a run does not write.
#[derive(Debug)]
pub struct WorkFolder {
    target: PathBuf,
    path: PathBuf,
    keep: bool,
    /// Whether this process created it and has put nothing into it but the lock.
    is_bare: bool,
    /// The files that the checkpoint is to have, where that is known.
    expected: Option<BTreeSet<PathBuf>>,
    /// Open as long as the folder is ours.
    _lock: File,
}

impl WorkFolder {
    /// Takes the work folder of `target`, and creates it where there is none. What an earlier run left in it is there, and
    /// kept.
    ///
    /// Errors as [`check_target`] does, where another process writes this output (naming it), for a folder of that name
    /// that is not ours, and, naming it, for anything in it that is not a run's.
    pub fn open(target: &Path) -> Result<Self> {
        check_target(target)?;
        let target = plain(target);
        let path = work_folder_of(&target)?;
        match fs::create_dir(&path) {
            Ok(()) => {
                let lock = lock(&path, &target).inspect_err(|_| {
                    let _ = fs::remove_dir(&path);
                })?;
                Ok(Self { target, path, keep: false, is_bare: true, expected: None, _lock: lock })
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                check_ours(&path)?;
                Self::take(target, path)
            }
            Err(error) => {
                let parent = parent_of(&target).display();
                Err(error).with_context(|| format!("cannot create a folder in {parent}; choose another --out"))
            }
        }
    }

    /// Locks a folder that is ours and was there.
    fn take(target: PathBuf, path: PathBuf) -> Result<Self> {
        let lock = lock(&path, &target)?;
        let mut work = Self { target, path, keep: true, is_bare: false, expected: None, _lock: lock };
        own::remove(&work.place(Kept::RunPartial))?;
        work.keep = work.contents()?.into_iter().any(|kept| kept != Kept::Lock);
        Ok(work)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of something that the folder keeps.
    pub fn place(&self, kept: Kept) -> PathBuf {
        self.path.join(kept.name())
    }

    /// Where the checkpoint grows.
    pub fn checkpoint(&self) -> PathBuf {
        self.place(Kept::Checkpoint)
    }

    /// What is there, each in its own form. Errors, naming it, with what is not a run's.
    pub fn contents(&self) -> Result<Vec<Kept>> {
        contents(&self.path)
    }

    /// Whether the folder outlives this process.
    pub fn keep(&mut self, keep: bool) {
        self.keep = keep;
    }

    /// Whether the folder is kept when the run ends.
    pub fn is_kept(&self) -> bool {
        self.keep
    }

    /// Says which files the checkpoint is to have, sub-folders with a `/`: from now on it goes only where it has no others.
    pub fn expect(&mut self, files: &BTreeSet<PathBuf>) {
        self.expected = Some(files.clone());
        self.is_bare = false;
    }

    /// Removes what is in the folder. Errors, and removes nothing, where it holds what a run does not write, or the checkpoint
    /// what this one would not.
    pub fn clear(&mut self) -> Result<()> {
        self.empty()?;
        self.keep = false;
        Ok(())
    }

    /// Begins anew, whatever lies in the checkpoint.
    pub fn restart(&mut self) -> Result<()> {
        let expected = self.expected.take();
        let cleared = self.clear();
        self.expected = expected;
        cleared
    }

    fn empty(&self) -> Result<()> {
        let contents = self.contents()?;
        if let Some(expected) = self.expected.as_ref().filter(|_| contents.contains(&Kept::Checkpoint)) {
            own::check_contents(&self.checkpoint(), expected)?;
        }
        // Without this one the rest is no run.
        own::remove(&self.place(Kept::Run))?;
        for kept in contents {
            let path = self.place(kept);
            match kept {
                Kept::Lock | Kept::Run => {}
                Kept::Checkpoint => {
                    fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
                }
                _ => own::remove(&path)?,
            }
        }
        Ok(())
    }

    /// Writes what makes a run of the contents: either all of it is there afterwards, on the disk, or what was there before.
    pub fn write_run(&self, bytes: &[u8]) -> Result<()> {
        own::replace(&self.place(Kept::Run), bytes)?;
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
        // Where nothing was put into it, it need not be read, for which there may be no open file left.
        let can_go = |error: &anyhow::Error| self.is_bare && !error.is::<Foreign>();
        let emptied = self.empty().or_else(|error| if can_go(&error) { Ok(()) } else { Err(error) });
        // The lock last: as long as it is there, nobody takes the folder for free.
        let removed = emptied.and_then(|()| own::remove(&self.place(Kept::Lock)));
        if let Err(error) = removed.and_then(|()| Ok(fs::remove_dir(&self.path)?)) {
            log::warn!("cannot remove {}: {error:#}", self.path.display());
        }
    }
}

/// What is in a work folder.
fn contents(folder: &Path) -> Result<Vec<Kept>> {
    let mut found = Vec::new();
    for name in own::names_in(folder)? {
        let path = folder.join(&name);
        match Kept::of(&name) {
            None => bail!(own::foreign(&path, "", "")),
            Some(Kept::Checkpoint) => own::check_folder(&path, "")?,
            Some(_) => own::check_file(&path, "")?,
        }
        found.extend(Kept::of(&name));
    }
    Ok(found)
}

/// Takes the lock, and says in it who has it.
fn lock(folder: &Path, target: &Path) -> Result<File> {
    let path = folder.join(Kept::Lock.name());
    let cannot_lock = || format!("cannot lock {}", path.display());
    let mut file = own::open_or_create(&path)?;
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
        file.metadata().map(identity).ok() == fs::symlink_metadata(path).map(identity).ok()
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

/// Refuses what has the name of a work folder and was not made here: it would be emptied.
fn check_ours(path: &Path) -> Result<()> {
    let in_the_way = |what: &str, remedy: &str| {
        format!("{} is in the way: runs keep their work there, but this is {what}; {remedy}", path.display())
    };
    let found = fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(!found.is_symlink(), in_the_way("a link", "remove it"));
    ensure!(found.is_dir(), in_the_way("not a run's", "move it"));
    if let Some(owner) = own::other_owner(&found, parent_of(path))? {
        bail!(in_the_way(&format!("another user's, number {owner}"), "have it removed, or choose another --out"));
    }
    let names = own::names_in(path)?;
    let ours = names.is_empty() || names.iter().any(|name| Kept::of(name) == Some(Kept::Lock));
    ensure!(ours, in_the_way("not a run's", "move it"));
    Ok(())
}

/// Refuses an output folder that could not be created: one that exists, has no name or one that is too long, or lies where nothing
/// can be written. Leaves nothing behind, not for a moment.
pub fn check_target(target: &Path) -> Result<()> {
    let target = &plain(target);
    work_folder_of(target)?;
    refuse_existing(target)?;
    check_place(target)
}

fn refuse_existing(target: &Path) -> Result<()> {
    if !exists(target)? {
        return Ok(());
    }
    sweep(target);
    bail!("{} exists. Remove it or choose another output folder with --out.", target.display())
}

/// Removes what a run left behind that was killed between the rename of its output and its own end, if that is all there is.
fn sweep(target: &Path) {
    let Ok(path) = work_folder_of(target) else { return };
    if !path.is_dir() || check_ours(&path).is_err() {
        return;
    }
    let is_left = |contents: &[Kept]| contents.contains(&Kept::Lock) && !contents.contains(&Kept::Checkpoint);
    if contents(&path).is_ok_and(|contents| is_left(&contents))
        && let Ok(mut work) = WorkFolder::take(target.to_path_buf(), path)
    {
        work.keep = false;
    }
}

/// Creates `path` with `length` bytes of space.
///
/// On Linux the space is taken now, so that a disk too small fails here and not after hours of solving.
pub(crate) fn reserve(path: &Path, length: u64) -> Result<File> {
    let create = || {
        let file = own::create(path)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        let all =
            [Kept::Lock, Kept::Run, Kept::RunPartial, Kept::Checkpoint, Kept::Levels, Kept::State(0), Kept::State(17)];
        for kept in all.into_iter().chain(Kept::SPARES) {
            assert_eq!(Kept::of(kept.name().as_ref()), Some(kept));
        }
        assert_eq!(Kept::RunPartial.name(), own::partial_of(Path::new(&Kept::Run.name())).to_str().unwrap());
        for other in [
            "",
            "Lock",
            "lock.partial",
            "spare-2",
            "spare-",
            "state-",
            "state-+1",
            "state-01",
            "state-1.partial",
            ".lock",
        ] {
            assert_eq!(Kept::of(other.as_ref()), None, "{other}");
        }
    }
}
