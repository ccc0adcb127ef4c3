//! Buffers of any element type for the kernels' tests: inputs that end where the allocation ends, outputs between guards.

use super::kernels::{self, Variant};
use half::{bf16, f16};
use std::ffi::c_void;
use vlmq::device::cuda::bindings::{vlmq_dtype, vlmq_status};
use vlmq::tensor::Matrix;

/// The element types.
pub const DTYPES: [vlmq_dtype; 3] = [vlmq_dtype::VLMQ_F32, vlmq_dtype::VLMQ_BF16, vlmq_dtype::VLMQ_F16];

/// Bytes of guard before and after an output.
const GUARD: usize = 64;

/// Half the distance of neighbours, relative: what one rounding to the type may change.
pub fn rounding(dtype: vlmq_dtype) -> f64 {
    match dtype {
        vlmq_dtype::VLMQ_F32 => 2f64.powi(-24),
        vlmq_dtype::VLMQ_BF16 => 2f64.powi(-8),
        _ => 2f64.powi(-11),
    }
}

/// Bytes of an element.
pub fn size(dtype: vlmq_dtype) -> usize {
    if dtype == vlmq_dtype::VLMQ_F32 { 4 } else { 2 }
}

/// The value as the type holds it.
pub fn rounded(dtype: vlmq_dtype, value: f32) -> f32 {
    match dtype {
        vlmq_dtype::VLMQ_F32 => value,
        vlmq_dtype::VLMQ_BF16 => bf16::from_f32(value).to_f32(),
        _ => f16::from_f32(value).to_f32(),
    }
}

/// Numbers of about [-1.7, 1.7] with deviation 1, from a fixed sequence, as the type holds them.
pub fn noise(dtype: vlmq_dtype, count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        rounded(dtype, ((state >> 40) as f32 / (1u32 << 24) as f32 - 0.5) * 3.46)
    };
    next();
    (0..count).map(|_| next()).collect()
}

/// Lengths of a row: less than an access, odd, whole accesses, several rounds of a block.
pub fn lengths() -> &'static [usize] {
    match Variant::current() {
        Variant::Plain => &[1, 2, 8, 17, 33, 64, 127, 128, 129, 2048, 3584, 4100],
        _ => &[1, 33, 128, 520],
    }
}

/// A matrix of the CPU device.
pub fn matrix(rows: usize, cols: usize, values: &[f32]) -> Matrix {
    Matrix::new(rows, cols, values.to_vec()).unwrap()
}

/// Integers, whose sums no type rounds.
pub fn integers(count: usize, seed: u64) -> Vec<f32> {
    noise(vlmq_dtype::VLMQ_F32, count, seed).iter().map(|x| (x * 16.0).round()).collect()
}

/// Elements of one type in the emulator's device memory.
pub struct Buffer {
    dtype: vlmq_dtype,
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// An input that begins `shift` elements after a multiple of 16 bytes.
    pub fn input(dtype: vlmq_dtype, values: &[f32], shift: usize) -> Self {
        let start = shift * size(dtype);
        let mut bytes = Vec::with_capacity(start + values.len() * size(dtype));
        bytes.resize(start, 0);
        for &value in values {
            match dtype {
                vlmq_dtype::VLMQ_F32 => bytes.extend(value.to_ne_bytes()),
                vlmq_dtype::VLMQ_BF16 => bytes.extend(bf16::from_f32(value).to_ne_bytes()),
                _ => bytes.extend(f16::from_f32(value).to_ne_bytes()),
            }
        }
        let end = bytes.len();
        Self::aligned(Self { dtype, bytes, start, end })
    }

    /// An output full of NaN between guards.
    pub fn output(dtype: vlmq_dtype, count: usize, shift: usize) -> Self {
        let start = GUARD + shift * size(dtype);
        let end = start + count * size(dtype);
        let mut bytes = vec![0xa5; end + GUARD];
        bytes[start..end].fill(0xff);
        Self::aligned(Self { dtype, bytes, start, end })
    }

