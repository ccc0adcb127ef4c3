// Four neighbouring columns of a row at a time, and slices of the factor on their way to shared
// memory.
#pragma once

#include <cstdint>

#include "device/arguments.cuh"
#include "device/ptx.cuh"
#include "device/types.cuh"

namespace vlmq {

/// The first `valid` of four values, zeros after them. Rows may start anywhere: one load of 16
/// bytes where they start well.
__device__ __forceinline__ float4 load4(const float* source, int valid) {
  if (valid >= 4 && is_aligned(source, 16)) return load_vector<float4>(source);
  return make_float4(valid > 0 ? source[0] : 0.0f, valid > 1 ? source[1] : 0.0f,
                     valid > 2 ? source[2] : 0.0f, valid > 3 ? source[3] : 0.0f);
}

__device__ __forceinline__ void store4(float* target, float4 value, int valid) {
  if (valid >= 4 && is_aligned(target, 16)) {
    store_vector(target, value);
    return;
  }
  if (valid > 0) target[0] = value.x;
  if (valid > 1) target[1] = value.y;
  if (valid > 2) target[2] = value.z;
  if (valid > 3) target[3] = value.w;
}

/// The same for codes, the first in the lowest byte.
__device__ __forceinline__ void store4(uint8_t* target, uint32_t codes, int valid) {
  if (valid >= 4 && is_aligned(target, 4)) {
    store_vector(target, codes);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < valid) target[i] = static_cast<uint8_t>(codes >> 8 * i & 0xff);
  }
}

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z),
                     __fadd_rn(a.w, b.w));
}

/// d += a b, each product fused with its sum.
__device__ __forceinline__ void add_product(float4& d, float a, float4 b) {
  d.x = __fmaf_rn(a, b.x, d.x);
  d.y = __fmaf_rn(a, b.y, d.y);
  d.z = __fmaf_rn(a, b.z, d.z);
  d.w = __fmaf_rn(a, b.w, d.w);
}

/// Starts copying four values to shared memory, zeros after the first `valid`. `base` is any
/// readable address, aligned to 16 bytes where `vectors`: what a copy of nothing names.
__device__ __forceinline__ void stage4(float* target, const float* source, int valid,
                                       const float* base, bool vectors) {
  if (vectors) {
    const int bytes = valid >= 4 ? 16 : valid > 0 ? 4 * valid : 0;
    cp_async_16(target, bytes > 0 ? source : base, bytes);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    cp_async_4(target + i, i < valid ? source + i : base, i < valid ? 4 : 0);
  }
}

}  // namespace vlmq
