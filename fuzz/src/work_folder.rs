//! A run that goes on with a work folder that somebody has touched.

use super::files::sources;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tempfile::TempDir;
use vlmq::device::cpu::Cpu;
use vlmq::progress::{Observer, Stage, Stop};
use vlmq::quantize::settings::SolverSettings;
use vlmq::report::RunObserver;
use vlmq::run::{self, RunSettings};

/// Where the run keeps its work.
const WORK: &str = ".out.vlmq";

/// Names of files that no run has left there.
const NAMES: [&str; 12] = [
    "x",
    "evil.py",
    "state-7",
    "state-0",
    "spare-0",
    "spare-2",
    "levels",
    "run.json.partial",
    "checkpoint/evil.py",
    "checkpoint/extra.safetensors",
    "checkpoint/report.json",
    "checkpoint/additional_chat_templates/x.jinja",
];

/// What links lead to, and nothing may change.
const PRECIOUS: &[u8] = b"precious";

/// Stops behind the first of the two blocks.
#[derive(Default)]
struct Stopper(Stop);

impl Observer for Stopper {
    fn stage_advanced(&mut self, stage: Stage, done: u64, _step: &str) {
        if stage == Stage::Blocks && done == 1 {
            self.0.request();
        }
    }

    fn stop(&self) -> Stop {
        self.0.clone()
    }
}

impl RunObserver for Stopper {}

/// A work folder behind one of two blocks, and what the whole run comes to.
struct Base {
    work: Vec<(PathBuf, Vec<u8>)>,
    finished: BTreeMap<PathBuf, Vec<u8>>,
}

fn settings(folder: &Path) -> RunSettings {
    let golden = sources().join("tests/golden/model");
    let data = golden.join("flat-tied-bf16.jsonl");
    RunSettings {
        solver: SolverSettings { group_size: Some(32), ..SolverSettings::default() },
        samples: 2,
        save_every: 0,
        ..RunSettings::new(golden.join("flat-tied-bf16"), Some(data), folder.join("out"))
    }
}

/// Every file below a folder, by its path there.
fn files_of(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).expect("a folder that is there") {
            let path = entry.expect("an entry of it").path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push((
                    path.strip_prefix(folder).expect("a path below it").to_path_buf(),
                    fs::read(&path).expect("a file that is there"),
                )),
            }
        }
    }
    files.sort();
    files
}

/// What a finished run has written, but for what holds times (reports, and the checksums of these) or where it lies (the card).
fn lasting(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let other = ["report.json", "report.html", "SHA256SUMS", "README.md"];
    files_of(folder).into_iter().filter(|(path, _)| other.iter().all(|name| path != Path::new(name))).collect()
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder for temporary files");
        let settings = settings(folder.path());
        run::run(&Cpu, &settings, &mut Stopper::default()).expect_err("a run that was stopped");
        let work = files_of(&folder.path().join(WORK));
        assert!(work.iter().any(|(path, _)| path == Path::new("state-1")), "a state behind the first block");
        run::run(&Cpu, &settings, &mut ()).expect("the rest of it");
        Base { work, finished: lasting(&folder.path().join("out")) }
    })
}

/// Bytes one after the other, zeros behind the last.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    /// A place in something of `length`.
    fn place(&mut self, length: usize) -> usize {
        let share = usize::from(self.byte()) << 8 | usize::from(self.byte());
        (share * length) >> 16
    }
}

/// Writes a file in the place of what has its name: through a link it would be this target's own doing.
fn put(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let _ = fs::remove_file(path);
    fs::write(path, bytes)
}

/// Does to a work folder what the script says, a few steps of it.
fn touch(work: &Path, victim: &Path, script: &mut Script<'_>) {
    let files = &base().work;
    for _ in 0..8 {
        if script.0.is_empty() {
            return;
        }
        let kind = script.byte();
        let path = work.join(&files[usize::from(script.byte()) % files.len()].0);
        let added = work.join(NAMES[usize::from(script.byte()) % NAMES.len()]);
        let mut bytes = fs::read(&path).unwrap_or_default();
        // What was taken away before cannot be changed again.
        let _ = match kind % 9 {
            0 => {
                let place = script.place(bytes.len());
                let change = script.byte().max(1);
                bytes.get_mut(place).into_iter().for_each(|byte| *byte ^= change);
                put(&path, &bytes)
            }
            1 => {
                bytes.truncate(script.place(bytes.len()));
                put(&path, &bytes)
            }
            2 => fs::remove_file(&path),
            3 => {
                bytes.extend(vec![0; usize::from(script.byte())]);
                put(&path, &bytes)
            }
            4 => {
                let length = usize::from(script.byte()).min(script.0.len());
                let (text, rest) = script.0.split_at(length);
                script.0 = rest;
                put(&path, text)
            }
            5 => fs::rename(&path, &added),
            6 => fs::create_dir_all(added.parent().expect("the work folder")).and_then(|()| put(&added, &bytes)),
            7 => {
                let _ = fs::remove_file(&path);
                link(victim, &path)
            }
            _ => fs::create_dir_all(added.parent().expect("the work folder")).and_then(|()| link(victim, &added)),
        };
    }
}

#[cfg(unix)]
fn link(to: &Path, at: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(to, at)
}

#[cfg(not(unix))]
fn link(_to: &Path, _at: &Path) -> std::io::Result<()> {
    Ok(())
}

/// The run is refused, or comes to the same bytes; what links lead to is as it was.
pub fn resume(bytes: &[u8]) {
    let folder: TempDir = tempfile::tempdir().expect("a folder for temporary files");
    let (work, victim) = (folder.path().join(WORK), folder.path().join("victim"));
    fs::write(&victim, PRECIOUS).expect("room for a small file");
    for (path, content) in &base().work {
        let path = work.join(path);
        fs::create_dir_all(path.parent().expect("the work folder")).expect("room for a folder");
        fs::write(path, content).expect("room for a small file");
    }
    touch(&work, &victim, &mut Script(bytes));
    if super::done(run::run(&Cpu, &settings(folder.path()), &mut ())).is_some() {
        let found = lasting(&folder.path().join("out"));
        let differs = |path: &&PathBuf| found.get(*path) != base().finished.get(*path);
        let names: Vec<&PathBuf> = found.keys().chain(base().finished.keys()).filter(differs).collect();
        assert!(names.is_empty(), "other bytes: {names:?}");
    }
    assert_eq!(fs::read(&victim).expect("a file that is there"), PRECIOUS, "a file outside the work folder");
}
