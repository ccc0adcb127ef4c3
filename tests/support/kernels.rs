//! The kernels on the host: built with the C++ compiler of this machine (`CXX`, else g++, else c++) and the flags of `CXXFLAGS`, run by the
//! emulator.
//!
//! A library comes in three variants: plain, with the address and undefined-behaviour sanitizers, and with ThreadSanitizer.
//! A sanitizer must be in the process from its start, so a test program runs tests of its own once more as a child, with the
//! sanitizer preloaded: [`pass_under_sanitizers`]. In the child, [`Variant::current`] says so and [`kernels`] opens that variant.

#![allow(unsafe_code)]

use super::alone::full_name;
use libloading::Library;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::SystemTime;
use vlmq::device::cuda::bindings::{vlmq_status, vlmq_stream};

/// How a library is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Optimized, nothing added: results, poison, and the emulator's own checks.
    Plain,
    /// AddressSanitizer and UndefinedBehaviorSanitizer.
    Address,
    /// ThreadSanitizer.
    Thread,
}

/// Names the variant to a child.
const VARIANT: &str = "VLMQ_TEST_VARIANT";

impl Variant {
    /// All of them.
    pub const ALL: [Variant; 3] = [Variant::Plain, Variant::Address, Variant::Thread];

    /// What this process runs.
    pub fn current() -> Variant {
        match std::env::var(VARIANT).as_deref() {
            Ok("address") => Variant::Address,
            Ok("thread") => Variant::Thread,
            _ => Variant::Plain,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Variant::Plain => "plain",
            Variant::Address => "address",
            Variant::Thread => "thread",
        }
    }

    /// For the kernels, and for linking. Lines are all that a report needs; variables, which take a debugger, would be a third of the time.
    fn flags(self) -> &'static [&'static str] {
        match self {
            Variant::Plain => &["-O2", "-g1"],
            Variant::Address => {
                &["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
            }
            Variant::Thread => &["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
        }
    }

    /// For the emulator's runtime, which is never instrumented: its accesses would count as the kernel's.
    fn runtime_flags(self) -> &'static [&'static str] {
        match self {
            Variant::Plain => &["-O3", "-g1"],
            Variant::Address => &["-O3", "-g1", "-DVLMQ_SANITIZE_ADDRESS"],
            Variant::Thread => &["-O3", "-g1", "-DVLMQ_SANITIZE_THREAD"],
        }
    }
}

/// The library of all kernels, in the variant of this process.
pub fn kernels() -> &'static Library {
    static OPEN: OnceLock<Library> = OnceLock::new();
    OPEN.get_or_init(|| open("vlmq_kernels", "kernels", Variant::current()))
}

/// Builds and opens the library `name` of all `.cu` files below `folder`, a folder of the crate.
pub fn open(name: &str, folder: &str, variant: Variant) -> Library {
    let path = build(name, folder, variant);
    // SAFETY: the library is made of this crate's own sources; its initializers only set up the emulator's variables.
    unsafe { Library::new(&path) }.unwrap_or_else(|error| panic!("{}: {error:?}", path.display()))
}

/// Calls a function of the C API on host memory, which is the emulator's device memory: `name` as in vlmq.h, `A` its
/// argument struct. The caller answers for the pointers.
pub fn call<A>(name: &str, args: &A) -> vlmq_status {
    // SAFETY: every call of the C API has this signature.
    let found = unsafe { kernels().get::<unsafe extern "C" fn(*const A, vlmq_stream) -> vlmq_status>(name.as_bytes()) };
    // SAFETY: the struct outlives the call, which returns when the kernels have run.
    unsafe { found.unwrap_or_else(|error| panic!("{error}"))(args, std::ptr::null_mut()) }
}

/// Bytes of work space that a call asks for; `name` without `_workspace_bytes`.
pub fn workspace_bytes<A>(name: &str, args: &A) -> usize {
    let name = format!("{name}_workspace_bytes");
    // SAFETY: every such function of the C API has this signature.
    let found = unsafe { kernels().get::<unsafe extern "C" fn(*const A) -> usize>(name.as_bytes()) };
    // SAFETY: the struct outlives the call.
    unsafe { found.unwrap_or_else(|error| panic!("{error}"))(args) }
}

/// Sets the schedule of the launches that follow on this OS thread.
pub fn set_seed(library: &Library, seed: u64) {
    // SAFETY: kernels/emulator/runtime.cpp defines it with this signature.
    let set = unsafe { library.get::<unsafe extern "C" fn(u64)>(b"vlmq_emulator_set_seed\0") }.unwrap();
    // SAFETY: it stores the number in a variable of the calling thread.
    unsafe { set(seed) };
}

