//! The emulator itself: it computes what the device would, and it sees each kind of defect that it is there to see.

#![allow(unsafe_code)]

use crate::support::alone::{full_name, passed_alone};
use crate::support::kernels::{self, SHARED_KIB, Variant};
use half::{bf16, f16};
use libloading::{Library, Symbol};
use std::sync::OnceLock;

const NAME: &str = "planted";
const FOLDER: &str = "tests/kernels/planted";

fn library() -> &'static Library {
    static OPEN: OnceLock<Library> = OnceLock::new();
    OPEN.get_or_init(|| kernels::open(NAME, FOLDER, Variant::current()))
}

/// Whether a test of planted kernels has passed [alone](passed_alone). Both libraries, this one and that of all kernels, have their
/// thread-local variables in the block that a process lays out at its start, where there is room for one of them: the tests of this program
/// run in one process, so that whichever came second could not be opened. A child under a sanitizer runs nothing else.
#[track_caller]
fn passed_elsewhere(test: &str) -> bool {
    Variant::current() == Variant::Plain && passed_alone(module_path!(), test, &[])
}

fn function<T>(name: &str) -> Symbol<'static, T> {
    // SAFETY: each caller names the type that the .cu file of that name declares.
    unsafe { library().get(name.as_bytes()) }.unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// A planted kernel, and what tells of its defect in each variant.
struct Planted {
    name: &'static str,
    plain: Tells,
    address: Tells,
    thread: Tells,
}

#[derive(Clone, Copy)]
enum Tells {
    /// The output differs from the right one in every schedule.
    Output,
    /// The process ends with this message.
    Message(&'static str),
    /// This variant can not see it.
    Nothing,
}
use Tells::{Message, Nothing, Output};

const RACE: Tells = Message("ThreadSanitizer: data race");
const BEYOND: Tells = Message("AddressSanitizer: heap-buffer-overflow");

/// Found by the emulator's own checks, which every variant has.
const fn always(name: &'static str, message: &'static str) -> Planted {
    Planted { name, plain: Message(message), address: Message(message), thread: Message(message) }
}

const fn planted(name: &'static str, plain: Tells, address: Tells, thread: Tells) -> Planted {
    Planted { name, plain, address, thread }
}

const PLANTED: &[Planted] = &[
    planted("missing_barrier", Output, Output, RACE),
    planted("missing_trailing_barrier", Output, Output, RACE),
    always("divergent_barrier", "emulator: divergent barrier: others wait at tests/kernels/planted/barriers.cu"),
    always("exit_before_barrier", "emulator: barrier after exit"),
    always("named_barrier_count", "emulator: deadlock"),
    planted("global_read_beyond", Nothing, BEYOND, Nothing),
    planted("global_write_beyond", Nothing, BEYOND, RACE),
    planted("shared_beyond", Nothing, BEYOND, Nothing),
    always("shared_beyond_the_limit", "166913 bytes of shared memory, the GPU gives a block 166912"),
    always("misaligned_vector", "misaligned vector load"),
    planted("misaligned_cast", Nothing, Message("misaligned address 0x"), Nothing),
    planted("uninitialised_shared", Output, Output, Output),
    planted("undefined_shift", Nothing, Message("runtime error: shift exponent 32"), Nothing),
    planted("missing_wait", Output, Output, RACE),
    planted("wrong_group_count", Output, Output, RACE),
    always("misaligned_copy", "misaligned source of cp.async"),
    planted("copy_beyond", Nothing, BEYOND, Nothing),
    always("divergent_shuffle", "divergent: other lanes wait at another call of it"),
    always("divergent_operation", "divergent: other lanes wait at another operation"),
    always("exited_lane", "returned from the kernel"),
    always("outside_its_mask", "the calling lane is outside its own mask"),
    always("source_outside_mask", "reads a lane outside the mask"),
    planted("missing_syncwarp", Output, Output, RACE),
    planted("shuffle_is_no_fence", Nothing, Nothing, RACE),
    always("misaligned_ldmatrix", "misaligned row of ldmatrix"),
    planted("race_between_blocks", Nothing, Nothing, RACE),
    planted("missing_fence", Nothing, Nothing, RACE),
];

/// Enough blocks for two OS threads, few enough for ThreadSanitizer.
const COUNT: usize = 128 * 12;

/// Runs a planted kernel; whether its output is right.
fn reverses(name: &str, defect: i32, seed: u64) -> bool {
    type Launcher = unsafe extern "C" fn(i32, *const f32, *mut f32, i32) -> u32;
    let launcher = function::<Launcher>(&format!("planted_{name}"));
    let input: Vec<f32> = (0..COUNT).map(|i| i as f32 + 1.0).collect();
    let mut output = vec![f32::NAN; COUNT];
    kernels::set_seed(library(), seed);
    // SAFETY: both hold COUNT numbers. A defect's accesses beyond them are run under AddressSanitizer only, which stops them.
    let status = unsafe { launcher(defect, input.as_ptr(), output.as_mut_ptr(), COUNT as i32) };
    assert_eq!(status, 0, "{name}");
    (0..COUNT).all(|i| output[i] == input[i / 128 * 128 + 127 - i % 128])
}

/// In a child process: one defect, one seed, as the environment says. In the test run itself it has nothing to do.
#[test]
fn child() {
    let Ok(case) = std::env::var("VLMQ_PLANTED") else { return };
    let (name, seed) = case.split_once(' ').unwrap();
    println!("output is {}", if reverses(name, 1, seed.parse().unwrap()) { "right" } else { "wrong" });
}

fn defects_are_seen(variant: Variant) {
    kernels::build(NAME, FOLDER, variant);
    let mut missed = Vec::new();
    for planted in PLANTED {
        let tells = match variant {
            Variant::Plain => planted.plain,
            Variant::Address => planted.address,
            Variant::Thread => planted.thread,
        };
        let expected = match tells {
            Output => "output is wrong",
            Message(message) => message,
            Nothing => continue,
        };
        // Some seed or other: any schedule must do.
        let case = format!("{} {}", planted.name, planted.name.len());
        let run = kernels::run_under(variant, &[full_name(module_path!(), "child")], &[("VLMQ_PLANTED", &case)]);
        let printed = kernels::text(&run);
        // A message must also have ended the process.
        if !printed.contains(expected) || run.status.success() != matches!(tells, Output) {
            missed.push(format!("{case}: no {expected:?} in\n{printed}"));
        }
    }
    assert!(missed.is_empty(), "{variant:?} misses\n{}", missed.join("\n"));
}

#[test]
fn defects_are_seen_plain() {
    defects_are_seen(Variant::Plain);
}

#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn defects_are_seen_by_the_address_sanitizer() {
    defects_are_seen(Variant::Address);
}

