//! Numbers to and from the little-endian bytes of a safetensors file.

use crate::device::cpu::vector;
use crate::tensor::Float;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

/// Values that a thread looks at together.
const CHUNK: usize = 1 << 16;

/// The float type of a tensor's dtype, if it is one that weights come in.
pub(crate) fn float_type(dtype: Dtype) -> Option<Float> {
    match dtype {
        Dtype::F16 => Some(Float::F16),
        Dtype::BF16 => Some(Float::Bf16),
        Dtype::F32 => Some(Float::F32),
        _ => None,
    }
}

/// The file's name for a float type.
pub(crate) fn dtype_of(float: Float) -> Dtype {
    match float {
        Float::F16 => Dtype::F16,
        Float::Bf16 => Dtype::BF16,
        Float::F32 => Dtype::F32,
    }
}

/// Index of the first NaN or infinity among the bytes of `float`.
pub(crate) fn first_non_finite(float: Float, bytes: &[u8]) -> Option<usize> {
    let size = float.bytes();
    let chunk = bytes.par_chunks(CHUNK * size).position_first(|chunk| !is_finite(float, chunk))?;
    let mut values = bytes[chunk * CHUNK * size..].chunks_exact(size);
    let within = values.position(|value| !is_finite(float, value))?;
    Some(chunk * CHUNK + within)
}

/// Whether none of the bytes of `float` are a NaN or an infinity: an exponent of all ones.
pub(crate) fn is_finite(float: Float, bytes: &[u8]) -> bool {
    vector::dispatch(|| match float {
        Float::F16 => largest(bytes, |b| i16::from_le_bytes(b) & 0x7c00) < 0x7c00,
        Float::Bf16 => largest(bytes, |b| i16::from_le_bytes(b) & 0x7f80) < 0x7f80,
        Float::F32 => largest(bytes, |b| i32::from_le_bytes(b) & 0x7f80_0000) < 0x7f80_0000,
    })
}

/// The largest exponent, 0 of no values. Every value is looked at, without a way out inside: the loop runs on vectors.
#[inline(always)]
fn largest<const N: usize, T: Ord + Default + Copy>(bytes: &[u8], exponent: impl Fn([u8; N]) -> T) -> T {
    bytes.as_chunks::<N>().0.iter().fold(T::default(), |most, &value| most.max(exponent(value)))
}

/// `values` rounded to `float`, as bytes.
pub(crate) fn bytes_from_floats(float: Float, values: &[f32]) -> Vec<u8> {
    match float {
        Float::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Float::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        Float::F32 => bytemuck::cast_slice(values).to_vec(),
    }
}

/// Bytes of an I32 tensor as words.
pub(crate) fn words_from_bytes(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
}

/// Words as the bytes of an I32 tensor.
pub(crate) fn bytes_from_words(words: &[u32]) -> Vec<u8> {
    match cfg!(target_endian = "little") {
        true => bytemuck::cast_slice(words).to_vec(),
        false => words.iter().flat_map(|word| word.to_le_bytes()).collect(),
    }
}
