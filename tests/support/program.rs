//! The built program, and copies of checkpoints for it to read.

use serde_json::{Map, Value};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs the program.
pub fn vlmq_run<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vlmq-run")).args(arguments).output().unwrap()
}

/// Runs the program behind lines of a shell.
#[cfg(unix)]
pub fn run_behind<S: AsRef<OsStr>>(lines: &str, arguments: &[S]) -> Output {
    let script = format!("{lines}; exec \"$0\" \"$@\"");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script, env!("CARGO_BIN_EXE_vlmq-run")]).args(arguments).output().unwrap()
}

/// Runs the program with no more address space, in MiB, and processor time, in seconds, than given: what needs more of either ends
/// without a word of its own. The stack of a thread for templates and tokenizers takes 512 MiB of the former.
#[cfg(unix)]
pub fn limited_run<S: AsRef<OsStr>>(mebibytes: usize, seconds: u32, arguments: &[S]) -> Output {
    run_behind(&format!("set -e; ulimit -v {}; ulimit -t {seconds}", mebibytes << 10), arguments)
}

/// Runs the program with no more processor time, in seconds, than given, where the system can see to that.
pub fn brief_run<S: AsRef<OsStr>>(seconds: u32, arguments: &[S]) -> Output {
    #[cfg(unix)]
    return run_behind(&format!("set -e; ulimit -t {seconds}"), arguments);
    #[cfg(not(unix))]
    {
        let _ = seconds;
        vlmq_run(arguments)
    }
}

/// Runs the program with emulated kernels at hand.
pub fn emulated_run<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    emulated(arguments).output().unwrap()
}

/// The same, to be run.
pub fn emulated<S: AsRef<OsStr>>(arguments: &[S]) -> Command {
    let library = super::kernels::build("vlmq_kernels", "kernels", super::kernels::Variant::Plain);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vlmq-run"));
    command.env("VLMQ_EMULATED_KERNELS", library).args(arguments);
    command
}

/// Runs the program, which must succeed, and returns what it prints.
pub fn succeed<S: AsRef<OsStr> + std::fmt::Debug>(arguments: &[S]) -> String {
    let output = vlmq_run(arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    stdout(&output)
}

/// What the program wrote on stderr.
pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// What the program wrote on stdout.
pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A path as an argument.
pub fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().to_str().unwrap().to_owned()
}

/// Names in `folder`, sorted.
pub fn names_in(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// Every file of a flat folder with its bytes, sorted by name.
pub fn files_of(folder: &Path) -> Vec<(String, Vec<u8>)> {
    names_in(folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(name)).unwrap())).collect()
}

/// The files of an output that the same input gives the same bytes of: all but the reports, which hold times, and their
/// checksums.
pub fn lasting_files_of(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let is_report = |name: &str| name.starts_with("report.");
    let mut files = files_of(folder);
    files.retain(|(name, _)| !is_report(name));
    let (_, sums) = files.iter_mut().find(|(name, _)| name == "SHA256SUMS").expect("checksums");
    let text = String::from_utf8(std::mem::take(sums)).unwrap();
    let (reports, others): (Vec<&str>, _) =
        text.split_inclusive('\n').partition(|line| line.split("  ").nth(1).is_some_and(is_report));
    assert!(!reports.is_empty(), "no checksum of a report");
    *sums = others.concat().into_bytes();
    files
}

/// Copies the files of a flat folder.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for (name, bytes) in files_of(from) {
        fs::write(to.join(name), bytes).unwrap();
    }
}

/// Reads a JSON file.
pub fn read_json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Changes a JSON file that holds an object.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let mut value = read_json(path);
    edit(value.as_object_mut().unwrap());
    fs::write(path, value.to_string()).unwrap();
}

/// Changes the header of a safetensors file.
pub fn edit_header(path: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let bytes = fs::read(path).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
    edit(header.as_object_mut().unwrap());
    fs::write(path, super::checkpoint::with_header(&header.to_string(), bytes[end..].to_vec())).unwrap();
}

/// Changes the bytes of one tensor.
pub fn edit_tensor(path: &Path, name: &str, edit: impl FnOnce(&mut [u8])) {
    let mut bytes = fs::read(path).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
    let offset = |i: usize| end + header[name]["data_offsets"][i].as_u64().unwrap() as usize;
    edit(&mut bytes[offset(0)..offset(1)]);
    fs::write(path, bytes).unwrap();
}

/// The image that a [`Bench`] has beside its data.
pub const IMAGE: &str = "gradient-70x42.png";

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap()
}

