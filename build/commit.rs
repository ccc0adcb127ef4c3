//! The commit of the sources in a folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a program is made of; edits elsewhere do not make it another one.
const SOURCES: [&str; 6] = ["Cargo.toml", "Cargo.lock", "build.rs", "build", "src", "kernels"];

/// A commit, and what must change for the answer to be another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Commit {
    /// `HASH`; `HASH-modified` where a source differs from it; `HASH-unchecked` where git could not be asked; `unknown`
    /// outside of a clone and of a package that cargo made of one.
    pub(crate) name: String,
    /// Files and folders that exist.
    pub(crate) watch: Vec<PathBuf>,
}

/// The commit of the sources at `root`. `ask` puts a question to git, see [`ask_git`].
///
/// No build may claim a commit that it is not of. So the answer is watched: HEAD; all sources of a clean tree, for the first
/// edit; and of a modified one the files that are, as they may become again what was committed. Files of the program
/// (`src/bin`) are left out of the last rule, or each edit of one would compile the whole library: where nothing else was
/// modified, `-modified` stays after they are restored, until HEAD moves.
pub(crate) fn find(root: &Path, ask: impl Fn(&[&str]) -> Option<String>) -> Commit {
    let mut watch = Vec::new();
    let name = name(root, ask, &mut watch).unwrap_or_else(|| "unknown".into());
    // Cargo takes a path that does not exist for one that always changes.
    watch.retain(|path| path.exists());
    Commit { name, watch }
}

fn name(root: &Path, ask: impl Fn(&[&str]) -> Option<String>, watch: &mut Vec<PathBuf>) -> Option<String> {
    // Only of this very folder: a package unpacked inside of somebody's clone is none of its commits.
    let git = root.join(".git");
    if !git.exists() {
        return packaged(root);
    }
    // A worktree's or a submodule's .git is a file that names its folder; what worktrees share lies in a common one.
    let git = match fs::read_to_string(&git) {
        Ok(text) => root.join(text.strip_prefix("gitdir:")?.trim()),
        Err(_) => git,
    };
    let common = match fs::read_to_string(git.join("commondir")) {
        Ok(text) => git.join(text.trim()),
        Err(_) => git.clone(),
    };
    let head = fs::read_to_string(git.join("HEAD")).ok()?;
    let branch = head.strip_prefix("ref:").map(str::trim);
    // The log of HEAD gains a line with every commit, wherever the branch is kept; without one, the places of the branch.
    watch.extend([git.join("HEAD"), git.join("logs/HEAD")]);
    if let Some(branch) = branch {
        watch.extend([common.join(branch), common.join("packed-refs")]);
    }
    let by_files = || match branch {
        None => Some(head.trim().to_owned()),
        Some(branch) => fs::read_to_string(common.join(branch)).ok().map(|hash| hash.trim().to_owned()).or_else(|| {
            let packed = fs::read_to_string(common.join("packed-refs")).ok()?;
            packed.lines().find_map(|line| Some(line.strip_suffix(branch)?.strip_suffix(' ')?.to_owned()))
        }),
    };
    let hash = ask(&["rev-parse", "--verify", "HEAD"]).map(|text| text.trim().to_owned()).or_else(by_files);
    let hash = hash.filter(|hash| is_hash(hash))?;
    let mut question = vec!["status", "--porcelain", "-z", "--untracked-files=all", "--no-renames", "--"];
    question.extend(SOURCES);
    let sources = SOURCES.iter().map(|source| root.join(source));
    let Some(status) = ask(&question) else {
        watch.extend(sources);
        return Some(format!("{hash}-unchecked"));
    };
    // `XY path` each.
    let modified: Vec<&str> = status.split('\0').filter_map(|entry| entry.get(3..)).collect();
    if modified.is_empty() {
        watch.extend(sources);
        return Some(hash);
    }
    watch.extend(modified.iter().filter(|path| !path.starts_with("src/bin/")).map(|path| root.join(path)));
    Some(format!("{hash}-modified"))
}

/// What cargo wrote into a package that it made of a clone.
fn packaged(root: &Path) -> Option<String> {
    let text = fs::read_to_string(root.join(".cargo_vcs_info.json")).ok()?;
    let hash = text.split("\"sha1\"").nth(1)?.split('"').nth(1)?;
    let modified = if text.contains("\"dirty\": true") { "-modified" } else { "" };
    is_hash(hash).then(|| format!("{hash}{modified}"))
}

/// SHA-1 or SHA-256 in hexadecimal digits.
fn is_hash(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// What git says about the clone at `root`; `None` where there is no git, or it refuses, as in a clone of another user's.
pub(crate) fn ask_git(root: &Path, question: &[&str]) -> Option<String> {
    let mut git = Command::new("git");
    // A hook that builds has these set, for its own repository.
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"] {
        git.env_remove(variable);
    }
    // Without locks nothing is written: a build leaves the index as it is.
    let output = git.arg("--no-optional-locks").arg("-C").arg(root).args(question).output().ok()?;
    output.status.success().then(|| String::from_utf8(output.stdout).ok())?
}
