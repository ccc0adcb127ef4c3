//! Every input that a fuzzer starts from, and every one that ever broke something (fuzz/), through the code of its target:
//! no panic, and within bounds of time and memory.

// It is a crate of its own under cargo-fuzz, where all of it is used.
#[allow(dead_code, unreachable_pub)]
#[path = "../../fuzz/src/lib.rs"]
mod targets;

use crate::support::alone::passed_alone;
use crate::support::process::{peak_kib, processor_time};
use std::fs;
use std::path::Path;
use std::time::Duration;
use targets::TARGETS;

/// Most processor time for one input: 5 times what the slowest took.
const MAX_TIME: Duration = Duration::from_secs(10);

/// Most memory beyond what the test holds by itself: a template's fuel buys 64 MB, the rest is the largest image of the
/// seeds and its patches.
const MAX_MEMORY_KB: u64 = 512 << 10;

#[test]
fn seeds_and_crashes() {
    if passed_alone(module_path!(), "seeds_and_crashes", &[]) {
        return;
    }
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let started = peak_kib();
    let mut slowest = (Duration::ZERO, String::new());
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
                assert!(taken < MAX_TIME, "{} took {taken:?}", path.display());
                assert!(peak_kib() < started + MAX_MEMORY_KB, "{} took the test to {} KiB", path.display(), peak_kib());
                if taken > slowest.0 {
                    slowest = (taken, path.display().to_string());
                }
            }
        }
        assert!(inputs >= 5, "{name} has only {inputs} inputs");
    }
    println!("slowest: {slowest:?}; memory {} KiB beyond {started}", peak_kib() - started);
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