#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn defects_are_seen_by_the_thread_sanitizer() {
    defects_are_seen(Variant::Thread);
}

#[test]
fn shared_memory_is_the_gpus() {
    if passed_elsewhere("shared_memory_is_the_gpus") {
        return;
    }
    let bytes = function::<unsafe extern "C" fn() -> usize>("numerics_shared_bytes");
    for kib in SHARED_KIB {
        kernels::set_shared_kib(library(), kib);
        // SAFETY: it takes nothing and returns a number.
        assert_eq!(unsafe { bytes() }, kib as usize * 1024);
        assert!(reverses("shared_beyond_the_limit", 0, 0), "all of {kib} KiB");
    }
    kernels::set_shared_kib(library(), SHARED_KIB[0]);
    for (kib, expected) in [
        ("99", "101377 bytes of shared memory, the GPU gives a block 101376"),
        ("227", "232449 bytes of shared memory, the GPU gives a block 232448"),
        ("100", "100 KiB of shared memory: GPUs give a block 99, 163 or 227 KiB"),
        ("99k", "VLMQ_EMULATOR_SHARED_KIB=99k is not a number"),
    ] {
        let environment = [("VLMQ_PLANTED", "shared_beyond_the_limit 0"), ("VLMQ_EMULATOR_SHARED_KIB", kib)];
        let run = kernels::run_under(Variant::Plain, &[full_name(module_path!(), "child")], &environment);
        let printed = kernels::text(&run);
        assert!(printed.contains(expected) && !run.status.success(), "no {expected:?} in\n{printed}");
    }
}

/// A defect that only some schedules show would slip through tests of a few seeds.
#[test]
fn wrong_outputs_do_not_depend_on_luck() {
    if passed_elsewhere("wrong_outputs_do_not_depend_on_luck") {
        return;
    }
    for planted in PLANTED.iter().filter(|planted| matches!(planted.plain, Output)) {
        let unseen = (0..50).filter(|&seed| reverses(planted.name, 1, seed)).count();
        assert_eq!(unseen, 0, "{} goes unseen in {unseen} of 50 schedules", planted.name);
    }
}

