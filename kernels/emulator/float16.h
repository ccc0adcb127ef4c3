// bfloat16 and IEEE half: storage and the conversions of CUDA's cuda_bf16.h and cuda_fp16.h (round
// to nearest even, subnormals kept, every NaN becomes 0x7fff), without needing a CUDA toolkit.
#pragma once

#include <cstdint>
#include <cstring>

namespace vlmq::emulator {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// No arithmetic on purpose: a kernel widens to float, where host and device agree to the bit.
struct Bfloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

inline float widen(Bfloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline float widen(Half value) {
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  // 2^112 moves the exponent's bias from 15 to 127 and is exact, subnormals included.
  uint32_t bits = bits_of(float_of(magnitude) * float_of(0x77800000u));
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinities and NaN
  return float_of(bits | uint32_t{value.bits & 0x8000u} << 16);
}

inline Bfloat16 narrow_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

inline Half narrow_half(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u)
    return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 puts the last kept bit, 2^-24, at the float's own last place, where
    // it rounds.
    return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(
      sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13))};
}

}  // namespace vlmq::emulator
