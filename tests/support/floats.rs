//! Float32 buffers for the kernels' tests: inputs that end where the allocation ends, outputs between guards.

use super::kernels::{self, Variant};
use vlmq::device::cuda::bindings::vlmq_status;

/// Floats of guard before and behind an output; a multiple of 16 bytes.
const GUARD: usize = 16;
/// A NaN that no arithmetic makes: guards, and outputs before the call.
const POISON: u32 = 0x7fc0_a5a5;

/// Floats in the emulator's device memory.
pub struct Floats {
    all: Vec<f32>,
    start: usize,
    end: usize,
}

impl Floats {
    /// An input that begins `shift` elements after a multiple of 16 bytes; the first element behind it is out of bounds.
    pub fn input(values: &[f32], shift: usize) -> Self {
        let mut all = Vec::with_capacity(shift + values.len());
        all.resize(shift, f32::from_bits(POISON));
        all.extend(values);
        let end = all.len();
        Self { all, start: shift, end }
    }

    /// An output, poisoned.
    pub fn output(len: usize, shift: usize) -> Self {
        Self::in_out(&vec![f32::from_bits(POISON); len], shift)
    }

    /// An output that already holds values.
    pub fn in_out(values: &[f32], shift: usize) -> Self {
        let start = GUARD + shift;
        let mut all = vec![f32::from_bits(POISON); start + values.len() + GUARD];
        all[start..start + values.len()].copy_from_slice(values);
        assert_eq!(all.as_ptr().addr() % 16, 0, "the allocator aligns to 16 bytes");
        Self { all, start, end: start + values.len() }
    }

    /// What a kernel reads.
    pub fn ptr(&self) -> *const f32 {
        self.all[self.start..].as_ptr()
    }

    /// What a kernel writes.
    pub fn ptr_mut(&mut self) -> *mut f32 {
        self.all[self.start..].as_mut_ptr()
    }

    /// The elements; fails where a guard was touched.
    pub fn values(&self) -> &[f32] {
        let untouched = |range: &[f32]| range.iter().all(|v| v.to_bits() == POISON);
        assert!(untouched(&self.all[..self.start]), "written before the output");
        assert!(untouched(&self.all[self.end..]), "written behind the output");
        &self.all[self.start..self.end]
    }
}

/// Whether a value is as it was before the call.
pub fn is_poison(value: f32) -> bool {
    value.to_bits() == POISON
}

/// Numbers below 2^24 from a fixed sequence.
fn sequence(count: usize, seed: u64) -> impl Iterator<Item = u32> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as u32
    })
}

/// Numbers from a fixed sequence, with mean 0 and deviation 1.
pub fn noise(count: usize, seed: u64) -> Vec<f32> {
    sequence(count, seed).map(|v| (v as f32 / (1u32 << 24) as f32 - 0.5) * 12f32.sqrt()).collect()
}

/// Integers of -largest..=largest from a fixed sequence.
pub fn integers(count: usize, seed: u64, largest: u32) -> Vec<f32> {
    sequence(count, seed).map(|v| (v % (2 * largest + 1)) as f32 - largest as f32).collect()
}

/// Calls a function that must accept its arguments.
pub fn accepted<A>(name: &str, args: &A) {
    assert_eq!(kernels::call(name, args), vlmq_status::VLMQ_OK, "{name}");
}

/// Calls a function that must refuse its arguments.
pub fn refused<A>(name: &str, args: &A, why: &str) {
    assert_eq!(kernels::call(name, args), vlmq_status::VLMQ_BAD_ARGUMENT, "{name}: {why}");
}

/// Runs under several schedules, which must give the same bits, and returns those.
pub fn every_schedule(what: &str, run: impl Fn() -> Vec<f32>) -> Vec<f32> {
    let seeds = if Variant::current() == Variant::Plain { 3 } else { 1 };
    let runs: Vec<Vec<f32>> = (0..seeds)
        .map(|seed| {
            kernels::set_seed(kernels::kernels(), seed);
            run()
        })
        .collect();
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for other in &runs[1..] {
        assert!(bits(other) == bits(&runs[0]), "{what} depends on the schedule");
    }
    runs.into_iter().next().unwrap()
}
