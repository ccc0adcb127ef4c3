//! The emulator's device memory for the kernels' tests, and the numbers in it: inputs end where their allocation ends,
//! outputs lie between guards and are poisoned before the call.

use crate::support::uniform;
use half::{bf16, f16};
use vlmq::device::cuda::bindings::vlmq_dtype;

pub(crate) const F32: vlmq_dtype = vlmq_dtype::VLMQ_F32;
pub(crate) const BF16: vlmq_dtype = vlmq_dtype::VLMQ_BF16;
pub(crate) const F16: vlmq_dtype = vlmq_dtype::VLMQ_F16;

/// The types of activations.
pub(crate) const DTYPES: [vlmq_dtype; 3] = [F32, BF16, F16];

/// Bytes of guard before and behind an output; a multiple of 16.
const GUARD_BYTES: usize = 64;

/// Two bytes that, repeated, are a quiet NaN of every floating-point type, and one that no arithmetic makes: guards. What
/// reads them spoils its result.
const GUARD: [u8; 2] = 0x7ffd_u16.to_ne_bytes();

/// Another such NaN: outputs before the call.
const POISON: [u8; 8] = 0x7ffa_7ffa_7ffa_7ffa_u64.to_ne_bytes();

/// How a buffer holds its values. A `vlmq_dtype` rounds float32 values to what it names.
pub(crate) trait Element: Copy {
    /// What goes in and comes out.
    type Value: Copy + Bits;

    /// Bytes of an element.
    fn size(self) -> usize;

    /// Writes an element into its bytes.
    fn store(self, value: Self::Value, bytes: &mut [u8]);

    /// Reads an element from its bytes.
    fn load(self, bytes: &[u8]) -> Self::Value;

    /// What an output holds before the call.
    fn poison(self) -> Self::Value {
        self.load(&POISON[..self.size()])
    }
}

impl Element for vlmq_dtype {
    type Value = f32;

    fn size(self) -> usize {
        if self == F32 { 4 } else { 2 }
    }

    fn store(self, value: f32, bytes: &mut [u8]) {
        match self {
            F32 => bytes.copy_from_slice(&value.to_ne_bytes()),
            BF16 => bytes.copy_from_slice(&bf16::from_f32(value).to_ne_bytes()),
            _ => bytes.copy_from_slice(&f16::from_f32(value).to_ne_bytes()),
        }
    }

    fn load(self, bytes: &[u8]) -> f32 {
        match self {
            F32 => f32::from_ne_bytes(bytes.try_into().unwrap()),
            BF16 => bf16::from_ne_bytes(bytes.try_into().unwrap()).to_f32(),
            _ => f16::from_ne_bytes(bytes.try_into().unwrap()).to_f32(),
        }
    }
}

macro_rules! element {
    ($name:ident, $value:ty) => {
        /// Elements of the type of this name.
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct $name;

        impl Element for $name {
            type Value = $value;

            fn size(self) -> usize {
                size_of::<$value>()
            }

            fn store(self, value: $value, bytes: &mut [u8]) {
                bytes.copy_from_slice(&value.to_ne_bytes());
            }

            fn load(self, bytes: &[u8]) -> $value {
                <$value>::from_ne_bytes(bytes.try_into().unwrap())
            }
        }
    };
}

element!(F64, f64);
element!(U8, u8);
element!(U32, u32);
element!(I32, i32);

