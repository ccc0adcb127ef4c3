//! The program under limits of the system: threads, stack, files, their size, memory, and where its output goes. Whatever is lacking
//! is told in one message, and nothing but the work folder is left.

use crate::resuming::{Moment, PLAIN, Place, differing};
use crate::support::program::{Bench, names_in, run_behind, stderr, stdout, succeed, text, vlmq_run};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use vlmq::device::cpu::Cpu;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vlmq-run");
const SMALL: &str = "flat-tied-bf16";

/// Whether a run was good; if not, it must have said why in one line, and left nothing.
fn good_or_told(bench: &Bench, output: &Output, what: &str) -> bool {
    let errors = stderr(output);
    assert!(!errors.contains("panicked"), "{what}: {errors}");
    match output.status.code() {
        Some(0) => {
            let _ = fs::remove_dir_all(bench.outputs().join("out"));
            let _ = fs::remove_file(bench.outputs().join("scores.json"));
            assert_eq!(names_in(&bench.outputs()), [""; 0], "{what}");
            true
        }
        _ => {
            bench.check_refusal(output, what, &[]);
            false
        }
    }
}

#[test]
fn a_limit_on_the_size_of_files_is_like_a_full_disk() {
    let limited = |place: &Place| run_behind("ulimit -f 100", &place.arguments(&[]));
    let whole = Place::new(PLAIN);
    assert_eq!(whole.run(&[]).status.code(), Some(0));
    let place = Place::new(PLAIN);
    let output = limited(&place);
    let errors = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{:?}: {errors}", output.status);
    assert!(errors.contains("cannot write") && errors.contains("too large"), "{errors}");
    assert_eq!(place.left(), [""; 0]);
    // With something to go on from.
    place.run_until(&Cpu, Moment::Block(1)).unwrap_err();
    let output = limited(&place);
    let errors = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{:?}: {errors}", output.status);
    assert!(errors.contains("1 of 3 blocks are done and kept in") && errors.contains("too large"), "{errors}");
    assert_eq!(place.left(), [".out.vlmq"]);
    assert_eq!(place.run(&[]).status.code(), Some(0));
    assert_eq!(differing(&place.finished(), &whole.finished()), [""; 0]);
    // What is printed goes to a file as well.
    let bench = Bench::new(SMALL);
    let printed = bench.outputs().join("printed");
    let script = "ulimit -f 0; exec \"$0\" inspect \"$1\" > \"$2\"";
    let output =
        Command::new("sh").args(["-c", script, PROGRAM]).args([bench.model(), printed.clone()]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{:?}: {}", output.status, stderr(&output));
    assert!(stderr(&output).starts_with("error: cannot write to stdout: File too large"), "{}", stderr(&output));
}

#[test]
fn a_small_stack_is_enough() {
    let bench = Bench::new(SMALL);
    let commands = [bench.quantize(&[]), bench.eval(&["--threads", "1"]), bench.inspect()];
    for kilobytes in [64, 128, 512, 2048] {
        for arguments in &commands {
            let output = run_behind(&format!("ulimit -s {kilobytes}"), arguments);
            assert!(good_or_told(&bench, &output, &format!("{kilobytes} kB: {arguments:?}")), "{}", stderr(&output));
        }
    }
}

#[test]
fn too_few_open_files_are_told() {
    let bench = Bench::new(SMALL);
    let commands = [bench.quantize(&[]), bench.eval(&[]), bench.inspect()];
    let mut good = [false; 3];
    // With fewer the system's loader finds no library.
    for count in (4..12).chain([24]) {
        for (arguments, good) in commands.iter().zip(&mut good) {
            let output = run_behind(&format!("ulimit -n {count}"), arguments);
            *good = good_or_told(&bench, &output, &format!("{count} open files: {arguments:?}"));
            assert!(!*good || count > 5, "{count} open files are enough?");
        }
    }
    assert_eq!(good, [true; 3]);
}

/// Rust ends a program that is refused memory by SIGABRT: nothing can be done about that, but it leaves no more than a kill.
#[test]
fn too_little_memory_leaves_nothing_but_the_work_folder() {
    let bench = Bench::new(SMALL);
    let mut ends = [0; 3];
    for megabytes in [20, 40, 60, 80, 120, 200, 400, 600, 700, 800, 1000, 2000] {
        let line = format!("ulimit -v {}", megabytes << 10);
        let output = run_behind(&line, &bench.quantize(&["--threads", "2"]));
        let errors = stderr(&output);
        if output.status.code() == Some(0) {
            fs::remove_dir_all(bench.outputs().join("out")).unwrap();
            ends[0] += 1;
        } else if output.status.signal().is_some() {
            assert!(
                errors.contains("memory allocation of") || errors.is_empty(),
                "{line}: {:?} {errors}",
                output.status
            );
            ends[1] += 1;
        } else {
            // 127: the loader's.
            assert!([Some(1), Some(127)].contains(&output.status.code()), "{line}: {errors}");
            assert!(!errors.contains("panicked"), "{line}: {errors}");
            ends[2] += 1;
        }
        let left = names_in(&bench.outputs());
        assert!(left.iter().all(|name| name == ".out.vlmq"), "{line}: {left:?}");
        left.iter().for_each(|name| fs::remove_dir_all(bench.outputs().join(name)).unwrap());
    }
    assert!(ends[0] > 0 && ends[2] > 0, "{ends:?}");
}

/// The program where another user can run it, whom a number of processes limits.
struct Crowded {
    bench: Bench,
    program: PathBuf,
    /// The user, where this process may choose one; its own is limited otherwise, with all that it runs.
    user: Option<u32>,
}

impl Crowded {
    fn new() -> Self {
        let bench = Bench::new(SMALL);
        let folder = bench.outputs().parent().unwrap().to_owned();
        let program = folder.join("vlmq-run");
        fs::copy(PROGRAM, &program).unwrap();
        for (path, mode) in [(&folder, 0o755), (&program, 0o755), (&bench.outputs(), 0o777)] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let probe = folder.join("probe");
        fs::write(&probe, "").unwrap();
        // Numbers that no user has, each once: a user's limit counts all that is the user's.
        static USERS: AtomicU32 = AtomicU32::new(0);
        let user = 1_000_000 + 8 * std::process::id() + USERS.fetch_add(1, Ordering::Relaxed);
        let may = std::os::unix::fs::chown(&probe, Some(user), None).is_ok();
        Self { bench, program, user: may.then_some(user) }
    }

    fn command(&self, threads: usize, arguments: &[String]) -> Vec<String> {
        let user = self.user.map(|user| {
            ["setpriv".into(), format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".into()]
        });
        let limit = ["prlimit".to_owned(), format!("--nproc={threads}:{threads}"), text(&self.program)];
        user.into_iter().flatten().chain(limit).chain(arguments.iter().cloned()).collect()
    }

    /// Asserts of every number of threads that the program says which it lacks, or is done. Returns the messages.
    fn sweep(&self, arguments: &[String], run: impl Fn(&[String]) -> Output) -> Vec<String> {
        let mut said = Vec::new();
        for threads in 1..16 {
            let output = run(&self.command(threads, arguments));
            if good_or_told(&self.bench, &output, &format!("{threads} threads: {arguments:?}")) {
                assert!(self.user.is_some() && threads > 1, "{threads} threads are enough");
                return said;
            }
            let errors = stderr(&output);
            assert!(errors.contains("cannot start") && errors.contains("temporarily unavailable"), "{errors}");
            said.extend(errors.lines().last().map(str::to_owned));
        }
        assert!(self.user.is_none(), "16 threads are not enough: {said:?}");
        said
    }
}

#[test]
fn threads_that_are_not_to_be_had_are_told() {
    let crowded = Crowded::new();
    let run = |line: &[String]| Command::new(&line[0]).args(&line[1..]).output().unwrap();
    for arguments in [crowded.bench.quantize(&["--threads", "3"]), crowded.bench.eval(&["--threads", "3"])] {
        let said = crowded.sweep(&arguments, run);
        assert!(said[0].starts_with("error: cannot start a thread to take signals"), "{said:?}");
        if crowded.user.is_some() {
            assert!(
                said.iter().any(|line| line.starts_with("error: cannot start 3 threads; ask for fewer")),
                "{said:?}"
            );
            assert!(said.iter().any(|line| line.contains("cannot start a thread for a chat template")), "{said:?}");
        }
    }
    // A small stack takes one more, for the work itself.
    let small = |line: &[String]| {
        let script = "ulimit -s 256; exec \"$0\" \"$@\"";
        Command::new("sh").args(["-c", script]).args(line).output().unwrap()
    };
    let said = crowded.sweep(&crowded.bench.inspect(), small);
    assert!(said[0].starts_with("error: cannot start the main thread"), "{said:?}");
}

/// On a terminal there are bars, whose clock takes a thread as well.
#[cfg(target_os = "linux")]
#[test]
fn on_a_terminal_threads_that_are_not_to_be_had_are_told() {
    let crowded = Crowded::new();
    let on_a_terminal = |line: &[String]| {
        let line: Vec<String> = line.iter().map(|word| format!("'{word}'")).collect();
        // stdout stays ours, and what the terminal shows becomes stderr.
        let printed = crowded.bench.outputs().join("printed");
        let command = format!("{} > '{}'", line.join(" "), printed.display());
        let mut output = Command::new("script").args(["-q", "-e", "-c", &command, "/dev/null"]).output().unwrap();
        output.stderr =
            String::from_utf8(std::mem::take(&mut output.stdout)).unwrap().replace("\r\n", "\n").into_bytes();
        output.stdout = fs::read(&printed).unwrap();
        fs::remove_file(printed).unwrap();
        output
    };
    let said = crowded.sweep(&crowded.bench.quantize(&["--threads", "1"]), on_a_terminal);
    assert!(
        crowded.user.is_none() || said.iter().any(|line| line.contains("the clock of the progress bars")),
        "{said:?}"
    );
}

/// Where results cannot be printed, that is an error; a reader who has had enough is none.
#[cfg(target_os = "linux")]
#[test]
fn results_that_cannot_be_printed_are_told() {
    let bench = Bench::new(SMALL);
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    let full = |arguments: &[String]| {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        Command::new(PROGRAM).args(arguments).stdout(full).stderr(Stdio::piped()).output().unwrap()
    };
    let commands = [
        bench.inspect(),
        [bench.inspect(), words(&["--json"])].concat(),
        bench.quantize(&["--dry-run"]),
        bench.quantize(&["--dry-run=json"]),
        words(&["--help"]),
        words(&["quantize", "--help"]),
        words(&["--version"]),
    ];
    for arguments in commands {
        let output = full(&arguments);
        bench.check_refusal(
            &output,
            &format!("{arguments:?}"),
            &["error: cannot write to stdout: No space left on device"],
        );
    }
    // What was written before is there, and is said to be.
    let output = full(&bench.quantize(&["--solver", "rtn"]));
    assert_eq!(output.status.code(), Some(1));
    let said = "out is finished: cannot write to stdout: No space left on device";
    assert!(stderr(&output).lines().last().unwrap().contains(said), "{}", stderr(&output));
    assert_eq!(names_in(&bench.outputs()), ["out"]);
    for arguments in [bench.inspect(), words(&["--help"])] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(PROGRAM).args(arguments).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
    }
}

/// Names and groups from strangers' files, as all commands print them.
#[test]
fn a_terminal_is_given_nothing_to_obey() {
    const HOSTILE: &str = "\u{1b}]0;pwned\u{7}\u{1b}[31mred\r\u{9b}2J\u{7f}\u{202e}txt\u{2066}\u{2028}end";
    const SHOWN: &str =
        "\u{fffd}]0;pwned\u{fffd}\u{fffd}[31mred\u{fffd}\u{fffd}2J\u{fffd}\u{fffd}txt\u{fffd}\u{fffd}end";
    let bench = Bench::new(SMALL);
    let is_harmless = |text: &str| !text.chars().any(|c| vlmq::progress::is_unshown(c) && c != '\n');
    let harmless = |output: &Output, shown: bool| {
        let (printed, told) = (stdout(output), stderr(output));
        assert!(is_harmless(&printed), "{printed:?}");
        assert!(is_harmless(&told), "{told:?}");
        assert_eq!(printed.contains(SHOWN) || told.contains(SHOWN), shown, "{printed}{told}");
    };
    let mut line: serde_json::Value =
        serde_json::from_str(&crate::support::program::question(crate::support::program::IMAGE)).unwrap();
    (line["group"], line["id"]) = (HOSTILE.into(), HOSTILE.into());
    bench.write_data(&[&line.to_string()]);

    // Tables stay tables, and JSON says what the file said.
    let output = vlmq_run(&bench.eval(&[]));
    harmless(&output, true);
    let printed = stdout(&output);
    let ends: Vec<usize> = printed.lines().map(|line| line.chars().count()).collect();
    assert!(ends[..3].iter().all(|&end| end == ends[0]), "{printed}");
    let json = fs::read_to_string(bench.outputs().join("scores.json")).unwrap();
    assert!(is_harmless(&json), "{json:?}");
    let scores: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&scores["answers"][0]["id"], scores["groups"][HOSTILE]["n"].as_u64()), (&HOSTILE.into(), Some(1)));

    // Both evaluations, behind a run; then names of foreign files and of missing tensors.
    let data = text(bench.data());
    let output = vlmq_run(&bench.quantize(&["--solver", "rtn", "--eval", &data]));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    harmless(&output, true);
    let out = bench.outputs().join("out");
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(!page.contains('\u{1b}') && !page.contains('\u{202e}'));
    let (model, copy) = (text(bench.model()), text(&out));
    succeed(&["verify", &copy, "--against", &model]);
    let foreign = out.join(HOSTILE);
    fs::write(&foreign, "").unwrap();
    let output = vlmq_run(&["verify", &copy, "--against", &model]);
    assert_eq!(output.status.code(), Some(1));
    harmless(&output, true);
    fs::remove_file(foreign).unwrap();
    crate::support::program::edit_header(&out.join("model.safetensors"), |header| {
        let name = header.keys().find(|name| name.contains("norm")).unwrap().clone();
        let tensor = header.remove(&name).unwrap();
        header.insert(HOSTILE.into(), tensor);
    });
    let output = vlmq_run(&["verify", &copy, "--against", &model]);
    assert_eq!(output.status.code(), Some(1));
    harmless(&output, true);
    harmless(&vlmq_run(&bench.inspect()), false);

    // A folder's name, in what is told and in JSON.
    let hostile = bench.outputs().join(HOSTILE);
    fs::rename(bench.model(), &hostile).unwrap();
    for extra in [&[][..], &["--json"]] {
        let output = vlmq_run(&[&["inspect", &text(&hostile)][..], extra].concat());
        harmless(&output, extra.is_empty());
        assert!(stdout(&output).contains("\\u009b2J\\u007f\\u202etxt") || extra.is_empty(), "{}", stdout(&output));
    }
}