/// KiB of shared memory that GPUs give a block, the emulated one's own first: kernels with variants choose by it.
pub const SHARED_KIB: [u64; 3] = [163, 99, 227];

/// Sets what the GPU of the launches that follow on this OS thread gives a block.
pub fn set_shared_kib(library: &Library, kib: u64) {
    // SAFETY: kernels/emulator/runtime.cpp defines it with this signature.
    let set = unsafe { library.get::<unsafe extern "C" fn(u64)>(b"vlmq_emulator_set_shared_kib\0") }.unwrap();
    // SAFETY: it stores the number in a variable of the calling thread.
    unsafe { set(kib) };
}

/// Runs tests of this program, by their [`full_name`]s, in a child process under a variant; what it prints comes back.
pub fn run_under(variant: Variant, tests: &[String], environment: &[(&str, &str)]) -> Output {
    let program = std::env::current_exe().unwrap();
    let runtime = match variant {
        Variant::Plain => None,
        Variant::Address => Some("libasan.so"),
        Variant::Thread => Some("libtsan.so"),
    };
    // Without randomized addresses: gcc 12's ThreadSanitizer may find its own regions taken ("unexpected memory mapping").
    // The sanitizer is preloaded into the test program alone, not into the two programs that lead to it.
    let mut child = Command::new("setarch");
    child.args([std::env::consts::ARCH, "-R", "env"]);
    if let Some(runtime) = runtime {
        let found = tool(compiler()).arg(format!("-print-file-name={runtime}")).output().unwrap();
        let found = String::from_utf8(found.stdout).unwrap();
        assert!(Path::new(found.trim()).is_absolute(), "{} has no {runtime}: install gcc's", compiler());
        child.arg(format!("LD_PRELOAD={}", found.trim()));
    }
    // The library is built here, once: not by a compiler under a sanitizer.
    let options = "verify_asan_link_order=0:detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=1";
    child.env("ASAN_OPTIONS", options);
    child.env("UBSAN_OPTIONS", "print_stacktrace=1:halt_on_error=1");
    // Only the kernels are instrumented: allocations handed between the test program's threads would look like races.
    child.env("TSAN_OPTIONS", "halt_on_error=1:ignore_interceptors_accesses=1:history_size=4");
    child.env(VARIANT, variant.name()).env_remove("RUST_BACKTRACE").envs(environment.iter().copied());
    child.arg(program).args(["--exact", "--include-ignored", "--test-threads=1", "--nocapture"]).args(tests);
    child.output().unwrap_or_else(|error| panic!("setarch (of util-linux) runs the sanitized tests: {error}"))
}

/// Runs tests of a module (`module_path!()`) once more under both sanitizers. A child that fails, or runs none, fails the calling test.
///
/// `libraries` are those that the tests open, by name and folder, built here so that no child runs a compiler.
pub fn pass_under_sanitizers(module: &str, tests: &[&str], libraries: &[(&str, &str)]) {
    let tests: Vec<String> = tests.iter().map(|test| full_name(module, test)).collect();
    assert_eq!(Variant::current(), Variant::Plain, "a sanitized test must not start another");
    for variant in [Variant::Address, Variant::Thread] {
        for (name, folder) in libraries {
            build(name, folder, variant);
        }
        let output = run_under(variant, &tests, &[]);
        let printed = text(&output);
        let all = printed.contains(&format!("test result: ok. {} passed", tests.len()));
        assert!(output.status.success() && all, "{tests:?} under {variant:?}:\n{printed}");
    }
}

