//! The commit that a build is of, and the CUDA kernels.
//!
//! The commit goes into `VLMQ_COMMIT`, for outputs to name: `build/commit.rs` finds it.
//!
//! The kernels of `kernels/` are compiled where a CUDA toolkit is found, put into the library, and left beside the program
//! for C users: `target/<profile>/vlmq/{libvlmq_kernels.a, libvlmq_kernels.so, vlmq.h}`. Environment:
//!
//! - `VLMQ_COMMIT`: names the commit, and spares the rebuild after each new one (`VLMQ_COMMIT=mine cargo build`).
//! - `VLMQ_CUDA`: `require` fails where there is no toolkit, `off` builds for the CPU without a word.
//! - `VLMQ_ARCHS`: GPUs to compile for, in place of [`ARCHS`]: `90a` machine code of one architecture, `100-ptx` code that the
//!   driver translates for that one and all later ones. Separated by commas.
//! - `CUDA_HOME`, `CUDA_PATH`: where to look first.

#[path = "build/commit.rs"]
mod commit;

use anyhow::{Context, Result, bail, ensure};
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

/// Every GPU from 2020 on: 8.x (8.6 runs 8.0's code), 9.0, 12.x, and 10.x and all later ones through PTX.
const ARCHS: &str = "80,89,90a,120,100-ptx";

/// The oldest toolkit whose compiler the kernels are tested with.
const OLDEST: (u32, u32) = (13, 0);

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    println!("cargo:rustc-check-cfg=cfg(vlmq_kernels)");
    for variable in ["VLMQ_COMMIT", "VLMQ_CUDA", "VLMQ_ARCHS", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let commit = match env::var("VLMQ_COMMIT") {
        Ok(commit) if !commit.is_empty() => commit,
        _ => {
            let found = commit::find(&root, |question| commit::ask_git(&root, question));
            found.watch.iter().for_each(|path| println!("cargo:rerun-if-changed={}", path.display()));
            found.name
        }
    };
    println!("cargo:rustc-env=VLMQ_COMMIT={commit}");

    let wish = env::var("VLMQ_CUDA").unwrap_or_default();
    ensure!(["", "auto", "require", "off"].contains(&wish.as_str()), "VLMQ_CUDA={wish}: must be auto, require or off");
    if wish == "off" {
        return Ok(());
    }
    match Toolkit::find(&root) {
        Ok(toolkit) => build_kernels(&root, &toolkit),
        Err(missing) if wish == "require" => Err(missing),
        Err(missing) => {
            println!("cargo:warning=building for the CPU only, without CUDA kernels: {missing:#}");
            Ok(())
        }
    }
}

/// A CUDA toolkit that can compile and link.
struct Toolkit {
    nvcc: PathBuf,
    /// Holds libcudart_static.a.
    libraries: PathBuf,
    version: (u32, u32),
}

impl Toolkit {
    fn find(root: &Path) -> Result<Self> {
        ensure!(env::var("CARGO_CFG_TARGET_OS")? == "linux", "CUDA kernels are built for Linux only");
        let mut places: Vec<PathBuf> =
            ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
        // The layout of NVIDIA's Python packages.
        let venv = fs::read_dir(root.join(".cuda/lib")).into_iter().flatten().flatten();
        places.extend(venv.map(|python| python.path().join("site-packages/nvidia/cu13")).filter(|p| p.is_dir()));
        let path = env::var_os("PATH").unwrap_or_default();
        let on_path = env::split_paths(&path).filter_map(|bin| fs::canonicalize(bin.join("nvcc")).ok());
        places.extend(on_path.filter_map(|nvcc| Some(nvcc.parent()?.parent()?.to_owned())));
        places.push("/usr/local/cuda".into());

        let mut seen = Vec::new();
        for place in &places {
            match Self::at(place) {
                Ok(toolkit) => return Ok(toolkit),
                Err(why) => seen.push(format!("{} ({why:#})", place.display())),
            }
        }
        bail!(
            "no CUDA toolkit from {}.{} on in CUDA_HOME, CUDA_PATH, .cuda, PATH or /usr/local/cuda [{}]. Install one, or: \
             python3 -m venv .cuda && .cuda/bin/pip install 'cuda-toolkit[nvcc,cccl]==13.0.*' && VLMQ_CUDA=require cargo \
             build --release. VLMQ_CUDA=off silences this.",
            OLDEST.0,
            OLDEST.1,
            seen.join("; ")
        )
    }

