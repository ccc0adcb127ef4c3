//! Files that are this program's alone, in places where somebody else may have put something first: no link is followed on the way
//! to one, what is written over is a plain file of ours without a second name, and what is replaced is replaced whole.

use crate::input;
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// What to do about something in a growing checkpoint that its run would not write.
const RESTART: &str = ", or begin anew with --restart";

/// Creates a file for reading and writing where nothing has its name.
pub(crate) fn create(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).open(path)
}

/// Creates a file in the place of what has its name, be it a link. Other names of that keep what they name.
pub(crate) fn renew(path: &Path) -> Result<File> {
    remove(path)?;
    create(path).with_context(|| cannot_write(path))
}

/// Opens a file that is there for reading and writing, and cuts nothing.
///
/// Errors where it is no plain file, where it has a second name, and where it is not of the user whose folder it lies in.
pub(crate) fn open(path: &Path) -> Result<File> {
    // Asked before as well: opening a device may do something.
    check_file(path, "")?;
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
    }
    let file = options.open(path).with_context(|| cannot_write(path))?;
    let found = file.metadata().with_context(|| cannot_write(path))?;
    match fault(path, &found)? {
        None => Ok(file),
        Some(fault) => bail!(foreign(path, &fault, "")),
    }
}

/// [`open`], or [`create`] where there is no such file.
pub(crate) fn open_or_create(path: &Path) -> Result<File> {
    match create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => open(path),
        created => created.with_context(|| cannot_write(path)),
    }
}

/// Writes `bytes` to a file from the byte `offset` on. Several threads may do so at once.
pub(crate) fn write_at(file: &File, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
    }
    #[cfg(windows)]
    {
        let (mut offset, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let count = std::os::windows::fs::FileExt::seek_write(file, rest, offset)?;
            (offset, rest) = (offset + count as u64, &rest[count..]);
        }
        Ok(())
    }
}

/// Where the contents of the file `path` grow before they get its name: `NAME.partial` beside it.
pub fn partial_of(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".partial");
    PathBuf::from(name)
}

/// Puts `bytes` in the place of the file `path`, which shows one or the other at any time and keeps its permissions. They have
/// reached the disk then, and nothing else is left.
///
/// Errors where something has the name of [`partial_of`] it, which is nobody's to remove, and for any failure to write.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = partial_of(path);
    let mut file = match create(&partial) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            bail!("{}, as {} is in the way; remove that", cannot_write(path), partial.display())
        }
        created => created.with_context(|| cannot_write(path))?,
    };
    let mut replace = || {
        file.write_all(bytes)?;
        if let Ok(found) = fs::symlink_metadata(path)
            && found.is_file()
        {
            file.set_permissions(found.permissions())?;
        }
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    let replaced = replace();
    if replaced.is_err() {
        let _ = fs::remove_file(&partial);
    }
    replaced.with_context(|| cannot_write(path))
}

/// Removes a file or a link, where there is one.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Refuses what has the name of a file of ours and is none. `or` is what to do in place of removing it.
pub(crate) fn check_file(path: &Path, or: &str) -> Result<()> {
    let found = metadata(path)?;
    match fault(path, &found)? {
        None => Ok(()),
        Some(fault) => bail!(foreign(path, &fault, or)),
    }
}

/// Refuses what has the name of a folder of ours and is none.
pub(crate) fn check_folder(path: &Path, or: &str) -> Result<()> {
    let found = metadata(path)?;
    let fault = match found.is_dir() {
        true => stranger(path, &found)?,
        false => Some(if found.is_symlink() { "a link".to_owned() } else { "no folder".to_owned() }),
    };
    match fault {
        None => Ok(()),
        Some(fault) => bail!(foreign(path, &fault, or)),
    }
}

/// Refuses, naming it, what lies in the growing checkpoint `folder` and is not one of the files `names`, or none of ours. Partial
/// files of theirs are removed.
pub(crate) fn check_contents(folder: &Path, names: &BTreeSet<PathBuf>) -> Result<()> {
    check_folder(folder, "")?;
    let inner: BTreeSet<&Path> = names.iter().flat_map(|name| name.ancestors().skip(1)).collect();
    let partial: BTreeSet<PathBuf> = names.iter().map(|name| partial_of(name)).collect();
    let mut folders = vec![PathBuf::new()];
    while let Some(inside) = folders.pop() {
        for name in names_in(&folder.join(&inside))? {
            let name = inside.join(name);
            let path = folder.join(&name);
            if names.contains(&name) {
                check_file(&path, RESTART)?;
            } else if inner.contains(name.as_path()) {
                check_folder(&path, RESTART)?;
                folders.push(name);
            } else if partial.contains(&name) && !metadata(&path)?.is_dir() {
                remove(&path)?;
            } else {
                bail!(foreign(&path, "", RESTART));
            }
        }
    }
    Ok(())
}

/// What is in a folder, in order.
pub(crate) fn names_in(folder: &Path) -> Result<Vec<OsString>> {
    let cannot_read = || format!("cannot read {}", folder.display());
    let entries = fs::read_dir(folder).with_context(cannot_read)?;
    let names = entries.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<Vec<_>>>();
    let mut names = names.with_context(cannot_read)?;
    names.sort();
    Ok(names)
}

/// Error for something that stands where a run has its files, and is not one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign(String);

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Foreign {}

/// Says what is wrong with it, "" where it has no business there at all. `or` is what to do in place of removing it.
pub(crate) fn foreign(path: &Path, fault: &str, or: &str) -> Foreign {
    let fault = if fault.is_empty() { String::new() } else { format!(" (it is {fault})") };
    Foreign(format!("{} is not this run's{fault}; remove it{or}", path.display()))
}

