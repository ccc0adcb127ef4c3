// Storage types, their conversions, and vector accesses.
#pragma once

#include <cstdint>

#ifndef VLMQ_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace vlmq {

#ifdef VLMQ_EMULATED
using bf16 = emulator::Bfloat16;
using f16 = emulator::Half;
#else
using bf16 = __nv_bfloat16;
using f16 = __half;
#endif

/// Widening is exact; arithmetic is always done in float.
__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(bf16 value) {
#ifdef VLMQ_EMULATED
  return emulator::widen(value);
#else
  return __bfloat162float(value);
#endif
}

__device__ __forceinline__ float to_float(f16 value) {
#ifdef VLMQ_EMULATED
  return emulator::widen(value);
#else
  return __half2float(value);
#endif
}

/// Rounds to nearest even; beyond the range, infinity; NaN stays NaN.
template <class T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
#ifdef VLMQ_EMULATED
  return emulator::narrow_bfloat16(value);
#else
  return __float2bfloat16_rn(value);
#endif
}

template <>
__device__ __forceinline__ f16 from_float<f16>(float value) {
#ifdef VLMQ_EMULATED
  return emulator::narrow_half(value);
#else
  return __float2half_rn(value);
#endif
}

/// The 16 bits of a value, and back.
__device__ __forceinline__ uint16_t to_bits(bf16 value) {
#ifdef VLMQ_EMULATED
  return value.bits;
#else
  return __bfloat16_as_ushort(value);
#endif
}

__device__ __forceinline__ uint16_t to_bits(f16 value) {
#ifdef VLMQ_EMULATED
  return value.bits;
#else
  return __half_as_ushort(value);
#endif
}

template <class T>
__device__ __forceinline__ T from_bits(uint16_t bits);

template <>
__device__ __forceinline__ bf16 from_bits<bf16>(uint16_t bits) {
#ifdef VLMQ_EMULATED
  return bf16{bits};
#else
  return __ushort_as_bfloat16(bits);
#endif
}

template <>
__device__ __forceinline__ f16 from_bits<f16>(uint16_t bits) {
#ifdef VLMQ_EMULATED
  return f16{bits};
#else
  return __ushort_as_half(bits);
#endif
}

/// Two neighbours in one register, the first in the low half, as fragments and memory hold them.
template <class T>
__device__ __forceinline__ uint32_t pack2(T first, T second) {
  return uint32_t{to_bits(second)} << 16 | to_bits(first);
}

template <class T>
__device__ __forceinline__ T low_of(uint32_t pair) {
  return from_bits<T>(static_cast<uint16_t>(pair));
}

template <class T>
__device__ __forceinline__ T high_of(uint32_t pair) {
  return from_bits<T>(static_cast<uint16_t>(pair >> 16));
}

/// One load or store of V (uint4, float4, uint2, float2 ...), whatever the element type behind the
/// pointer. The address must be a multiple of V's size: a fault on the device, a message with the
/// caller's line in the emulator.
#ifdef VLMQ_EMULATED

template <class V>
V load_vector(const void* source VLMQ_SITE) {
  emulator::check_aligned(source, alignof(V), "vector load", site);
  // Hides where the address comes from: where a caller tests the alignment itself and reads the
  // same numbers one by one otherwise, g++ would make one load of both, before the test.
  asm("" : "+r"(source));
  return *static_cast<const V*>(source);
}

template <class V>
void store_vector(void* target, V value VLMQ_SITE) {
  emulator::check_aligned(target, alignof(V), "vector store", site);
  *static_cast<V*>(target) = value;
}

#else

template <class V>
__device__ __forceinline__ V load_vector(const void* source) {
  return *static_cast<const V*>(source);
}

template <class V>
__device__ __forceinline__ void store_vector(void* target, V value) {
  *static_cast<V*>(target) = value;
}

#endif

}  // namespace vlmq
