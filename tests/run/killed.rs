//! The program killed at any moment, told to stop, on a full or read-only disk, and twice at once: nothing is lost, and nothing
//! but the work folder is left.

use crate::resuming::{DEEPSTACK, Moment, PLAIN, Place, differing};
use crate::support::alone::{arguments, full_name};
use crate::support::kernels::{Variant, build};
use crate::support::program::{stderr, text};
use crate::support::{data, uniform};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use vlmq::device::cpu::Cpu;

/// How long something is waited for that comes soon, or the test has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts the program.
fn start(place: &Place, extra: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vlmq-run"));
    if extra.contains(&"cuda") {
        command.env("VLMQ_EMULATED_KERNELS", build("vlmq_kernels", "kernels", Variant::Plain));
    }
    command.args(place.arguments(extra)).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for the program's end, at most so long.
fn ends_within(child: &mut Child, time: Duration) -> bool {
    let begin = Instant::now();
    while begin.elapsed() < time {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    false
}

/// Waits until the run has a state behind so many blocks, or more.
fn wait_for_state(place: &Place, blocks: usize) {
    let begin = Instant::now();
    while finished(place) < Some(blocks) {
        assert!(begin.elapsed() < PATIENCE, "no state {blocks} in {:?}", place.left());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The states that a run has left, or has at this moment.
fn states(place: &Place) -> Vec<String> {
    let entries = fs::read_dir(place.work()).into_iter().flatten();
    let mut states: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    states.retain(|name| name.starts_with("state-"));
    states.sort();
    states
}

/// Blocks behind which it goes on.
fn finished(place: &Place) -> Option<usize> {
    states(place).iter().filter_map(|name| name["state-".len()..].parse().ok()).max()
}

fn send(signal: &str, child: &Child) {
    let sent = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status().unwrap();
    assert!(sent.success());
}

/// For [`Place::slow`].
const SLOW: &[&str] = &["--samples", "48"];

/// Kills runs of one command, again and again, until `kills` are reached. Returns what was found behind the kills: numbers of
/// states, with how often.
fn kill(checkpoint: &str, extra: &[&str], kills: usize, seed: u64) -> BTreeMap<String, usize> {
    let reference = Place::new(checkpoint);
    let begin = Instant::now();
    let output = start(&reference, extra).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let usual = begin.elapsed();
    let expected = reference.finished();

    let mut chance = uniform(seed).map(|u| f64::from(u + 1.0) / 2.0);
    let mut found = BTreeMap::new();
    let mut killed = 0;
    while killed < kills {
        let place = Place::new(checkpoint);
        for attempt in 1.. {
            let mut child = start(&place, extra);
            // A machine that has become slower gets more time.
            let patience = usual.mul_f64(1.2 * chance.next().unwrap() * (1.0 + f64::from(attempt) / 20.0));
            if !ends_within(&mut child, patience) {
                child.kill().unwrap();
            }
            let output = child.wait_with_output().unwrap();
            if output.status.code() == Some(0) {
                break;
            }
            let errors = stderr(&output);
            // Killed behind the rename, the run is done.
            if output.status.code() == Some(1) && errors.contains("out exists") {
                break;
            }
            assert_eq!(output.status.code(), None, "{errors}");
            killed += 1;
            let left = place.left();
            assert!(left.iter().all(|name| name == ".out.vlmq" || name == "out"), "{left:?}");
            *found.entry(states(&place).join(" ")).or_default() += 1;
        }
        assert_eq!(differing(&place.finished(), &expected), [""; 0], "{checkpoint} {extra:?} behind {killed} kills");
    }
    found
}

#[test]
#[ignore = "slow: a hundred kills"]
fn killed_at_random_moments_runs_give_the_same_bytes() {
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    let runs: &[(&str, &[&str], usize)] = &[
        (PLAIN, &[], 40),
        (PLAIN, &["--solver", "rtn", "--format", "dequantized"], 15),
        (DEEPSTACK, &[], 35),
        (DEEPSTACK, &["--solver", "gptq", "--format", "gptq", "--order", "act"], 15),
        // What no state has is done again, from the start where there is none.
        (DEEPSTACK, &["--save-every", "1000"], 10),
    ];
    for (i, &(checkpoint, extra, kills)) in runs.iter().enumerate() {
        for (states, count) in kill(checkpoint, extra, kills, i as u64 + 1) {
            *found.entry(states).or_default() += count;
        }
    }
    println!("states found: {found:?}");
    assert!(found.values().sum::<usize>() >= 100, "{found:?}");
    // Before there was a state, and behind every block.
    for states in ["", "state-0", "state-1", "state-2", "state-3"] {
        assert!(found.contains_key(states), "never killed at {states:?}: {found:?}");
    }
}

#[test]
fn killed_on_emulated_kernels_a_run_gives_the_same_bytes() {
    kill("flat-tied-bf16", &["--device", "cuda"], 6, 9);
}

/// Ends a run by a signal and lets the same command go on.
#[test]
fn signals_end_a_run_where_nothing_is_lost() {
    let whole = Place::slow();
    assert_eq!(whole.run(SLOW).status.code(), Some(0));
    let expected = whole.finished();
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let place = Place::slow();
        let mut child = start(&place, SLOW);
        wait_for_state(&place, 1);
        // Held still, so that all it does from here on it does with the signal before it, however busy the machine is.
        send("STOP", &child);
        let before = finished(&place);
        send(signal, &child);
        send("CONT", &child);
        assert!(ends_within(&mut child, PATIENCE), "SIG{signal} ends nothing");
        let output = child.wait_with_output().unwrap();
        let errors = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{errors}");
        let last = errors.lines().last().unwrap();
        assert!(last.starts_with("interrupted: ") && last.contains(" of 4 blocks are done and kept in "), "{errors}");
        assert!(last.ends_with("; run the same command again to go on"), "{errors}");
        assert!(!errors.contains("error:"), "{errors}");
        assert_eq!(place.left(), [".out.vlmq"]);
        let more = finished(&place).unwrap() - before.unwrap();
        assert!(more <= 1, "{more} blocks are finished behind SIG{signal}");
        let output = place.run(&[SLOW, &["--quiet"]].concat());
        assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
        assert_eq!(differing(&place.finished(), &expected), [""; 0]);
    }

    // At the very start there is nothing to keep; two signals end the program at once.
    for signals in [&["INT"][..], &["TERM", "TERM"]] {
        let place = Place::slow();
        let child = start(&place, &["--samples", "256"]);
        let begin = Instant::now();
        while !place.work().join("lock").exists() && begin.elapsed() < PATIENCE {}
        signals.iter().for_each(|signal| send(signal, &child));
        let output = child.wait_with_output().unwrap();
        assert!([Some(130), Some(143)].contains(&output.status.code()), "{}", stderr(&output));
        if signals.len() == 1 {
            assert_eq!(place.left(), [""; 0], "{}", stderr(&output));
        }
    }
}

#[test]
fn signals_end_an_evaluation_at_once() {
    let model = text(data("tiny-qwen2-vl-narrow"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_vlmq-run"))
        .args(["eval", &model, &text(data("vqa/eval.jsonl"))])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Its first word.
    let mut errors = child.stderr.take().unwrap();
    errors.read_exact(&mut [0; 5]).unwrap();
    send("TERM", &child);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let mut rest = String::new();
    errors.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("interrupted\n"), "{rest}");
}

#[test]
fn two_runs_of_one_output_are_refused() {
    let place = Place::slow();
    let first = start(&place, SLOW);
    wait_for_state(&place, 0);
    for extra in [&[][..], &["--restart"], &["--bits", "4"]] {
        let output = place.run(&[SLOW, extra].concat());
        let errors = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        let says = format!("is being written by another run (process {})", first.id());
        assert!(errors.contains(&says), "{errors}");
    }
    let output = first.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    place.finished();
}

/// Runs the program under a limit on the size of files, which stands in for a full disk.
fn limited(place: &Place, blocks: usize) -> Output {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
    let program = env!("CARGO_BIN_EXE_vlmq-run");
    Command::new("sh").args(["-c", &script, "sh", program]).args(place.arguments(&[])).output().unwrap()
}

#[test]
fn a_full_disk_loses_nothing() {
    let whole = Place::new(PLAIN);
    assert_eq!(whole.run(&[]).status.code(), Some(0));
    let expected = whole.finished();
    // Too small from the start: refused before any work, and nothing stays.
    let place = Place::new(PLAIN);
    let output = limited(&place, 100);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot write") && stderr(&output).contains("too large"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("encoding images"), "{}", stderr(&output));
    assert_eq!(place.left(), [""; 0]);
    // Full behind the first block: what is done is kept, and the same command goes on once there is room.
    place.run_until(&Cpu, Moment::Block(1)).unwrap_err();
    for _ in 0..2 {
        let output = limited(&place, 100);
        let errors = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains("1 of 3 blocks are done and kept in"), "{errors}");
        assert!(errors.contains("once the cause is removed: ") && errors.contains("too large"), "{errors}");
        assert_eq!(place.left(), [".out.vlmq"]);
    }
    assert_eq!(place.run(&[]).status.code(), Some(0));
    assert_eq!(differing(&place.finished(), &expected), [""; 0]);
}

/// A real disk of its own, full and then read-only, where this process may mount one: it does in a name space of its own.
#[test]
fn a_disk_that_fills_up_or_turns_read_only_loses_nothing() {
    const FOLDER: &str = "VLMQ_TEST_DISK";
    if let Ok(folder) = std::env::var(FOLDER) {
        return on_a_small_disk(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let name = full_name(module_path!(), "a_disk_that_fills_up_or_turns_read_only_loses_nothing");
    let script = format!("mount -t tmpfs -o size=4m tmpfs \"${FOLDER}\" || exit 77; exec \"$0\" \"$@\"");
    let run = Command::new("unshare")
        .args(["-rm", "sh", "-c", &script])
        .arg(std::env::current_exe().unwrap())
        .args(arguments(&name))
        .env(FOLDER, folder.path())
        .output();
    match run {
        Ok(run) if run.status.success() => assert!(String::from_utf8_lossy(&run.stdout).contains("1 passed")),
        Ok(run) if String::from_utf8_lossy(&run.stdout).contains("test ") => {
            panic!("{}{}", String::from_utf8_lossy(&run.stdout), stderr(&run))
        }
        _ => println!("left out: this process may not mount a disk"),
    }
}

fn on_a_small_disk(disk: &Path) {
    let whole = Place::new(PLAIN);
    assert_eq!(whole.run(&[]).status.code(), Some(0));
    let expected = whole.finished();
    let place = || whole.beside(tempfile::tempdir_in(disk).unwrap());
    let junk = disk.join("junk");
    let fill = |leave: u64| {
        let _ = fs::remove_file(&junk);
        let free = free_bytes(disk);
        fs::write(&junk, vec![1; (free - leave) as usize]).unwrap();
    };

    let finish = |place: &Place| {
        let output = place.run(&[]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(differing(&place.finished(), &expected), [""; 0]);
        fs::remove_dir_all(place.out()).unwrap();
    };

    // No room for output and states together.
    let first = place();
    fill(700_000);
    let output = first.run(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("on disk while the run lasts"), "{}", stderr(&output));
    assert_eq!(first.left(), [""; 0]);
    fs::remove_file(&junk).unwrap();

    // Full to the last byte behind a block: the space of blocks and states was taken before, that of the reports was not.
    first.run_until(&Cpu, Moment::Block(1)).unwrap_err();
    fill(0);
    let output = first.run(&[]);
    let errors = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("blocks are done and kept in") && errors.contains("No space left on device"), "{errors}");
    assert_eq!(first.left(), [".out.vlmq"]);
    fs::remove_file(&junk).unwrap();
    finish(&first);

    // Read-only, before a run and behind a block of it.
    let remount = |how: &str| {
        let done = Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(disk).status().unwrap();
        assert!(done.success());
    };
    let second = place();
    first.run_until(&Cpu, Moment::Block(1)).unwrap_err();
    remount("ro");
    for place in [&first, &second] {
        let output = place.run(&[]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("cannot create a folder in"), "{}", stderr(&output));
        assert!(stderr(&output).contains("Read-only file system"), "{}", stderr(&output));
    }
    remount("rw");
    assert_eq!(second.left(), [""; 0]);
    finish(&first);
    finish(&second);
}

fn free_bytes(disk: &Path) -> u64 {
    let output = Command::new("df").args(["--output=avail", "-B1"]).arg(disk).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().last().unwrap().trim().parse().unwrap()
}

/// Where nobody may write, as far as this user is bound by it.
#[test]
fn a_folder_without_permission_is_refused_at_once() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new(PLAIN);
    let set = |mode| fs::set_permissions(place.folder(), fs::Permissions::from_mode(mode)).unwrap();
    set(0o555);
    let bound = fs::write(place.folder().join("probe"), "").is_err();
    let output = place.run(&[]);
    set(0o755);
    if bound {
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("cannot create a folder in"), "{}", stderr(&output));
        assert!(!stderr(&output).contains("reading data"), "{}", stderr(&output));
        assert_eq!(place.left(), [""; 0]);
    } else {
        assert_eq!(output.status.code(), Some(0), "the superuser writes anywhere: {}", stderr(&output));
    }
}