    /// An output that already holds values.
    pub fn in_out(dtype: vlmq_dtype, values: &[f32], shift: usize) -> Self {
        let mut buffer = Self::output(dtype, values.len(), shift);
        let filled = Self::input(dtype, values, 0);
        buffer.bytes[buffer.start..buffer.end].copy_from_slice(&filled.bytes);
        buffer
    }

    fn aligned(self) -> Self {
        assert_eq!(self.bytes.as_ptr().addr() % 16, 0, "the allocator aligns to 16 bytes");
        self
    }

    /// What a kernel reads.
    pub fn ptr(&self) -> *const c_void {
        self.bytes[self.start..].as_ptr().cast()
    }

    /// What a kernel writes.
    pub fn ptr_mut(&mut self) -> *mut c_void {
        self.bytes[self.start..].as_mut_ptr().cast()
    }

    /// The elements' bytes; fails where a guard was touched.
    pub fn bytes(&self) -> &[u8] {
        let outside = |range: &[u8]| range.iter().all(|&byte| byte == 0xa5);
        if self.end < self.bytes.len() {
            assert!(outside(&self.bytes[..self.start]), "written before the output");
            assert!(outside(&self.bytes[self.end..]), "written behind the output");
        }
        &self.bytes[self.start..self.end]
    }

    /// The elements, likewise.
    pub fn values(&self) -> Vec<f32> {
        let bytes = self.bytes();
        match self.dtype {
            vlmq_dtype::VLMQ_F32 => bytes.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect(),
            vlmq_dtype::VLMQ_BF16 => {
                bytes.chunks_exact(2).map(|b| bf16::from_ne_bytes([b[0], b[1]]).to_f32()).collect()
            }
            _ => bytes.chunks_exact(2).map(|b| f16::from_ne_bytes([b[0], b[1]]).to_f32()).collect(),
        }
    }
}

/// Calls a function that must accept its arguments.
pub fn accepted<A>(name: &str, args: &A) {
    assert_eq!(kernels::call(name, args), vlmq_status::VLMQ_OK, "{name}");
}

/// Calls a function that must refuse its arguments.
pub fn refused<A>(name: &str, args: &A) {
    assert_eq!(kernels::call(name, args), vlmq_status::VLMQ_BAD_ARGUMENT, "{name}");
}

/// Runs under several schedules, which must give the same outputs, and returns those.
pub fn every_schedule(run: impl Fn() -> Vec<Buffer>) -> Vec<Buffer> {
    let mut first: Option<Vec<Buffer>> = None;
    for seed in 0..if Variant::current() == Variant::Plain { 3 } else { 1 } {
        kernels::set_seed(kernels::kernels(), seed);
        let outputs = run();
        if let Some(first) = &first {
            for (i, (a, b)) in first.iter().zip(&outputs).enumerate() {
                assert!(a.bytes() == b.bytes(), "output {i} differs under schedule {seed}");
            }
        } else {
            first = Some(outputs);
        }
    }
    first.unwrap()
}

/// Fails unless each value is the reference rounded once, up to `slack` of the largest reference.
pub fn assert_rounded_once(dtype: vlmq_dtype, values: &[f32], reference: &[f32], slack: f64, what: &str) {
    assert_eq!(values.len(), reference.len(), "{what}");
    let largest = reference.iter().fold(0f64, |a, &b| a.max(f64::from(b).abs()));
    // Below the normal numbers of f16 its values lie 2^-24 apart.
    let smallest = if dtype == vlmq_dtype::VLMQ_F16 { 2f64.powi(-25) } else { 0.0 };
    for (i, (&value, &expected)) in values.iter().zip(reference).enumerate() {
        let error = (f64::from(value) - f64::from(expected)).abs();
        let allowed = rounding(dtype) * f64::from(expected).abs() + slack * largest + smallest;
        assert!(error <= allowed, "{what}: {value} instead of {expected} at {i}");
    }
}