fn metadata(path: &Path) -> Result<Metadata> {
    fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Why something is no plain file that is ours alone; `None` where it is.
fn fault(path: &Path, found: &Metadata) -> Result<Option<String>> {
    if found.is_symlink() {
        return Ok(Some("a link".to_owned()));
    }
    if !found.is_file() {
        return Ok(Some(input::kind(found).to_owned()));
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        // None at all has one that another process has just removed.
        if found.nlink() > 1 {
            return Ok(Some("a file with a second name, a hard link".to_owned()));
        }
    }
    stranger(path, found)
}

/// Whose something is, where it is not of the user whose folder it lies in.
fn stranger(path: &Path, found: &Metadata) -> Result<Option<String>> {
    let folder = parent_of(path);
    let home = fs::metadata(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    Ok((owner(found) != owner(&home)).then(|| format!("another user's, number {}", owner(found))))
}

/// The number of the user whose something is; 0 where there are no such numbers.
fn owner(found: &Metadata) -> u32 {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        found.uid()
    }
    #[cfg(not(unix))]
    {
        let _ = found;
        0
    }
}

/// Whose a thing in the folder `parent` is, where it is not this user's.
///
/// File systems that give files to another user, as an exported one does with those of the superuser, give that one what is
/// created there now as well.
pub(crate) fn other_owner(found: &Metadata, parent: &Path) -> Result<Option<u32>> {
    #[cfg(unix)]
    let user = rustix::process::geteuid().as_raw();
    #[cfg(not(unix))]
    let user = 0;
    let here = || {
        // It has no name, or none for longer than a moment.
        let created = tempfile::tempfile_in(parent).and_then(|file| file.metadata());
        created.map(|created| owner(&created)).with_context(|| format!("cannot write in {}", parent.display()))
    };
    is_other(owner(found), user, here)
}

fn is_other(owner: u32, user: u32, here: impl FnOnce() -> Result<u32>) -> Result<Option<u32>> {
    Ok((owner != user && owner != here()?).then_some(owner))
}

/// Errors where nothing can be created in a folder. Leaves nothing behind, not for a moment. Where the system cannot be asked,
/// creating something shows it.
pub fn check_writable(folder: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use rustix::fs::{Access, access};
        access(folder, Access::WRITE_OK | Access::EXEC_OK)?;
    }
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

/// The folder that something of this name lies in.
pub(crate) fn parent_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// The context of an error at something that was to be written.
pub(crate) fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_that_change_owners_are_asked() {
        assert_eq!(is_other(1000, 1000, || bail!("asked")).unwrap(), None);
        assert_eq!(is_other(65534, 0, || Ok(65534)).unwrap(), None);
        assert_eq!(is_other(1000, 0, || Ok(0)).unwrap(), Some(1000));
        let folder = tempfile::tempdir().unwrap();
        let found = fs::metadata(folder.path()).unwrap();
        assert_eq!(other_owner(&found, folder.path()).unwrap(), None);
        assert_eq!(names_in(folder.path()).unwrap(), [""; 0]);
    }

    #[test]
    fn what_is_replaced_is_replaced_whole_and_nothing_else_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!((fs::read(&path).unwrap(), names_in(folder.path()).unwrap()), (b"two".to_vec(), vec!["a".into()]));
        fs::write(folder.path().join("a.partial"), "mine").unwrap();
        let error = format!("{:#}", replace(&path, b"three").unwrap_err());
        assert!(error.contains("a.partial is in the way; remove that"), "{error}");
        assert_eq!(fs::read(folder.path().join("a.partial")).unwrap(), b"mine");
        assert_eq!(fs::read(&path).unwrap(), b"two");
        // One that cannot get its name goes.
        let taken = folder.path().join("folder");
        fs::create_dir(&taken).unwrap();
        assert!(replace(&taken, b"x").is_err());
        assert_eq!(names_in(folder.path()).unwrap(), ["a", "a.partial", "folder"]);
    }

    #[cfg(unix)]
    #[test]
    fn only_plain_files_of_ours_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("victim"), "precious").unwrap();
        std::os::unix::fs::symlink(at("victim"), at("link")).unwrap();
        std::os::unix::fs::symlink(at("nothing"), at("dangling")).unwrap();
        fs::create_dir(at("folder")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(at("socket")).unwrap());
        for (name, says) in [
            ("link", "link is not this run's (it is a link); remove it"),
            ("dangling", "(it is a link)"),
            ("folder", "(it is a folder)"),
            ("socket", "(it is a pipe, a socket or a device)"),
        ] {
            for opened in [open(&at(name)), open_or_create(&at(name))] {
                let error = format!("{:#}", opened.unwrap_err());
                assert!(error.contains(says), "{name}: {error}");
            }
        }
        assert!(!at("nothing").exists());
        open(&at("victim")).unwrap();
        fs::hard_link(at("victim"), at("second")).unwrap();
        let error = format!("{:#}", open(&at("victim")).unwrap_err());
        assert!(error.contains("a second name"), "{error}");
        // Anew, neither a link's target nor the second name's file changes.
        for name in ["link", "second"] {
            renew(&at(name)).unwrap().write_all(b"new").unwrap();
            assert_eq!(
                (fs::read(at(name)).unwrap(), fs::read(at("victim")).unwrap()),
                (b"new".into(), b"precious".into())
            );
        }
    }
}
