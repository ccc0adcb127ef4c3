//! Dense packing of narrow codes into 32-bit words, for every width and both file formats.
//!
//! Code `i` of a run occupies bits `i·bits … (i+1)·bits − 1` of one little-endian bit stream, the stream is cut into
//! 32-bit words, and a code may straddle two of them (3 bits: 32 codes fill exactly 3 words). This is the layout of
//! `weight_packed` in compressed-tensors and of `qweight`/`qzeros` in GPTQ files alike; the formats differ only in which
//! direction of the matrix a run walks, hence the strides.

/// Words that a run of `count` codes of `bits` bits fills, the last one padded with zero bits.
pub fn packed_words(count: usize, bits: u32) -> usize {
    (count * bits as usize).div_ceil(32)
}

/// A run of codes, and the run of words that they are packed into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedRun {
    /// Width of a code in bits, from 1 to 8.
    pub bits: u32,
    /// Codes in the run.
    pub count: usize,
    /// Elements from a code to the next one.
    pub code_stride: usize,
    /// Elements from a word to the next one.
    pub word_stride: usize,
}

impl PackedRun {
    /// Codes side by side, as their words are.
    pub fn dense(bits: u32, count: usize) -> Self {
        Self { bits, count, code_stride: 1, word_stride: 1 }
    }
}

/// Packs the codes of `run`, each below `2^bits`, that begin with the first of `codes`, into the words that begin with the first of
/// `words`: [`packed_words`] of them, all overwritten.
///
/// Panics when a slice is too short for its run: sizes are the caller's to know.
pub fn pack(codes: &[u8], words: &mut [u32], run: PackedRun) {
    let PackedRun { bits, count, code_stride, word_stride } = run;
    let done = if code_stride == 1 { pack_side_by_side(&codes[..count], words, bits, word_stride) } else { 0 };
    let mut pending = 0u64;
    let mut filled = 0;
    // Whole words are filled so far.
    let mut next = done * bits as usize / 32 * word_stride;
    for i in done..count {
        let code = codes[i * code_stride];
        debug_assert!(u32::from(code) < 1 << bits, "code {code} is wider than {bits} bits");
        pending |= u64::from(code) << filled;
        filled += bits;
        if filled >= 32 {
            words[next] = pending as u32;
            next += word_stride;
            pending >>= 32;
            filled -= 32;
        }
    }
    if filled > 0 {
        words[next] = pending as u32;
    }
}

/// Codes that fill whole words, as many as a code has bits.
const UNIT: usize = 32;

/// Packs units of codes that lie side by side, eight codes at a time; returns how many codes those are.
fn pack_side_by_side(codes: &[u8], words: &mut [u32], bits: u32, word_stride: usize) -> usize {
    match bits {
        2 => pack_units::<2>(codes, words, word_stride),
        3 => pack_units::<3>(codes, words, word_stride),
        4 => pack_units::<4>(codes, words, word_stride),
        _ => 0,
    }
}

fn pack_units<const BITS: usize>(codes: &[u8], words: &mut [u32], word_stride: usize) -> usize {
    let units = codes.as_chunks::<UNIT>().0;
    for (unit, first) in units.iter().zip((0..).step_by(BITS * word_stride)) {
        let mut stream = 0u128;
        for (i, &eight) in unit.as_chunks::<8>().0.iter().enumerate() {
            stream |= u128::from(squeeze::<BITS>(u64::from_le_bytes(eight))) << (8 * BITS * i);
        }
        for i in 0..BITS {
            words[first + i * word_stride] = (stream >> (32 * i)) as u32;
        }
    }
    units.len() * UNIT
}

/// The low `BITS` bits of eight bytes side by side: pairs move together, then pairs of pairs, then both halves.
#[inline(always)]
fn squeeze<const BITS: usize>(bytes: u64) -> u64 {
    debug_assert!(bytes & (0x0101_0101_0101_0101 * (0xff >> BITS << BITS)) == 0, "a code is wider than {BITS} bits");
    let pairs = (bytes | bytes >> (8 - BITS)) & (0x0001_0001_0001_0001 * ((1 << (2 * BITS)) - 1));
    let fours = (pairs | pairs >> (16 - 2 * BITS)) & (0x0000_0001_0000_0001 * ((1 << (4 * BITS)) - 1));
    (fours | fours >> (32 - 4 * BITS)) & ((1 << (8 * BITS)) - 1)
}

/// The inverse of [`pack`]: reads the codes of `run` from its words and stores them in their places.
pub fn unpack(words: &[u32], codes: &mut [u8], run: PackedRun) {
    let PackedRun { bits, count, code_stride, word_stride } = run;
    let mask = (1u64 << bits) - 1;
    let mut pending = 0u64;
    let mut filled = 0;
    let mut next = 0;
    for i in 0..count {
        if filled < bits {
            pending |= u64::from(words[next]) << filled;
            next += word_stride;
            filled += 32;
        }
        codes[i * code_stride] = (pending & mask) as u8;
        pending >>= bits;
        filled -= bits;
    }
}