/// What a child printed.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Makes the library, where a source is newer than it, and says where it lies. Several programs may call at once.
pub fn build(name: &str, folder: &str, variant: Variant) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator").join(variant.name());
    fs::create_dir_all(&target).unwrap();
    let lock = File::create(target.join("lock")).unwrap();
    lock.lock().unwrap();

    let common = common_flags();
    // Other flags (another compiler, another processor): nothing of before can be kept.
    let flags =
        format!("{} {common:?} {:?} {:?} {:?}", compiler(), variant.flags(), variant.runtime_flags(), users_flags());
    let flags_file = target.join("flags");
    if fs::read_to_string(&flags_file).is_ok_and(|before| before != flags) {
        for old in fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().path()) {
            if old.extension().is_some_and(|e| e == "o") {
                fs::remove_file(old).unwrap();
            }
        }
    }
    fs::write(&flags_file, &flags).unwrap();

    let mut sources = find(&root.join(folder), "cu");
    sources.extend(find(&root.join("kernels/emulator"), "cpp"));
    let jobs: Vec<(PathBuf, PathBuf)> = sources
        .iter()
        .map(|source| {
            let relative = source.strip_prefix(root).unwrap();
            (relative.to_owned(), target.join(relative.to_str().unwrap().replace(['/', '\\'], "_") + ".o"))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((source, object)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if !is_fresh(root, object)
                        && let Err(message) = compile(root, source, object, &common, variant)
                    {
                        failures.lock().unwrap().push(message);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));

    let library = target.join(format!("lib{name}.so"));
    let list = target.join(format!("{name}.objects"));
    let objects = jobs.iter().map(|(_, object)| object.to_str().unwrap()).collect::<Vec<_>>().join("\n");
    let made = modified(&library);
    let same_objects = fs::read_to_string(&list).is_ok_and(|before| before == objects);
    if !same_objects || jobs.iter().any(|(_, object)| modified(object) > made) {
        let unfinished = target.join(format!("lib{name}.so.new"));
        let mut linker = tool(compiler());
        linker.args(["-shared", "-pthread", "-Wl,-Bsymbolic", "-o"]).arg(&unfinished).args(variant.flags());
        let output = linker.args(jobs.iter().map(|(_, object)| object)).output().unwrap();
        assert!(output.status.success(), "{name}: {}", text(&output));
        // A library that a process has open must not change: another file takes its name.
        fs::rename(&unfinished, &library).unwrap();
        fs::write(&list, objects).unwrap();
    }
    library
}

/// A program that runs without the sanitizer that may be preloaded into this one.
fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env_remove("LD_PRELOAD");
    command
}

/// The C++ compiler.
fn compiler() -> &'static str {
    static FOUND: OnceLock<String> = OnceLock::new();
    FOUND.get_or_init(|| {
        if let Ok(named) = std::env::var("CXX") {
            return named;
        }
        let runs = |name: &&str| tool(name).arg("--version").output().is_ok_and(|o| o.status.success());
        let found = ["g++", "c++"].into_iter().find(runs);
        found.expect("the emulator's tests need a C++17 compiler: install g++, or name one in CXX").to_owned()
    })
}

/// What the environment adds to the flags of every file, as `-g` for a debugger.
fn users_flags() -> Vec<String> {
    std::env::var("CXXFLAGS").unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

/// What every file is compiled with.
fn common_flags() -> Vec<&'static str> {
    // No contraction: a product and a sum round as __fmul_rn and __fadd_rn say. No strict aliasing: kernels, as CUDA code
    // does, read numbers through vector types.
    let mut flags = vec!["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-ffp-contract=off"];
    flags.extend(["-fno-strict-aliasing", "-Ikernels", "-Ikernels/include"]);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        // fmaf is one instruction instead of a call, a row of a tile one register.
        flags.extend(["-mavx2", "-mfma", "-mf16c"]);
    }
    flags
}

fn compile(root: &Path, source: &Path, object: &Path, common: &[&str], variant: Variant) -> Result<(), String> {
    let mut command = tool(compiler());
    command.current_dir(root).args(common);
    if source.extension().is_some_and(|e| e == "cu") {
        // nvcc's pragmas are the host compiler's unknown ones.
        command.args(["-x", "c++", "-DVLMQ_EMULATED", "-include", "emulator/emulator.h", "-Wno-unknown-pragmas"]);
        command.args(variant.flags());
    } else {
        command.args(variant.runtime_flags());
    }
    command.args(users_flags());
    let unfinished = object.with_extension("new");
    command.arg("-MMD").arg("-MF").arg(object.with_extension("d")).arg("-MT").arg("object");
    let output = command.arg("-c").arg(source).arg("-o").arg(&unfinished).output().map_err(|e| e.to_string())?;
    if !output.status.success() {
        return Err(format!("{command:?}\n{}", text(&output)));
    }
    fs::rename(unfinished, object).map_err(|e| e.to_string())
}

/// Whether no file that went into an object is newer than it.
fn is_fresh(root: &Path, object: &Path) -> bool {
    let (Some(made), Ok(rule)) = (modified(object), fs::read_to_string(object.with_extension("d"))) else {
        return false;
    };
    let files = rule.trim_start_matches("object:").replace("\\\n", " ");
    files.split_whitespace().all(|file| modified(&root.join(file)).is_some_and(|at| at < made))
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|data| data.modified()).ok()
}

/// Files below a folder with an extension, in order of their names.
fn find(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            found.extend(find(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}
