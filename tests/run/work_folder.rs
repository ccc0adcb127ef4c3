//! What somebody else has put where a run writes: no link is followed, nothing that is not a run's is taken over, cut or removed.

use crate::resuming::{DEEPSTACK, Moment, PLAIN, Place, differing};
use crate::support::program::{Bench, names_in, stderr, stdout, vlmq_run};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use vlmq::device::cpu::Cpu;

/// Every entry below a folder: what it is, where a link leads, what a file holds.
fn everything(folder: &Path) -> BTreeMap<PathBuf, (String, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for name in names_in(folder) {
        let path = folder.join(name);
        let entry = fs::symlink_metadata(&path).unwrap();
        let kind = format!("{:?} {}", entry.file_type(), entry.nlink());
        let contents = if entry.is_symlink() {
            fs::read_link(&path).unwrap().to_str().unwrap().into()
        } else if entry.is_file() {
            fs::read(&path).unwrap()
        } else {
            Vec::new()
        };
        if entry.is_dir() {
            found.extend(everything(&path));
        }
        found.insert(path, (kind, contents));
    }
    found
}

/// Runs the command, which must refuse in one message, and touch nothing but say in the lock who was here last.
fn refused(place: &Place, extra: &[&str], says: &[&str]) {
    let mut before = everything(place.folder());
    let output = place.run(extra);
    let errors = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{extra:?} expects {says:?}: {errors}");
    let last = errors.lines().last().unwrap_or_default();
    for part in says {
        assert!(last.contains(part), "{extra:?}: {part:?} is not in {last:?}");
    }
    assert_eq!(errors.matches("error:").count(), 1, "{errors}");
    let mut after = everything(place.folder());
    let lock = place.work().join("lock");
    if lock.is_file() && !lock.is_symlink() {
        before.remove(&lock);
        after.remove(&lock);
    }
    let changed: Vec<_> =
        before.keys().chain(after.keys()).filter(|path| before.get(*path) != after.get(*path)).collect();
    assert!(changed.is_empty(), "{extra:?}: {errors}changed {changed:?}");
}

/// A place with a run that was stopped behind its first block.
fn behind_a_block(checkpoint: &str) -> Place {
    let place = Place::new(checkpoint);
    place.run_until(&Cpu, Moment::Block(1)).unwrap_err();
    place
}

/// A file of somebody's beside the output.
fn victim(place: &Place) -> PathBuf {
    let victim = place.folder().join("victim");
    fs::write(&victim, "precious").unwrap();
    victim
}

#[test]
fn a_work_folder_that_is_a_link_or_another_users_is_refused() {
    let place = Place::new(PLAIN);
    let elsewhere = place.folder().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    for target in [&elsewhere, &place.folder().join("nothing")] {
        symlink(target, place.work()).unwrap();
        refused(&place, &[], &[".out.vlmq is in the way", "this is a link; remove it"]);
        refused(&place, &["--restart"], &[".out.vlmq is in the way", "this is a link; remove it"]);
        fs::remove_file(place.work()).unwrap();
    }
    fs::create_dir(place.work()).unwrap();
    match std::os::unix::fs::chown(place.work(), Some(54321), None) {
        Ok(()) => {
            let says = [".out.vlmq is in the way", "another user's, number 54321", "choose another --out"];
            refused(&place, &[], &says);
            // With a lock it looks like an unfinished run.
            fs::write(place.work().join("lock"), "1").unwrap();
            refused(&place, &[], &says);
            refused(&place, &["--restart"], &says);
        }
        // Only the superuser gives things away.
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied),
    }
}

/// The folder may be ours and writable for others.
#[test]
fn a_lock_that_is_not_ours_is_not_written() {
    for planted in ["link", "dangling link", "hard link", "another user's", "pipe", "folder"] {
        let place = Place::new(PLAIN);
        let (victim, lock) = (victim(&place), place.work().join("lock"));
        fs::create_dir(place.work()).unwrap();
        match planted {
            "link" => symlink(&victim, &lock).unwrap(),
            // Without a lock it is no run's folder.
            "dangling link" => symlink(place.folder().join("nothing"), &lock).unwrap(),
            "hard link" => fs::hard_link(&victim, &lock).unwrap(),
            "pipe" => crate::support::program::pipe(&lock),
            "folder" => fs::create_dir(&lock).unwrap(),
            _ => {
                fs::write(&lock, "1").unwrap();
                if let Err(error) = std::os::unix::fs::chown(&lock, Some(54321), None) {
                    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
                    continue;
                }
            }
        }
        for extra in [&[][..], &["--restart"]] {
            refused(&place, extra, &["lock is not this run's (it is a", "; remove it"]);
        }
        // A run that is refused anyway touches it neither.
        fs::create_dir(place.out()).unwrap();
        let before = everything(place.folder());
        assert_eq!(place.run(&[]).status.code(), Some(1));
        assert_eq!(everything(place.folder()), before, "{planted}");
    }
}

