//! The name of an output and of the hidden folder beside it.

use super::own::{self, parent_of};
use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

/// A name for something that is to be created, as short as it can be said: `./new`, `new/`, `new/.` and `new//` are `new`. One that
/// begins with a dash keeps its `./`, without which commands would take it for an option.
pub fn plain(path: &Path) -> PathBuf {
    let short: PathBuf = path.components().filter(|part| *part != Component::CurDir).collect();
    match short.as_os_str().as_encoded_bytes() {
        [] => path.to_path_buf(),
        [b'-', ..] => Path::new(".").join(short),
        _ => short,
    }
}

/// `.NAME.vlmq` beside an output.
pub(crate) fn work_folder_of(target: &Path) -> Result<PathBuf> {
    let name = target
        .file_name()
        .with_context(|| format!("{:?} is no name for an output folder; choose another --out", target.display()))?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".vlmq");
    Ok(parent_of(target).join(hidden))
}

/// Whether something has this name, be it a link that leads nowhere, which a rename would replace.
///
/// Errors where the system does not tell, as for a name that is too long for it.
pub fn exists(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => Ok(false),
        Err(error) if error.kind() == ErrorKind::InvalidFilename => {
            bail!("{} is too long a name for its file system; choose a shorter one", path.display())
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Refuses a place in which no output could be created: a folder that is not there or cannot be written, names that are too long.
pub(super) fn check_place(target: &Path) -> Result<()> {
    let parent = parent_of(target);
    ensure!(
        parent.is_dir(),
        "the output {} cannot be written: there is no folder {}; create it first",
        target.display(),
        parent.display()
    );
    // The longest path of a run that does not depend on its input.
    exists(&work_folder_of(target)?.join("checkpoint").join(super::shard::INDEX)).map(drop)?;
    own::check_writable(parent)
        .with_context(|| format!("cannot create a folder in {}; choose another --out", parent.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_has_one_form() {
        for (name, expected) in [
            ("new", "new"),
            ("new/", "new"),
            ("new//", "new"),
            ("new/.", "new"),
            ("new/./.", "new"),
            ("./new", "new"),
            (".//new", "new"),
            ("a/./new/.", "a/new"),
            ("../new/", "../new"),
            ("/a//new/", "/a/new"),
            ("./-new", "./-new"),
            ("", ""),
            (".", "."),
            ("./", "./"),
            ("/", "/"),
            ("..", ".."),
            ("a/..", "a/.."),
        ] {
            let plain = plain(Path::new(name));
            // Paths compare by their parts: as text.
            assert_eq!(plain.to_str().unwrap(), expected, "{name}");
            assert_eq!(
                work_folder_of(&plain).is_err(),
                ["", ".", "./", "/", "..", "a/.."].contains(&expected),
                "{name}"
            );
        }
    }

    #[test]
    fn names_that_are_too_long_are_refused_before_they_are_used() {
        let folder = tempfile::tempdir().unwrap();
        let longest = 255 - ".".len() - ".vlmq".len();
        check_place(&folder.path().join("n".repeat(longest))).unwrap();
        for more in [1, 6, 7, 300] {
            let error = check_place(&folder.path().join("n".repeat(longest + more))).unwrap_err();
            assert!(format!("{error:#}").contains("is too long a name for its file system"), "{error:#}");
        }
        // Folders above it count as well.
        let deep = folder.path().join("d/".repeat(3000)).join("new");
        assert!(check_place(&deep).is_err());
    }
}
