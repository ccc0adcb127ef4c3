//! Files that `--json` names.

use crate::text;
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::io::Write;
use std::path::Path;
use vlmq::checkpoint::{own, target};

/// Refuses a file that could not be written, before the work rather than after it: a folder, a link to a file or to nothing, a name
/// that is too long, a place where nothing can be written, and one where the file's contents could not grow.
pub(crate) fn check_target(path: &Path) -> Result<()> {
    let told = || format!("--json {}", path.display());
    let path = &target::plain(path);
    ensure!(!path.is_dir(), "{}: is a folder; give the name of a file", told());
    ensure!(path.file_name().is_some(), "{}: is no name of a file", told());
    if is_device(path) {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(parent.is_dir(), "{}: the folder {} does not exist", told(), parent.display());
    ensure!(!path.is_symlink(), "{}: is a link; give the name of the file itself", told());
    let partial = own::partial_of(path);
    let taken = target::exists(&partial).with_context(told)?;
    ensure!(!taken, "{}: {} is in the way; remove that", told(), partial.display());
    own::check_writable(parent).with_context(|| format!("{}: cannot write in {}", told(), parent.display()))
}

/// Whether something is there that is written as it is, be it through a link: a rename would put a plain file in its place.
fn is_device(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// Replaces the file whole, so that a full disk leaves no half one under its name. Pipes and devices are written as they are.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = text::json(value)? + "\n";
    let told = || format!("--json {}: cannot write", path.display());
    let path = &target::plain(path);
    if is_device(path) {
        let mut file = std::fs::OpenOptions::new().write(true).open(path).with_context(told)?;
        return file.write_all(text.as_bytes()).with_context(told);
    }
    check_target(path)?;
    own::replace(path, text.as_bytes()).with_context(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_files_replace_older_ones() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scores.json");
        std::fs::write(&path, "old").unwrap();
        write_json(&path, &[1, 2, 3]).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(value, serde_json::json!([1, 2, 3]));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    /// Through a link, so that a mistake replaces the link and not the device.
    #[cfg(target_os = "linux")]
    #[test]
    fn devices_stay_devices() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("full");
        std::os::unix::fs::symlink("/dev/full", &link).unwrap();
        let error = write_json(&link, &[1, 2, 3]).unwrap_err();
        assert!(format!("{error:#}").contains("cannot write"), "{error:#}");
        assert!(link.is_symlink());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn impossible_targets_are_refused_first() {
        let folder = tempfile::tempdir().unwrap();
        assert!(check_target(folder.path()).is_err());
        assert!(check_target(&folder.path().join("none/scores.json")).is_err());
        assert!(check_target(&folder.path().join("scores.json")).is_ok());
        assert!(check_target(Path::new("scores.json")).is_ok());
        assert!(check_target(Path::new("scores.json/.")).is_ok());
        for wrong in ["", "..", "."] {
            assert!(check_target(Path::new(wrong)).is_err(), "{wrong}");
        }
        let longest = "n".repeat(255 - ".partial".len());
        assert!(check_target(&folder.path().join(&longest)).is_ok());
        let error = format!("{:#}", check_target(&folder.path().join(longest + "n")).unwrap_err());
        assert!(error.contains("too long a name"), "{error}");
        std::fs::write(folder.path().join("mine.partial"), "mine").unwrap();
        let error = write_json(&folder.path().join("mine"), &[1, 2, 3]).unwrap_err();
        assert!(format!("{error:#}").contains("mine.partial is in the way; remove that"), "{error:#}");
        assert_eq!(std::fs::read(folder.path().join("mine.partial")).unwrap(), b"mine");
    }

    /// What a link leads to may be somebody else's, and a file that is not there may be created where nobody looks for it.
    #[cfg(unix)]
    #[test]
    fn links_to_files_are_refused_and_stay() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("victim"), "precious").unwrap();
        for (link, to) in [("a", "victim"), ("b", "nothing")] {
            std::os::unix::fs::symlink(at(to), at(link)).unwrap();
            for error in [check_target(&at(link)), write_json(&at(link), &[1, 2, 3])].map(Result::unwrap_err) {
                assert!(format!("{error:#}").contains("is a link; give the name of the file itself"), "{error:#}");
            }
            assert!(at(link).is_symlink());
        }
        assert_eq!(std::fs::read(at("victim")).unwrap(), b"precious");
        assert!(!at("nothing").exists() && !at("b.partial").exists());
    }
}