/// A copy of a small checkpoint and its data, to be broken, and an empty folder to write to.
pub struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    /// With the bf16 checkpoint in one file, or the f16 one in three.
    pub fn new(checkpoint: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let bench = Self { folder };
        copy_folder(&super::golden("model").join(checkpoint), &bench.model());
        fs::copy(super::golden("model/images").join(IMAGE), folder_of(&bench.data()).join(IMAGE)).unwrap();
        bench.write_data(&[&question(IMAGE)]);
        fs::create_dir(bench.outputs()).unwrap();
        bench
    }

    /// The checkpoint.
    pub fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    /// A file of the checkpoint.
    pub fn file(&self, name: &str) -> PathBuf {
        self.model().join(name)
    }

    /// Calibration and evaluation data.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data.jsonl")
    }

    /// Replaces the data.
    pub fn write_data(&self, lines: &[&str]) {
        fs::write(self.data(), lines.join("\n")).unwrap();
    }

    /// The folder in which nothing may be left.
    pub fn outputs(&self) -> PathBuf {
        self.folder.path().join("outputs")
    }

    /// A command line that quantizes, with further flags.
    pub fn quantize(&self, extra: &[&str]) -> Vec<String> {
        let (model, data, out) = (text(self.model()), text(self.data()), text(self.outputs().join("out")));
        let fixed = ["quantize", &model, "--calib", &data, "--out", &out];
        let group: &[&str] = if extra.contains(&"--group-size") { &[] } else { &["--group-size", "32"] };
        fixed.iter().chain(group).chain(extra).map(|&argument| argument.to_owned()).collect()
    }

    /// A command line that evaluates, with further flags. Text without a question cannot be evaluated: see
    /// [`write_data`](Self::write_data).
    pub fn eval(&self, extra: &[&str]) -> Vec<String> {
        let (model, data, json) = (text(self.model()), text(self.data()), text(self.outputs().join("scores.json")));
        let fixed = ["eval", &model, &data, "--json", &json];
        fixed.iter().chain(extra).map(|&argument| argument.to_owned()).collect()
    }

    /// A command line that inspects.
    pub fn inspect(&self) -> Vec<String> {
        vec!["inspect".to_owned(), text(self.model())]
    }

    /// Asserts that a command line fails as it should: exit code 1, one error on one line that contains all of `says`,
    /// nothing on stdout, nothing written but what an unfinished run goes on from.
    pub fn refused(&self, arguments: &[String], says: &[&str]) {
        self.check_refusal(&vlmq_run(arguments), &format!("{arguments:?}"), says);
    }

    /// As [`refused`](Self::refused), of a run that is over.
    pub fn check_refusal(&self, output: &Output, what: &str, says: &[&str]) {
        let errors = stderr(output);
        assert_eq!(output.status.code(), Some(1), "{what} expects {says:?}: {errors}{}", stdout(output));
        let last = errors.lines().last().unwrap_or_default();
        assert!(last.starts_with("error: "), "{what}: {errors}");
        assert_eq!(errors.matches("error:").count(), 1, "{what}: {errors}");
        assert!(!errors.contains("panicked"), "{what}: {errors}");
        for part in says {
            assert!(last.contains(part), "{what}: {part:?} is not in {last:?}");
        }
        assert!(output.stdout.is_empty(), "{what}: {}", stdout(output));
        // What is done is kept, and said to be, once a block is.
        let kept: &[&str] = if last.contains("blocks are done and kept in") { &[".out.vlmq"] } else { &[] };
        assert_eq!(names_in(&self.outputs()), kept, "{what} leaves files behind");
        // Whatever is tried next begins anew.
        kept.iter().for_each(|name| fs::remove_dir_all(self.outputs().join(name)).unwrap());
    }
}

/// Makes a pipe that nobody writes to.
#[cfg(unix)]
pub fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// A line of data: one image, a question, an answer.
pub fn question(image: &str) -> String {
    serde_json::json!({"id": "q", "messages": [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what shape?"}]},
        {"role": "assistant", "content": "square"},
    ]})
    .to_string()
}

/// Which commands meet the fault.
#[derive(Clone, Copy, PartialEq)]
pub enum Meets {
    /// quantize, eval and inspect.
    All,
    /// quantize and eval: weights and side files, which inspect does not read.
    Runs,
    /// quantize only.
    Quantize,
}

/// Breaks a copy of a checkpoint and asserts that the commands refuse it with words that contain all of `says`.
pub fn broken(checkpoint: &str, meets: Meets, says: &[&str], fault: impl FnOnce(&Path)) {
    let bench = Bench::new(checkpoint);
    fault(&bench.model());
    bench.refused(&bench.quantize(&[]), says);
    if meets != Meets::Quantize {
        bench.refused(&bench.eval(&[]), says);
    }
    if meets == Meets::All {
        bench.refused(&bench.inspect(), says);
    }
}