#[test]
fn right_twins_pass() {
    if passed_elsewhere("right_twins_pass") {
        return;
    }
    let seeds = if Variant::current() == Variant::Plain { 20 } else { 3 };
    for planted in PLANTED {
        for seed in 0..seeds {
            assert!(reverses(planted.name, 0, seed), "{} with seed {seed}", planted.name);
        }
    }
}

/// Every kernel and result of this file, and no report.
#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn right_kernels_pass_under_sanitizers() {
    let tests = [
        "right_twins_pass",
        "sixteen_bit_floats_convert_as_the_half_crate_does",
        "products_of_tiles_are_exact",
        "reductions_and_shuffles",
        "splits_keep_seventeen_bits",
        "atomics_count_every_thread",
    ];
    kernels::pass_under_sanitizers(module_path!(), &tests, &[(NAME, FOLDER)]);
}

#[test]
fn sixteen_bit_floats_convert_as_the_half_crate_does() {
    if passed_elsewhere("sixteen_bit_floats_convert_as_the_half_crate_does") {
        return;
    }
    let widen = function::<unsafe extern "C" fn(i32, *const u16, *mut f32, i32) -> u32>("numerics_widen");
    let narrow = function::<unsafe extern "C" fn(i32, *const f32, *mut u16, i32) -> u32>("numerics_narrow");
    let all: Vec<u16> = (0..=u16::MAX).collect();
    for is_half in [false, true] {
        let exact = |bits: u16| if is_half { f16::from_bits(bits).to_f32() } else { bf16::from_bits(bits).to_f32() };
        let mut wide = vec![f32::NAN; all.len()];
        // SAFETY: both buffers hold as many numbers as the last argument says.
        unsafe { widen(is_half as i32, all.as_ptr(), wide.as_mut_ptr(), all.len() as i32) };
        for (&bits, &value) in all.iter().zip(&wide) {
            let right = exact(bits);
            assert!(value.to_bits() == right.to_bits() || value.is_nan() && right.is_nan(), "{bits:#06x}: {value}");
        }
        // Each value, the two floats beside it, and those around the tie with its neighbour.
        let mut values = Vec::new();
        for bits in all.iter().copied() {
            let middle = ((exact(bits) as f64 + exact(bits.wrapping_add(1)) as f64) / 2.0) as f32;
            for centre in [exact(bits), middle] {
                values.extend([-1i32, 0, 1].map(|step| f32::from_bits(centre.to_bits().wrapping_add_signed(step))));
            }
        }
        values.extend([65519.996, 65520.0, f32::MAX, f32::MIN_POSITIVE, 1e-45, -1e-45, 2.0f32.powi(-25)]);
        let mut bits = vec![0xdeadu16; values.len()];
        // SAFETY: as above.
        unsafe { narrow(is_half as i32, values.as_ptr(), bits.as_mut_ptr(), values.len() as i32) };
        for (&value, &bits) in values.iter().zip(&bits) {
            // CUDA gives every NaN the same bits.
            let right = match (value.is_nan(), is_half) {
                (true, _) => 0x7fff,
                (false, true) => f16::from_f32(value).to_bits(),
                (false, false) => bf16::from_f32(value).to_bits(),
            };
            assert_eq!(bits, right, "{value:e} ({:#010x}), half: {is_half}", value.to_bits());
        }
    }
}

/// Deterministic integers of at most `bound` in size.
fn integers(count: usize, bound: i64, salt: u64) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 20) as i64 % (2 * bound + 1) - bound) as f32
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn products_of_tiles_are_exact() {
    if passed_elsewhere("products_of_tiles_are_exact") {
        return;
    }
    type Multiply = unsafe extern "C" fn(i32, i32, *const f32, *const f32, *mut f32) -> u32;
    let multiply = function::<Multiply>("numerics_multiply");
    let transpose = |m: &[f32]| -> Vec<f32> { (0..256).map(|i| m[i % 16 * 16 + i / 16]).collect() };
    // Layouts of numerics.cu: 0 from registers; 1 to 4 a as [m][k] or [k][m], b as [n][k] or [k][n]; 5 and 6 by pairs.
    let bf16_and_f16 = [0, 1].into_iter().flat_map(|kind| (0..7).map(move |layout| (kind, layout)));
    for (kind, layout) in bf16_and_f16.chain([(2, 0)]) {
        for seed in 0..4 {
            kernels::set_seed(library(), seed);
            // Exact in bf16's 8 bits, and their sums in float32's 24.
            let (a, b) = (integers(256, 127, 3 * seed), integers(256, 127, 3 * seed + 1));
            let start = integers(256, 1000, 3 * seed + 2);
            let stored_a = if [3, 4].contains(&layout) { transpose(&a) } else { a.clone() };
            let stored_b = if [1, 3, 5].contains(&layout) { transpose(&b) } else { b.clone() };
            let mut d = start.clone();
            // SAFETY: all three hold 16 x 16 numbers.
            let status = unsafe { multiply(kind, layout, stored_a.as_ptr(), stored_b.as_ptr(), d.as_mut_ptr()) };
            assert_eq!(status, 0);
            for i in 0..256 {
                let dot: f32 = (0..16).map(|k| a[i / 16 * 16 + k] * b[k * 16 + i % 16]).sum();
                assert_eq!(d[i], start[i] + dot, "element {i}, type {kind}, layout {layout}");
            }
        }
    }
}

