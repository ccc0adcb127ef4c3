//! Tests in a process of their own.
//!
//! The tests of a program are threads of one process. What belongs to a process as a whole (the most memory that it ever held, its
//! processor time, its environment) is every test's, so a test that measures or sets such a thing runs in a child: this very program,
//! told to run that one test and nothing else. What a child program holds or takes is its own anyway.

use std::ffi::OsStr;
use std::process::Command;

/// Names the one test to a child.
const MARK: &str = "VLMQ_TEST_ALONE";

/// The name of a test as `--exact` takes it, from the `module_path!()` in which it stands.
pub(crate) fn full_name(module: &str, test: &str) -> String {
    // Without the program's own name.
    let inner = module.split_once("::").map_or(String::new(), |(_, inner)| format!("{inner}::"));
    inner + test
}

/// What makes a test program run one test by itself, and print what that prints.
pub(crate) fn arguments(name: &str) -> [&str; 4] {
    ["--exact", name, "--nocapture", "--test-threads=1"]
}

/// Whether a test has been run by a child, with these variables in its environment: what the child printed is passed on, and where it failed
/// this fails. In the child nothing has, and the test goes on.
///
/// ```ignore
/// if passed_alone(module_path!(), "the_name_of_this_test", &[]) {
///     return;
/// }
/// ```
#[track_caller]
pub(crate) fn passed_alone(module: &str, test: &str, environment: &[(&str, &OsStr)]) -> bool {
    let name = full_name(module, test);
    if std::env::var(MARK).is_ok_and(|marked| marked == name) {
        return false;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(arguments(&name)).env(MARK, &name).envs(environment.iter().copied());
    let output = child.output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    print!("{printed}");
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}, alone: {}", output.status);
    // A name that is none runs nothing, successfully.
    assert!(printed.contains("test result: ok. 1 passed"), "{name} was not run");
    true
}
