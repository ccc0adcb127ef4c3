//! The C API as C sees it: a program in plain C99 that quantizes one layer, against the library on the same numbers.

use crate::support::kernels::{Variant, build, text};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use vlmq::codes::QuantizedLinear;
use vlmq::codes::pack::{PackedRun, pack, packed_words};
use vlmq::device::ModelOps;
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::Cuda;
use vlmq::quantize::settings::{Order, Solver, SolverSettings};
use vlmq::quantize::solve::{prepare, solve_layer};
use vlmq::quantize::statistics::Statistics;
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

// As tests/kernels/quantize_layer.c has them.
/// Where build.rs found nvcc and the libraries, where it compiles kernels.
const CUDA_BIN: Option<&str> = option_env!("VLMQ_CUDA_BIN");
const CUDA_LIBRARIES: Option<&str> = option_env!("VLMQ_CUDA_LIBRARIES");

const ROWS: usize = 48;
const FEATURES: usize = 320;
const TOKENS: usize = 700;
const GROUP: usize = 64;
const BITS: u32 = 3;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The C compiler with all its objections.
fn c_compiler() -> Command {
    let mut command = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".to_owned()));
    command.current_dir(root()).args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1"]);
    command.arg("tests/kernels/quantize_layer.c").arg("-Ikernels/include");
    command
}

/// The C program's numbers: activations, importance, weight.
fn inputs() -> (Matrix, Vec<f32>, Matrix) {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as i32 - 128
    };
    let mut u = Vec::with_capacity(TOKENS * FEATURES);
    for i in 0..TOKENS * FEATURES {
        let before = if i % FEATURES == 0 { 0 } else { next() / 4 };
        u.push((before + next() / 2) as f32 / if (i % FEATURES).is_multiple_of(7) { 16.0 } else { 64.0 });
    }
    let g = (0..TOKENS).map(|_| (next() + 160) as f32 / 128.0).collect();
    let mut weight = Vec::with_capacity(ROWS * FEATURES);
    for _ in 0..ROWS * FEATURES {
        let high = 256 * next();
        weight.push((high + next()) as f32 / 65536.0);
    }
    (Matrix::new(TOKENS, FEATURES, u).unwrap(), g, Matrix::new(ROWS, FEATURES, weight).unwrap())
}

fn by_the_library<D: ModelOps + vlmq::device::SolveOps>(device: &D) -> QuantizedLinear {
    let settings = SolverSettings {
        solver: Solver::Gptq,
        bits: BITS,
        group_size: Some(GROUP),
        order: Order::None,
        damp: 0.01,
        scale_type: Float::Bf16,
        smallest_zero: 0,
        ..SolverSettings::default()
    };
    let (u, g, weight) = inputs();
    let mut statistics = Statistics::new(device, FEATURES, false).unwrap();
    statistics.accumulate(device, &device.upload_model(u).unwrap(), None, Some(&g)).unwrap();
    let prepared = prepare(device, &statistics, &settings).unwrap();
    solve_layer(device, &prepared, &statistics.hessian, &device.upload(weight).unwrap(), &settings).unwrap().0
}

#[test]
fn a_c_program_quantizes_a_layer_as_the_library_does() {
    let library = build("vlmq_kernels", "kernels", Variant::Plain);
    let work = tempfile::tempdir().unwrap();
    let (program, out) = (work.path().join("quantize_layer"), work.path().join("layer"));
    let mut compile = c_compiler();
    compile.arg("-DEMULATED").arg(&library).arg("-o").arg(&program);
    compile.arg(format!("-Wl,-rpath,{}", library.parent().unwrap().display()));
    let output = compile.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let output = Command::new(&program).arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));

    // What a call refuses is printed.
    let fault = "vlmq_permute:cudaErrorInvalidValue";
    let refused = Command::new(&program).arg(&out).env("VLMQ_EMULATOR_FAIL", fault).output().unwrap();
    let said = text(&refused);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.starts_with("vlmq_permute: cudaLaunchKernel of "), "{said}");
    assert!(said.ends_with(": cudaErrorInvalidValue: invalid argument\n"), "{said}");

    let bytes = fs::read(out).unwrap();
    let (groups, words) = (ROWS * FEATURES / GROUP, ROWS * packed_words(FEATURES, BITS));
    let (codes, rest) = bytes.split_at(ROWS * FEATURES);
    let (scales, rest) = rest.split_at(4 * groups);
    let (zeros, rest) = rest.split_at(groups);
    let scales: Vec<f32> = bytemuck::pod_collect_to_vec(scales);
    let found_words: Vec<u32> = bytemuck::pod_collect_to_vec(rest);
    assert_eq!(found_words.len(), words);
    // Not all one code.
    assert!((0..8).all(|code| codes.iter().filter(|&&c| c == code).count() > ROWS));

    // The same calls, through the library: the same bits.
    let linear = by_the_library(&Cuda::emulated(&library, Float::Bf16).unwrap());
    assert_eq!(codes, linear.codes);
    assert_eq!(scales, linear.scales);
    assert_eq!(zeros, linear.zeros);

    // Another implementation: the same but for ties in the order of float32 sums.
    let linear = by_the_library(&Cpu);
    let different = codes.iter().zip(&linear.codes).filter(|(a, b)| a != b).count();
    assert!(1000 * different <= codes.len(), "{different} of {} codes are not the CPU's", codes.len());

    let mut expected = vec![0; words];
    for (row, words) in expected.chunks_mut(packed_words(FEATURES, BITS)).enumerate() {
        pack(&codes[row * FEATURES..], words, PackedRun::dense(BITS, FEATURES));
    }
    assert_eq!(found_words, expected);
}

/// What C users link, and that the program in its form for GPUs links with it.
#[test]
#[cfg_attr(not(vlmq_kernels), ignore = "built without CUDA kernels")]
fn the_libraries_for_c_users_hold_the_api() {
    // The test lies in target/<profile>/deps.
    let program = std::env::current_exe().unwrap();
    let folder = program.ancestors().nth(2).unwrap().join("vlmq");
    let header = fs::read_to_string(folder.join("vlmq.h")).unwrap();
    assert_eq!(header, fs::read_to_string(root().join("kernels/include/vlmq.h")).unwrap());
    let mut declared: Vec<&str> = header
        .lines()
        .filter(|line| ["vlmq_status vlmq_", "size_t vlmq_", "const char* vlmq_"].iter().any(|of| line.starts_with(of)))
        .map(|line| line.split('(').next().unwrap().rsplit(' ').next().unwrap())
        .collect();
    declared.sort_unstable();
    assert!(declared.len() > 25, "{declared:?}");
    let output =
        Command::new("nm").args(["-D", "--defined-only"]).arg(folder.join("libvlmq_kernels.so")).output().unwrap();
    let listed = text(&output);
    let mut exported: Vec<&str> = listed.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    exported.sort_unstable();
    assert_eq!(exported, declared);

    let toolkit = PathBuf::from(CUDA_BIN.expect("build.rs names it")).join("..");
    let library = CUDA_LIBRARIES.map(Path::new).expect("build.rs names it");
    let work = tempfile::tempdir().unwrap();
    let mut compile = c_compiler();
    compile.arg("-isystem").arg(toolkit.join("include")).arg(folder.join("libvlmq_kernels.a"));
    compile
        .arg(library.join("libcudart_static.a"))
        .args(["-lpthread", "-ldl", "-lrt", "-o"])
        .arg(work.path().join("p"));
    let output = compile.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}
