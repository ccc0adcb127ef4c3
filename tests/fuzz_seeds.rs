//! Every input that a fuzzer starts from, and every one that ever broke something (fuzz/), through the code of its target:
//! no panic, and within bounds of time and memory.

#![cfg(all(feature = "run", target_os = "linux"))]

// It is a crate of its own under cargo-fuzz, where all of it is used.
#[allow(dead_code, unreachable_pub)]
#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::fs;
use std::path::Path;
use targets::TARGETS;

/// Most processor time for one input, in seconds: 5 times what the slowest took.
const MAX_TIME: f64 = 10.0;

/// Most memory beyond what the test holds by itself: a template's fuel buys 64 MB, the rest is the largest image of the
/// seeds and its patches.
const MAX_MEMORY_KB: u64 = 512 << 10;

/// Peak of resident memory in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Processor time of this process so far, in seconds (proc_pid_stat(5): fields 14 and 15, in hundredths of a second on every Linux).
fn processor_time() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    [11, 12].map(|field: usize| fields[field].parse::<f64>().unwrap() / 100.0).iter().sum()
}

#[test]
fn seeds_and_crashes() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let started = peak();
    let mut slowest = (0.0, String::new());
    for (name, run) in TARGETS {
        let mut inputs = 0;
        for kind in ["seeds", "crashes"] {
            // Nothing was found in some.
            let Ok(folder) = fs::read_dir(fuzz.join(kind).join(name)) else { continue };
            let mut paths: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
            paths.sort();
            for path in paths {
                inputs += 1;
                let bytes = fs::read(&path).unwrap();
                let start = processor_time();
                // What panics says where; which input it was stands above.
                println!("{}", path.display());
                run(&bytes);
                let taken = processor_time() - start;
                assert!(taken < MAX_TIME, "{} took {taken} s", path.display());
                assert!(peak() < started + MAX_MEMORY_KB, "{} took the test to {} KiB", path.display(), peak());
                if taken > slowest.0 {
                    slowest = (taken, path.display().to_string());
                }
            }
        }
        assert!(inputs >= 5, "{name} has only {inputs} inputs");
    }
    println!("slowest: {slowest:?}; memory {} KiB beyond {started}", peak() - started);
}

/// No folder of `fuzz` is left out, and none is without a target.
#[test]
fn every_target_is_replayed() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let names = |folder: &str, suffix: &str| {
        let mut names: Vec<String> = fs::read_dir(fuzz.join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap().replace(suffix, ""))
            .collect();
        names.sort();
        names
    };
    let targets = TARGETS.map(|(name, _)| name);
    assert_eq!(names("seeds", ""), targets);
    assert_eq!(names("fuzz_targets", ".rs"), targets);
    assert!(names("crashes", "").iter().all(|name| targets.contains(&name.as_str())));
}
