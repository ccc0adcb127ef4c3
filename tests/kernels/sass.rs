//! The machine code of the kernels, where a toolkit compiled them: tensor cores in the hot ones, and nothing that should be in
//! registers in local memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// Parts of the names of kernels that live off tensor cores.
const HOT: &[&str] = &["weighted_hessian", "product", "attention"];

/// Parts of the names of kernels that are written for Hopper's `wgmma`: their code for sm_90a must have it. None so far; a
/// kernel of that kind is named here when it comes, so that none falls back to `mma` unseen.
const WGMMA: &[&str] = &[];

/// The compiled kernels, and the folder of nvcc.
const ARCHIVE: Option<&str> = option_env!("VLMQ_KERNELS_ARCHIVE");
const CUDA_BIN: Option<&str> = option_env!("VLMQ_CUDA_BIN");

/// What cuobjdump says of all objects.
fn cuobjdump(arguments: &[&str]) -> String {
    let (archive, folder) = ARCHIVE.zip(CUDA_BIN).expect("build.rs names both where it compiles kernels");
    let beside = Path::new(folder).join("cuobjdump");
    let program = if beside.is_file() { beside } else { "cuobjdump".into() };
    let output = Command::new(&program).args(arguments).arg(archive).output().unwrap_or_else(|error| {
        panic!("{}: {error}; .cuda/bin/pip install 'nvidia-cuda-cuobjdump==13.2.*'", program.display())
    });
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// `(architecture, kernel, lines about it)`, from a listing whose kernels start at lines that `name` finds them in.
fn kernels<'a>(
    listing: &'a str,
    name: impl Fn(&'a str) -> Option<&'a str>,
) -> BTreeMap<(&'a str, &'a str), Vec<&'a str>> {
    let mut found: BTreeMap<_, Vec<&str>> = BTreeMap::new();
    let (mut arch, mut kernel) = ("", "");
    for line in listing.lines().map(str::trim) {
        if let Some(value) = line.strip_prefix("arch = ") {
            (arch, kernel) = (value, "");
        } else if let Some(value) = name(line) {
            kernel = value;
        }
        if !kernel.is_empty() {
            found.entry((arch, kernel)).or_default().push(line);
        }
    }
    found
}

fn number(line: &str, name: &str) -> u32 {
    let rest = line.split(name).nth(1).unwrap_or_else(|| panic!("no {name} in {line}"));
    rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

#[test]
#[cfg_attr(not(vlmq_kernels), ignore = "built without CUDA kernels")]
fn no_kernel_spills() {
    let listing = cuobjdump(&["-res-usage"]);
    let kernels = kernels(&listing, |line| line.strip_prefix("Function ")?.strip_suffix(':'));
    assert!(kernels.len() > 20, "only {} kernels were found:\n{listing}", kernels.len());
    let mut wrong = Vec::new();
    for ((arch, kernel), lines) in kernels {
        let usage = lines.iter().find(|line| line.contains("REG:")).unwrap();
        if number(usage, "STACK:") != 0 || number(usage, "LOCAL:") != 0 {
            wrong.push(format!("{arch} {kernel}: {usage}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
#[cfg_attr(not(vlmq_kernels), ignore = "built without CUDA kernels")]
fn hot_kernels_use_tensor_cores() {
    let listing = cuobjdump(&["-sass"]);
    let kernels = kernels(&listing, |line| line.strip_prefix("Function : "));
    let mut archs: Vec<&str> = kernels.keys().map(|(arch, _)| *arch).collect();
    archs.dedup();
    assert!(!archs.is_empty(), "no machine code was found");
    for arch in archs {
        for hot in HOT {
            // `mma` and `wgmma`.
            let (with, all) = count(&kernels, arch, hot, &["HMMA", "HGMMA"]);
            assert!(with > 0, "no kernel of {hot} for {arch} has tensor-core instructions, of {all}");
        }
        for hopper in WGMMA.iter().filter(|_| arch == "sm_90a") {
            let (with, all) = count(&kernels, arch, hopper, &["HGMMA"]);
            assert!(with > 0, "no kernel of {hopper} for {arch} has wgmma instructions, of {all}");
        }
    }
}

/// How many kernels of an architecture and a part of a name have one of these instructions, and how many there are. Helpers
/// of the same name (a sum of parts, say) need none.
fn count(kernels: &BTreeMap<(&str, &str), Vec<&str>>, arch: &str, name: &str, instructions: &[&str]) -> (usize, usize) {
    let of = kernels.iter().filter(|((a, kernel), _)| *a == arch && kernel.contains(name));
    let has = |line: &&str| instructions.iter().any(|instruction| line.contains(instruction));
    let with = of.clone().filter(|(_, lines)| lines.iter().any(has)).count();
    (with, of.count())
}
