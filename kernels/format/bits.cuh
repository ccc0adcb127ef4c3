// Narrow codes in 32-bit words: code i of a run occupies bits i*bits .. (i+1)*bits-1 of one
// little-endian bit stream, cut into words; a code may straddle two. 32 codes fill exactly `bits`
// words, whatever the width, and no code straddles two such units.
#pragma once

#include <cstdint>

#include "vlmq.h"

namespace vlmq {

/// Codes of a unit.
constexpr int kUnit = 32;

/// A width that the compiler knows.
template <int N>
struct Width {
  static constexpr int kBits = N;
};

/// `f(Width<N>{})` for a width of `bits`. The one list of widths there is.
template <class F>
vlmq_status with_bits(int bits, F&& f) {
  switch (bits) {
    case 2:
      return f(Width<2>{});
    case 3:
      return f(Width<3>{});
    case 4:
      return f(Width<4>{});
    case 8:
      return f(Width<8>{});
    default:
      return VLMQ_BAD_ARGUMENT;
  }
}

inline bool valid_bits(int bits) {
  return with_bits(bits, [](auto) { return VLMQ_OK; }) == VLMQ_OK;
}

/// Words of a run, the last padded with zero bits.
__host__ __device__ constexpr long long packed_words(long long count, int bits) {
  // By units: count * bits might not fit.
  return count / kUnit * bits + (count % kUnit * bits + 31) / 32;
}

__host__ __device__ constexpr uint32_t code_mask(int bits) { return (1u << bits) - 1u; }

/// Code i of a unit; `words(j)` is its word j.
template <class Words>
__host__ __device__ constexpr uint32_t code_of_unit(const Words& words, int i, int bits) {
  const int word = i * bits / 32, shift = i * bits % 32;
  const uint32_t low = words(word) >> shift;
  // Where the code straddles, shift is at least 25.
  const uint32_t high = shift + bits > 32 ? words(word + 1) << (32 - shift) : 0u;
  return (low | high) & code_mask(bits);
}

/// Word j of a unit; `codes(i)` is its code i, below 2^bits, asked only for codes with bits in the
/// word.
template <class Codes>
__host__ __device__ constexpr uint32_t word_of_unit(const Codes& codes, int j, int bits) {
  uint32_t word = 0;
  for (int i = 32 * j / bits; i * bits < 32 * (j + 1); ++i) {
    const int shift = i * bits - 32 * j;
    word |= shift < 0 ? codes(i) >> -shift : codes(i) << shift;
  }
  return word;
}

}  // namespace vlmq
