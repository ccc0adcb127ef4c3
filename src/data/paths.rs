//! Paths that stand in data files: they may lead to files below one folder and nowhere else.

use anyhow::{Context, Result, bail, ensure};
use std::path::{Component, Path, PathBuf};

/// Where `written`, a path in a file, leads from `root`, or a message why not: `.` and `..` are taken out as text, and what
/// is left must lie below. An absolute path may point below `root` as well.
///
/// Nothing is asked of the disk unless the path is absolute; links are left to [`real_path_inside`].
pub(super) fn path_inside(written: &Path, root: &Path) -> Result<PathBuf> {
    if written.is_absolute() {
        let plain = flattened(written)?;
        let root = absolute(root)?;
        if plain.starts_with(&root) {
            return Ok(plain);
        }
        // The root may have been given through a link.
        if let (Ok(plain), Ok(root)) = (plain.canonicalize(), root.canonicalize())
            && plain.starts_with(root)
        {
            return Ok(plain);
        }
        bail!("lies outside {}", root.display());
    }
    match flattened(written) {
        Ok(plain) => Ok(root.join(plain)),
        Err(_) => bail!("leads out of {}", absolute(root)?.display()),
    }
}

/// A path without `.` and `..`. Errors where one `..` too many stands in it.
fn flattened(path: &Path) -> Result<PathBuf> {
    let mut plain = PathBuf::new();
    let mut depth = 0;
    for part in path.components() {
        match part {
            Component::Normal(name) => {
                plain.push(name);
                depth += 1;
            }
            Component::CurDir => {}
            Component::ParentDir => {
                ensure!(depth > 0, "{} leads out of its folder", path.display());
                plain.pop();
                depth -= 1;
            }
            Component::RootDir | Component::Prefix(_) => plain.push(part),
        }
    }
    Ok(plain)
}

/// `path` from the root of the file system on, without `.` and `..`; an empty one is the present folder.
fn absolute(path: &Path) -> Result<PathBuf> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    flattened(&std::path::absolute(path).with_context(|| format!("cannot tell where {} is", path.display()))?)
}

/// Where a path really leads once all links are followed. Errors where that is not below `root`.
pub(super) fn real_path_inside(path: &Path, root: &Path) -> Result<PathBuf> {
    let cannot_read = |path: &Path| format!("cannot read {}", path.display());
    let real = path.canonicalize().with_context(|| cannot_read(path))?;
    let root = absolute(root)?;
    let root = root.canonicalize().with_context(|| cannot_read(&root))?;
    ensure!(real.starts_with(&root), "is a link to {}, outside {}", real.display(), root.display());
    Ok(real)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_files_stay_inside() {
        let root = Path::new("/data/set");
        for (written, leads) in [
            ("a.png", "/data/set/a.png"),
            ("./a/../b//c.png", "/data/set/b/c.png"),
            ("..a/...", "/data/set/..a/..."),
            ("/data/set/x/../a.png", "/data/set/a.png"),
            ("", "/data/set"),
        ] {
            assert_eq!(path_inside(Path::new(written), root).unwrap(), Path::new(leads), "{written}");
        }
        for written in
            ["..", "../a", "a/../../set/a", "/data/a.png", "/data/settle/a.png", "/data/set/../a", "/", "/../data"]
        {
            assert!(path_inside(Path::new(written), root).is_err(), "{written}");
        }
        let here = std::env::current_dir().unwrap();
        assert_eq!(path_inside(Path::new("a.png"), Path::new("")).unwrap(), Path::new("a.png"));
        assert_eq!(path_inside(&here.join("a.png"), Path::new("")).unwrap(), here.join("a.png"));
        assert!(path_inside(Path::new("/a.png"), Path::new("/")).is_ok());
    }
}