/// Elements of one type in the emulator's device memory.
#[derive(Debug)]
pub(crate) struct Buffer<E = vlmq_dtype> {
    element: E,
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl<E: Element> Buffer<E> {
    /// An input that begins `shift` elements after a multiple of 16 bytes; the first byte behind it is out of bounds.
    pub(crate) fn input(element: E, values: &[E::Value], shift: usize) -> Self {
        let mut buffer = Self::guarded(element, shift * element.size(), values.len(), 0);
        buffer.fill(values.iter().copied());
        buffer
    }

    /// A poisoned output of `count` elements.
    pub(crate) fn output(element: E, count: usize, shift: usize) -> Self {
        let mut buffer = Self::guarded(element, GUARD_BYTES + shift * element.size(), count, GUARD_BYTES);
        repeat(&mut buffer.bytes[buffer.start..buffer.end], &POISON[..element.size()]);
        buffer
    }

    /// An output that already holds values.
    pub(crate) fn in_out(element: E, values: &[E::Value], shift: usize) -> Self {
        let mut buffer = Self::output(element, values.len(), shift);
        buffer.fill(values.iter().copied());
        buffer
    }

    /// `count` elements from byte `start` on, and `behind` bytes behind them: guards all through.
    fn guarded(element: E, start: usize, count: usize, behind: usize) -> Self {
        let end = start + count * element.size();
        // As many bytes as the allocation has: the sanitizer sees an access of the next.
        let mut bytes = vec![0; end + behind];
        repeat(&mut bytes, &GUARD);
        assert!(bytes.is_empty() || bytes.as_ptr().addr().is_multiple_of(16), "the allocator aligns to 16 bytes");
        Self { element, bytes, start, end }
    }

    fn fill(&mut self, values: impl Iterator<Item = E::Value>) {
        let elements = self.bytes[self.start..self.end].chunks_exact_mut(self.element.size());
        elements.zip(values).for_each(|(bytes, value)| self.element.store(value, bytes));
    }

    /// What a kernel reads, for the field of an argument struct: its type, or `c_void`.
    pub(crate) fn ptr<P>(&self) -> *const P {
        self.assert_fits::<P>();
        self.bytes[self.start..].as_ptr().cast()
    }

    /// What a kernel writes, likewise.
    pub(crate) fn ptr_mut<P>(&mut self) -> *mut P {
        self.assert_fits::<P>();
        self.bytes[self.start..].as_mut_ptr().cast()
    }

    fn assert_fits<P>(&self) {
        // c_void has the size of a byte.
        assert!([1, self.element.size()].contains(&size_of::<P>()), "a pointer to another type");
    }

    /// The elements' bytes; fails where a guard was touched.
    pub(crate) fn bytes(&self) -> &[u8] {
        let touched = |mut range: std::ops::Range<usize>| range.find(|&i| self.bytes[i] != GUARD[i % 2]);
        let before = touched(0..self.start).map(|i| self.start - i);
        assert!(before.is_none(), "written {before:?} bytes before the buffer");
        let behind = touched(self.end..self.bytes.len()).map(|i| i - self.end);
        assert!(behind.is_none(), "written {behind:?} bytes behind the buffer");
        &self.bytes[self.start..self.end]
    }

    /// The elements, likewise.
    pub(crate) fn values(&self) -> Vec<E::Value> {
        self.bytes().chunks_exact(self.element.size()).map(|bytes| self.element.load(bytes)).collect()
    }

    /// Whether an output is as it was before the call.
    pub(crate) fn is_untouched(&self) -> bool {
        self.bytes().chunks_exact(self.element.size()).all(|bytes| *bytes == POISON[..bytes.len()])
    }
}

impl Buffer<U8> {
    /// Work space at a multiple of 256 bytes, poisoned with NaN, between guards.
    pub(crate) fn workspace(count: usize) -> Self {
        let mut buffer = Self::guarded(U8, 0, GUARD_BYTES + 256 + count + GUARD_BYTES, 0);
        let first = buffer.bytes.as_ptr().addr() + GUARD_BYTES;
        buffer.start = GUARD_BYTES + first.next_multiple_of(256) - first;
        buffer.end = buffer.start + count;
        repeat(&mut buffer.bytes[buffer.start..buffer.end], &POISON);
        buffer
    }
}

fn repeat(bytes: &mut [u8], pattern: &[u8]) {
    bytes.iter_mut().zip(pattern.iter().cycle()).for_each(|(byte, &value)| *byte = value);
}

/// All bits, to compare what compares unequal to itself.
pub(crate) trait Bits {
    /// Appends them.
    fn append_bits(&self, to: &mut Vec<u64>);

    /// The bits alone.
    fn bits(&self) -> Vec<u64> {
        let mut bits = Vec::new();
        self.append_bits(&mut bits);
        bits
    }
}

macro_rules! bits {
    ($type:ty, $bits:expr) => {
        impl Bits for $type {
            fn append_bits(&self, to: &mut Vec<u64>) {
                to.push($bits(*self));
            }
        }
    };
}

bits!(f32, |x: f32| u64::from(x.to_bits()));
bits!(f64, f64::to_bits);
bits!(u8, u64::from);
bits!(u32, u64::from);
bits!(i32, |x: i32| u64::from(x as u32));
bits!(u64, |x: u64| x);

impl<T: Bits> Bits for [T] {
    fn append_bits(&self, to: &mut Vec<u64>) {
        self.iter().for_each(|value| value.append_bits(to));
    }
}

impl<T: Bits> Bits for Vec<T> {
    fn append_bits(&self, to: &mut Vec<u64>) {
        self[..].append_bits(to);
    }
}

impl<E: Element> Bits for Buffer<E> {
    fn append_bits(&self, to: &mut Vec<u64>) {
        self.bytes().append_bits(to);
    }
}

/// The value as the type holds it.
pub(crate) fn rounded(dtype: vlmq_dtype, value: f32) -> f32 {
    let mut bytes = [0; 4];
    let bytes = &mut bytes[..dtype.size()];
    dtype.store(value, bytes);
    dtype.load(bytes)
}

/// Numbers of mean 0 and deviation 1, at most 1.74 from it, from a fixed sequence, as the type holds them.
pub(crate) fn noise(dtype: vlmq_dtype, count: usize, seed: u64) -> Vec<f32> {
    uniform(seed).take(count).map(|x| rounded(dtype, x * 3f32.sqrt())).collect()
}

/// Integers of -largest..=largest from a fixed sequence.
pub(crate) fn integers(count: usize, seed: u64, largest: u32) -> Vec<f32> {
    // Exact: the sequence has 24 bits.
    let number = |x: f32| ((x + 1.0) * 8_388_608.0) as u32;
    uniform(seed).take(count).map(|x| (number(x) % (2 * largest + 1)) as f32 - largest as f32).collect()
}
