// Arithmetic, bits and atomics under their CUDA names. Compiled with -ffp-contract=off, each rounds
// exactly once, as the device's does; expf and erfcf are the host library's and may differ in
// the last bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "emulator/float16.h"

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

#define VLMQ_MIN_MAX(T)                            \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
VLMQ_MIN_MAX(int)
VLMQ_MIN_MAX(unsigned)
VLMQ_MIN_MAX(long)
VLMQ_MIN_MAX(unsigned long)
VLMQ_MIN_MAX(long long)
VLMQ_MIN_MAX(unsigned long long)
#undef VLMQ_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float __uint_as_float(unsigned bits) { return vlmq::emulator::float_of(bits); }
inline unsigned __float_as_uint(float value) { return vlmq::emulator::bits_of(value); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }

// The device's conversions saturate and send NaN to zero; the host's cast would be undefined.
inline int __float2int_rn(float value) {
  if (std::isnan(value)) return 0;
  if (value >= 2147483648.0f) return INT32_MAX;
  if (value <= -2147483648.0f) return INT32_MIN;
  return static_cast<int>(rintf(value));
}
inline int __float2int_rz(float value) { return __float2int_rn(truncf(value)); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (pick & 7)) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

[[noreturn]] inline void __trap(VLMQ_SITE_ALONE) { vlmq::emulator::fail(site, "__trap"); }

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

// Atomics on integers only: a sum of floats would depend on the order of the threads. Relaxed, as
// CUDA's are: what they guard needs a fence or a barrier of its own, and ThreadSanitizer says so.
#define VLMQ_ATOMICS(T)                                                                          \
  inline T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }           \
  inline T atomicOr(T* p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }             \
  inline T atomicAnd(T* p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); }           \
  inline T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }         \
  inline T atomicCAS(T* p, T expected, T v) {                                                    \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);     \
    return expected;                                                                             \
  }                                                                                              \
  inline T atomicMin(T* p, T v) {                                                                \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                \
    while (v < old &&                                                                            \
           !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                            \
    return old;                                                                                  \
  }                                                                                              \
  inline T atomicMax(T* p, T v) {                                                                \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                \
    while (old < v &&                                                                            \
           !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                            \
    return old;                                                                                  \
  }
VLMQ_ATOMICS(int)
VLMQ_ATOMICS(unsigned)
VLMQ_ATOMICS(unsigned long long)
#undef VLMQ_ATOMICS
