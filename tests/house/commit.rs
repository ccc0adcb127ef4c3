//! A build names the commit that it is of, says when it is of none, and is asked again when that may change.

#[path = "../../build/commit.rs"]
mod build;

use build::{Commit, ask_git, find};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A clone with one commit; `None` where there is no git.
fn clone() -> Option<(tempfile::TempDir, PathBuf)> {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("clone");
    fs::create_dir_all(root.join("src/bin")).unwrap();
    for name in ["Cargo.toml", "src/lib.rs", "src/bin/main.rs", "README.md"] {
        fs::write(root.join(name), name).unwrap();
    }
    if Command::new("git").arg("--version").output().is_err() {
        eprintln!("no git: nothing is tested");
        return None;
    }
    git(&root, &["init", "--quiet", "--initial-branch=main"]);
    commit(&root);
    Some((folder, root))
}

fn git(root: &Path, arguments: &[&str]) -> String {
    let who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"];
    ask_git(root, &[&who, arguments].concat()).unwrap_or_else(|| panic!("git {arguments:?}"))
}

fn commit(root: &Path) -> String {
    git(root, &["add", "--all"]);
    git(root, &["commit", "--quiet", "--allow-empty", "--message", "x"]);
    git(root, &["rev-parse", "HEAD"]).trim().to_owned()
}

fn found(root: &Path) -> Commit {
    find(root, |question| ask_git(root, question))
}

fn without_git(root: &Path) -> Commit {
    find(root, |_| None)
}

fn watches(found: &Commit, name: &str) -> bool {
    assert!(found.watch.iter().all(|path| path.exists()), "{found:?}");
    found.watch.iter().any(|path| path.ends_with(name))
}

#[test]
fn clean_and_modified_trees_are_told_apart() {
    let Some((_folder, root)) = clone() else { return };
    let first = commit(&root);
    let clean = found(&root);
    assert_eq!(clean.name, first);
    for name in [".git/HEAD", ".git/logs/HEAD", ".git/refs/heads/main", "src", "Cargo.toml"] {
        assert!(watches(&clean, name), "{name} {clean:?}");
    }
    // What is not of the program is not asked for.
    fs::write(root.join("README.md"), "other").unwrap();
    fs::create_dir(root.join("target")).unwrap();
    fs::write(root.join("target/x"), "x").unwrap();
    assert_eq!(found(&root), clean);

    fs::write(root.join("src/lib.rs"), "other").unwrap();
    let modified = found(&root);
    assert_eq!(modified.name, format!("{first}-modified"));
    assert!(watches(&modified, "src/lib.rs") && watches(&modified, ".git/HEAD"), "{modified:?}");
    assert!(!watches(&modified, "src"), "{modified:?}");
    fs::write(root.join("src/lib.rs"), "src/lib.rs").unwrap();
    assert_eq!(found(&root), clean);

    // A file that git does not know is compiled all the same.
    fs::write(root.join("src/new file.rs"), "").unwrap();
    let modified = found(&root);
    assert!(modified.name.ends_with("-modified") && watches(&modified, "src/new file.rs"), "{modified:?}");
    fs::write(root.join("src/bin/main.rs"), "other").unwrap();
    assert!(!watches(&found(&root), "src/bin/main.rs"));
    let second = commit(&root);
    assert_ne!(second, first);
    assert_eq!(found(&root).name, second);
}

#[test]
fn branches_are_found_wherever_git_keeps_them() {
    let Some((folder, root)) = clone() else { return };
    let first = commit(&root);
    assert_eq!(without_git(&root).name, format!("{first}-unchecked"));
    assert!(watches(&without_git(&root), "src"));
    git(&root, &["pack-refs", "--all"]);
    assert!(!root.join(".git/refs/heads/main").exists());
    assert_eq!(without_git(&root).name, format!("{first}-unchecked"));
    assert!(watches(&found(&root), "packed-refs"));
    // Without a log it is the places of the branch that change.
    fs::remove_dir_all(root.join(".git/logs")).unwrap();
    assert_eq!(found(&root).name, first);

    let tree = folder.path().join("tree");
    git(&root, &["worktree", "add", "--quiet", "-b", "side/branch", tree.to_str().unwrap()]);
    let second = commit(&tree);
    assert_eq!(found(&tree).name, second);
    assert_eq!(without_git(&tree).name, format!("{second}-unchecked"));
    assert!(watches(&found(&tree), "logs/HEAD"), "{:?}", found(&tree));
    assert_eq!(found(&root).name, first);

    git(&tree, &["checkout", "--quiet", "--detach", &first]);
    assert_eq!(found(&tree).name, first);
    assert_eq!(without_git(&tree).name, format!("{first}-unchecked"));
}

#[test]
fn no_commit_is_claimed_from_outside() {
    let unknown = Commit { name: "unknown".into(), watch: Vec::new() };
    let package = |root: &Path| {
        let root = root.join("package");
        fs::create_dir_all(root.join("src")).unwrap();
        fs::write(root.join("Cargo.toml"), "").unwrap();
        root
    };
    let folder = tempfile::tempdir().unwrap();
    let root = package(folder.path());
    assert_eq!(found(&root), unknown);
    let hash = "0123456789abcdef".repeat(3)[..40].to_owned();
    for (dirty, name) in [("", hash.clone()), (",\n    \"dirty\": true", format!("{hash}-modified"))] {
        let text = format!("{{\n  \"git\": {{\n    \"sha1\": \"{hash}\"{dirty}\n  }},\n  \"path_in_vcs\": \"\"\n}}");
        fs::write(root.join(".cargo_vcs_info.json"), text).unwrap();
        assert_eq!(found(&root).name, name);
    }
    fs::write(root.join(".cargo_vcs_info.json"), "{\"git\": {\"sha1\": \"x\"}}").unwrap();
    assert_eq!(found(&root), unknown);
    fs::write(root.join(".git"), "neither a folder nor a file of git's").unwrap();
    assert_eq!(found(&root), unknown);

    // Unpacked inside of somebody's clone.
    let Some((_folder, clone)) = clone() else { return };
    assert_eq!(found(&package(&clone)), unknown);
}