    fn at(top: &Path) -> Result<Self> {
        let nvcc = top.join("bin/nvcc");
        ensure!(nvcc.is_file(), "no bin/nvcc");
        let output = Command::new(&nvcc).arg("--version").output().context("nvcc does not run")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split("release ").nth(1).and_then(|rest| {
            let (major, rest) = rest.split_once('.')?;
            let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
            Some((major.parse().ok()?, minor.parse().ok()?))
        });
        let version = version.context("nvcc --version names no release")?;
        ensure!(version >= OLDEST, "nvcc {}.{} is too old", version.0, version.1);
        let target = format!("targets/{}-linux/lib", env::var("CARGO_CFG_TARGET_ARCH")?.replace("aarch64", "sbsa"));
        let libraries = ["lib64", "lib", &target].map(|folder| top.join(folder));
        let libraries = libraries.into_iter().find(|folder| folder.join("libcudart_static.a").is_file());
        Ok(Self { nvcc, libraries: libraries.context("no libcudart_static.a")?, version })
    }
}

/// Compiles what is not fresh, archives it, tells cargo to link it, and leaves the libraries for C users.
fn build_kernels(root: &Path, toolkit: &Toolkit) -> Result<()> {
    let kernels = root.join("kernels");
    let (mut units, mut headers) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(&kernels)? {
        let folder = entry?.path();
        // The emulator is the tests' own.
        if folder.is_dir() && !folder.ends_with("emulator") {
            println!("cargo:rerun-if-changed={}", folder.display());
            collect(&folder, &mut units, &mut headers)?;
        }
    }
    ensure!(!units.is_empty(), "no .cu file below {}", kernels.display());
    units.sort();

    let out = PathBuf::from(env::var("OUT_DIR")?);
    let objects = out.join("kernels");
    fs::create_dir_all(&objects)?;
    let flags = flags(&kernels)?;
    // Objects of other flags or another compiler are of no use.
    let made_with = format!("{flags:?} {} {:?}", toolkit.nvcc.display(), toolkit.version);
    if fs::read_to_string(objects.join("flags")).ok().as_ref() != Some(&made_with) {
        fs::remove_dir_all(&objects)?;
        fs::create_dir_all(&objects)?;
        fs::write(objects.join("flags"), made_with)?;
    }
    let newest_header = headers.iter().filter_map(|header| modified(header)).max();
    let jobs: Vec<(PathBuf, PathBuf)> = units
        .into_iter()
        .map(|unit| {
            let name = unit.strip_prefix(&kernels).unwrap_or(&unit).display().to_string().replace('/', "_");
            (unit, objects.join(name + ".o"))
        })
        .collect();
    let stale: Vec<&(PathBuf, PathBuf)> =
        jobs.iter().filter(|(unit, object)| modified(object) <= modified(unit).max(newest_header)).collect();
    in_parallel(&stale, |(unit, object)| {
        let unfinished = object.with_extension("new");
        run(Command::new(&toolkit.nvcc).args(&flags).arg("-c").arg(unit).arg("-o").arg(&unfinished))?;
        Ok(fs::rename(unfinished, object)?)
    })?;

    // Prints the link lines, too.
    cc::Build::new().cpp(false).objects(jobs.iter().map(|(_, object)| object)).compile("vlmq_kernels");
    println!("cargo:rustc-link-search=native={}", toolkit.libraries.display());
    println!("cargo:rustc-link-lib=static=cudart_static");
    println!("cargo:rustc-cfg=vlmq_kernels");
    // For the tests that read the machine code.
    println!("cargo:rustc-env=VLMQ_KERNELS_ARCHIVE={}", out.join("libvlmq_kernels.a").display());
    println!("cargo:rustc-env=VLMQ_CUDA_BIN={}", toolkit.nvcc.with_file_name("").display());
    println!("cargo:rustc-env=VLMQ_CUDA_LIBRARIES={}", toolkit.libraries.display());
    install(root, toolkit, &out)
}