#[test]
fn reductions_and_shuffles() {
    if passed_elsewhere("reductions_and_shuffles") {
        return;
    }
    type Reductions = unsafe extern "C" fn(*const f32, *mut f32, *mut f32, *mut f32, i32, i32) -> u32;
    let reductions = function::<Reductions>("numerics_reductions");
    for (blocks, threads) in [(1, 32), (3, 96), (5, 256)] {
        kernels::set_seed(library(), threads as u64);
        let input = integers(blocks * threads, 1000, threads as u64);
        let mut sums = vec![f32::NAN; blocks];
        let mut maxima = vec![f32::NAN; blocks];
        let mut warps = vec![f32::NAN; blocks * threads / 32];
        let (b, t) = (blocks as i32, threads as i32);
        // SAFETY: a number per thread in, one per block and one per warp out.
        unsafe { reductions(input.as_ptr(), sums.as_mut_ptr(), maxima.as_mut_ptr(), warps.as_mut_ptr(), b, t) };
        for (i, block) in input.chunks(threads).enumerate() {
            assert_eq!(sums[i], block.iter().sum::<f32>());
            assert_eq!(maxima[i], block.iter().copied().fold(f32::MIN, f32::max));
        }
        for (warp, numbers) in warps.iter().zip(input.chunks(32)) {
            assert_eq!(*warp, numbers.iter().sum::<f32>());
        }
    }
}

#[test]
fn splits_keep_seventeen_bits() {
    if passed_elsewhere("splits_keep_seventeen_bits") {
        return;
    }
    let split = function::<unsafe extern "C" fn(*const f32, *mut f32, *mut f32, i32) -> u32>("numerics_split");
    let mut input: Vec<f32> = integers(5000, 1 << 30, 7).iter().map(|x| x * 1.234_567e-9).collect();
    input.extend([0.0, -0.0, 1.0, 3.0e38, 1.0e-30]);
    let (mut high, mut low) = (vec![f32::NAN; input.len()], vec![f32::NAN; input.len()]);
    // SAFETY: all three hold as many numbers as the last argument says.
    unsafe { split(input.as_ptr(), high.as_mut_ptr(), low.as_mut_ptr(), input.len() as i32) };
    for ((&value, &high), &low) in input.iter().zip(&high).zip(&low) {
        let left = (value as f64 - high as f64 - low as f64).abs();
        assert!(left <= value.abs() as f64 / 131_072.0, "{value}: {high} + {low}");
    }
}

#[test]
fn atomics_count_every_thread() {
    if passed_elsewhere("atomics_count_every_thread") {
        return;
    }
    type Atomics = unsafe extern "C" fn(*const i32, i32, *mut u64, *mut i32, *mut i32, *mut u32) -> u32;
    let atomics = function::<Atomics>("numerics_atomics");
    let input: Vec<i32> = integers(10_000, 100_000, 9).iter().map(|&x| x as i32).collect();
    let (mut sum, mut least, mut greatest, mut seen) = (0u64, i32::MAX, i32::MIN, 0u32);
    // SAFETY: the count is the input's; the others are single numbers.
    unsafe { atomics(input.as_ptr(), input.len() as i32, &mut sum, &mut least, &mut greatest, &mut seen) };
    assert_eq!(sum as i64, input.iter().map(|&x| x as i64).sum::<i64>());
    assert_eq!((Some(&least), Some(&greatest)), (input.iter().min(), input.iter().max()));
    assert_eq!(seen, input.iter().fold(0, |bits, x| bits | 1 << (x & 31)));
}