#[test]
fn what_is_not_a_runs_is_named_and_stays() {
    let place = behind_a_block(DEEPSTACK);
    let victim = victim(&place);
    let at = |name: &str| place.work().join(name);
    let restart = ", or begin anew with --restart";
    // At the top: with --restart as well.
    for name in ["evil.py", "state-01", "spare-2", "levels.partial", ".hidden"] {
        fs::write(at(name), "mine").unwrap();
        for extra in [&[][..], &["--restart"]] {
            refused(&place, extra, &[&format!("{name} is not this run's; remove it")]);
        }
        fs::remove_file(at(name)).unwrap();
    }
    // In the checkpoint.
    fs::create_dir(at("checkpoint/additional_chat_templates")).unwrap();
    refused(&place, &[], &["additional_chat_templates is not this run's; remove it", restart]);
    fs::remove_dir(at("checkpoint/additional_chat_templates")).unwrap();
    for name in [
        "evil.py",
        "extra.safetensors",
        "model-00001-of-00002.safetensors",
        ".hidden",
        "README.base.md",
        "quantize_config.json",
    ] {
        fs::write(at("checkpoint").join(name), "mine").unwrap();
        refused(&place, &[], &[&format!("checkpoint/{name} is not this run's; remove it"), restart]);
        fs::remove_file(at("checkpoint").join(name)).unwrap();
    }
    // In place of a file of the run's, at the top and in the checkpoint: links of both kinds, a folder, a pipe.
    let shard = names_in(&at("checkpoint")).into_iter().find(|name| name.ends_with(".safetensors")).unwrap();
    let names = ["run.json", "state-1", "spare-0", "levels", "checkpoint"].map(str::to_owned);
    let inside = [shard.as_str(), "config.json", "tokenizer.json", "README.md", "SHA256SUMS", "report.json"];
    for name in names.into_iter().chain(inside.map(|name| format!("checkpoint/{name}"))) {
        let (path, aside) = (at(&name), place.folder().join("aside"));
        let there = path.exists();
        if there {
            fs::rename(&path, &aside).unwrap();
        }
        for planted in ["link", "hard link", "folder", "pipe"] {
            match planted {
                "link" => symlink(if there { &aside } else { &victim }, &path).unwrap(),
                // Neither a folder has a second name, nor is another run.json this run.
                "hard link" if there && aside.is_file() => fs::hard_link(&aside, &path).unwrap(),
                "hard link" => fs::hard_link(&victim, &path).unwrap(),
                "folder" if name == "checkpoint" => continue,
                "folder" => fs::create_dir(&path).unwrap(),
                _ => crate::support::program::pipe(&path),
            }
            refused(&place, &[], &[&format!("{name} is not this run's (it is "), "); remove it"]);
            match planted {
                "folder" => fs::remove_dir(&path).unwrap(),
                _ => fs::remove_file(&path).unwrap(),
            }
        }
        if there {
            fs::rename(&aside, &path).unwrap();
        }
    }
    // What is half written of the run's own goes without a word, and the run comes to the same bytes.
    let whole = Place::new(DEEPSTACK);
    assert_eq!(whole.run(&[]).status.code(), Some(0));
    for name in ["run.json.partial", "checkpoint/config.json.partial", "checkpoint/SHA256SUMS.partial"] {
        fs::write(at(name), "half").unwrap();
    }
    symlink(&victim, at("checkpoint/report.json.partial")).unwrap();
    let output = place.run(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    fs::remove_file(&victim).unwrap();
    assert_eq!(differing(&place.finished(), &whole.finished()), [""; 0]);
}

/// A run that was killed before it had a state: nothing to go on with, and still nobody else's to be removed.
#[test]
fn leftovers_are_removed_only_where_they_are_a_runs() {
    let mut place = behind_a_block(PLAIN);
    fs::remove_file(place.work().join("state-1")).unwrap();
    fs::write(place.work().join("checkpoint/evil.py"), "mine").unwrap();
    refused(&place, &[], &["checkpoint/evil.py is not this run's; remove it, or begin anew with --restart"]);
    // One that is refused for something else leaves it all.
    refused(&place, &["--group-size", "24"], &["group size 24"]);
    let folder = place.folder().to_owned();
    let images = std::mem::replace(&mut place.images, folder);
    refused(&place, &[], &["cannot be read"]);
    place.images = images;
    // Discarded when that is asked for.
    let output = place.run(&["--restart"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(place.left(), ["out"]);
    assert!(!place.out().join("evil.py").exists());

    // Behind a finished run, killed before it had removed the rest.
    for planted in ["evil.py", "link"] {
        fs::create_dir(place.work()).unwrap();
        for name in ["lock", "run.json", "state-3"] {
            fs::write(place.work().join(name), "").unwrap();
        }
        match planted {
            "link" => symlink(place.folder(), place.work().join("levels")).unwrap(),
            name => fs::write(place.work().join(name), "mine").unwrap(),
        }
        refused(&place, &[], &["out exists. Remove it"]);
        refused(&place, &["--dry-run"], &["out exists. Remove it"]);
        fs::remove_dir_all(place.work()).unwrap();
    }
}

/// `new/.` and the like are `new`, everywhere.
#[test]
fn an_output_has_one_name() {
    let bench = Bench::new("flat-tied-bf16");
    let run = |out: &str, extra: &[&str]| -> Output {
        let mut arguments = bench.quantize(&[&["--solver", "rtn"], extra].concat());
        let at = arguments.iter().position(|argument| argument == "--out").unwrap() + 1;
        arguments[at] = out.to_owned();
        Command::new(env!("CARGO_BIN_EXE_vlmq-run")).args(arguments).current_dir(bench.outputs()).output().unwrap()
    };
    let mut expected = None;
    for out in ["new", "new/.", "new/", "./new", "new//", ".//new/./"] {
        let output = run(out, &["--quiet"]);
        assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()), "{out}");
        let said = stdout(&output);
        assert!(said.contains("wrote new (") && said.contains("vlmq-run eval new DATA"), "{out}: {said}");
        let folder = bench.outputs().join("new");
        let card = fs::read_to_string(folder.join("README.md")).unwrap();
        let report = crate::support::program::read_json(folder.join("report.json"));
        assert_eq!(
            (card.lines().find(|line| line.starts_with("# ")), &report["settings"]["out"]),
            (Some("# new"), &"new".into())
        );
        let files = crate::support::program::lasting_files_of(&folder);
        assert_eq!(differing(expected.get_or_insert(files.clone()), &files), [""; 0], "{out}");
        assert_eq!(names_in(&bench.outputs()), ["new"]);
        for existing in ["new", "new/", "new/."] {
            let output = run(existing, &["--dry-run"]);
            assert_eq!(output.status.code(), Some(1), "{existing}");
            assert!(stderr(&output).contains("error: new exists. Remove it"), "{}", stderr(&output));
        }
        fs::remove_dir_all(folder).unwrap();
    }
    // Links exist, wherever they lead.
    fs::create_dir(bench.outputs().join("folder")).unwrap();
    symlink("folder", bench.outputs().join("link")).unwrap();
    symlink("nothing", bench.outputs().join("dangling")).unwrap();
    let before = everything(&bench.outputs());
    let long = "n".repeat(255 - ".vlmq.".len());
    let too_long = format!("{long}n");
    let deep = format!("{}new", "../outputs/".repeat(400));
    for (out, says) in [
        ("link", "link exists. Remove it"),
        ("link/", "link exists. Remove it"),
        ("dangling", "dangling exists. Remove it"),
        ("dangling/.", "dangling exists. Remove it"),
        (".", "no name for an output folder"),
        ("..", "no name for an output folder"),
        ("new/..", "no name for an output folder"),
        ("/", "no name for an output folder"),
        ("none/new/", "there is no folder none; create it first"),
        (&too_long, "is too long a name for its file system; choose a shorter one"),
        (&deep, "is too long a name for its file system; choose a shorter one"),
    ] {
        for extra in [&[][..], &["--dry-run"]] {
            let output = run(out, extra);
            assert_eq!(output.status.code(), Some(1), "{out} {extra:?}: {}", stderr(&output));
            assert!(stderr(&output).contains(says), "{out} {extra:?}: {}", stderr(&output));
            assert!(!stderr(&output).contains("reading data"), "{out}: {}", stderr(&output));
            assert_eq!(everything(&bench.outputs()), before, "{out}");
        }
    }
    let output = run(&long, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

/// `--json` writes neither through a link nor over a file that only has the name of a half one.
#[test]
fn scores_go_where_they_are_sent() {
    let bench = Bench::new("flat-tied-bf16");
    let json = bench.outputs().join("scores.json");
    let victim = bench.outputs().join("victim");
    fs::write(&victim, "precious").unwrap();
    for target in [&victim, &bench.outputs().join("nothing")] {
        symlink(target, &json).unwrap();
        let before = everything(&bench.outputs());
        let output = vlmq_run(&bench.eval(&[]));
        assert_eq!(output.status.code(), Some(1));
        assert!(
            stderr(&output).contains("scores.json: is a link; give the name of the file itself"),
            "{}",
            stderr(&output)
        );
        assert_eq!(everything(&bench.outputs()), before);
        fs::remove_file(&json).unwrap();
    }
    let partial = bench.outputs().join("scores.json.partial");
    symlink(&victim, &partial).unwrap();
    let output = vlmq_run(&bench.eval(&[]));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("scores.json.partial is in the way; remove that"), "{}", stderr(&output));
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    fs::remove_file(&partial).unwrap();
    // What is there is replaced, and another name of it keeps what it had.
    fs::hard_link(&victim, &json).unwrap();
    let output = vlmq_run(&bench.eval(&[]));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    assert_eq!(crate::support::program::read_json(&json)["n"], 1);
    assert_eq!(names_in(&bench.outputs()), ["scores.json", "victim"]);
}