/// Folders are searched to any depth.
fn collect(folder: &Path, units: &mut Vec<PathBuf>, headers: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        match path.extension().and_then(OsStr::to_str) {
            _ if path.is_dir() => collect(&path, units, headers)?,
            Some("cu") => units.push(path),
            Some("cuh" | "h") => headers.push(path),
            _ => {}
        }
    }
    Ok(())
}

fn flags(kernels: &Path) -> Result<Vec<String>> {
    let compiler = cc::Build::new().cpp(true).get_compiler();
    let mut flags: Vec<String> = ["-std=c++17", "-O3", "-lineinfo", "--compress-mode=size"].map(String::from).into();
    flags.extend(["-Werror", "all-warnings", "-ccbin"].map(String::from));
    flags.push(compiler.path().display().to_string());
    // Without exceptions, type information and guarded statics the objects need no C++ library.
    flags.push("-Xcompiler=-fPIC,-Wall,-Wextra,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics".into());
    flags.push(format!("-I{}", kernels.display()));
    flags.push(format!("-I{}", kernels.join("include").display()));
    for arch in archs()? {
        flags.extend(["-gencode".to_owned(), arch]);
    }
    Ok(flags)
}

/// nvcc's names of what [`ARCHS`] or `VLMQ_ARCHS` ask for.
fn archs() -> Result<Vec<String>> {
    let asked = env::var("VLMQ_ARCHS").ok().filter(|archs| !archs.is_empty());
    let asked = asked.as_deref().unwrap_or(ARCHS);
    asked
        .split(',')
        .map(|name| {
            let arch = name.strip_suffix("-ptx").unwrap_or(name);
            let digits = arch.strip_suffix(['a', 'f']).unwrap_or(arch);
            let known = digits.bytes().all(|b| b.is_ascii_digit()) && digits.parse().is_ok_and(|n: u32| n >= 80);
            ensure!(
                known,
                "VLMQ_ARCHS={asked}: {name:?} is no architecture from 80 on, such as 80, 90a or 100-ptx, separated by commas"
            );
            let code = if arch == name { "sm" } else { "compute" };
            Ok(format!("arch=compute_{arch},code={code}_{arch}"))
        })
        .collect()
}

/// `target/<profile>/vlmq`: both libraries and the header.
fn install(root: &Path, toolkit: &Toolkit, out: &Path) -> Result<()> {
    // OUT_DIR is target/<profile>/build/vlmq-<hash>/out.
    let target = out.ancestors().nth(3).context("OUT_DIR lies nowhere")?.join("vlmq");
    fs::create_dir_all(&target)?;
    let archive = out.join("libvlmq_kernels.a");
    fs::copy(&archive, target.join("libvlmq_kernels.a"))?;
    fs::copy(root.join("kernels/include/vlmq.h"), target.join("vlmq.h"))?;
    // Nothing but the C API is to be seen from outside.
    let exports = out.join("exports");
    fs::write(&exports, "{ global: vlmq_*; local: *; };\n")?;
    let mut link = cc::Build::new().get_compiler().to_command();
    link.args(["-shared", "-o"]).arg(target.join("libvlmq_kernels.so"));
    link.args(["-Wl,--whole-archive"]).arg(&archive).arg("-Wl,--no-whole-archive");
    link.arg(format!("-Wl,--version-script={}", exports.display()));
    link.arg(toolkit.libraries.join("libcudart_static.a")).args(["-lpthread", "-ldl", "-lrt"]);
    run(&mut link)
}

/// Runs `work` on every job, as many at a time as cargo allows.
fn in_parallel<T: Sync>(jobs: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let threads = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize).min(jobs.len());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let worker = || -> Result<()> {
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                work(job)?;
            }
            Ok(())
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    ensure!(output.status.success(), "{command:?}\n{text}");
    Ok(())
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|data| data.modified()).ok()
}
