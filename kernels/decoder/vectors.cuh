// What the calls on activations share: grids and blocks, and accesses of several elements a thread.
#pragma once

#include <cstdint>

#include "device/arguments.cuh"
#include "device/launch.cuh"
#include "device/types.cuh"
#include "vlmq.h"

namespace vlmq {

/// Elements a thread takes at a time where the addresses allow 16-byte accesses: one access of a
/// 16-bit type, two of float.
constexpr int kWide = 8;

/// Blocks along x, one each `size` of `count`, as many as a grid takes: kernels stride by the grid.
inline dim3 blocks_of(int64_t count, int64_t size) {
  const int64_t blocks = ceil_div(count, size);
  return dim3(static_cast<unsigned>(blocks < INT32_MAX ? blocks : INT32_MAX));
}

/// Threads of a block that works on one row of `count` accesses: whole warps, at most 256.
inline unsigned threads_of_row(int64_t count) {
  return count >= 256 ? 256 : static_cast<unsigned>(ceil_div(count, 32) * 32);
}

/// W neighbours as floats. With W = kWide the address is a multiple of 16.
template <int W, class T>
__device__ __forceinline__ void load(const T* source, float (&values)[W]) {
  if constexpr (W == 1) {
    values[0] = to_float(source[0]);
  } else {
    constexpr int kStep = 16 / sizeof(T);
    static_assert(W % kStep == 0, "whole 16-byte accesses");
#pragma unroll
    for (int first = 0; first < W; first += kStep) {
      const uint4 bits = load_vector<uint4>(source + first);
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          values[first + i] = __uint_as_float(words[i]);
        } else {
          values[first + 2 * i] = to_float(low_of<T>(words[i]));
          values[first + 2 * i + 1] = to_float(high_of<T>(words[i]));
        }
      }
    }
  }
}

/// Rounds W neighbours and stores them, likewise.
template <int W, class T>
__device__ __forceinline__ void store(T* target, const float (&values)[W]) {
  if constexpr (W == 1) {
    target[0] = from_float<T>(values[0]);
  } else {
    constexpr int kStep = 16 / sizeof(T);
    static_assert(W % kStep == 0, "whole 16-byte accesses");
#pragma unroll
    for (int first = 0; first < W; first += kStep) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          words[i] = __float_as_uint(values[first + i]);
        } else {
          words[i] =
              pack2(from_float<T>(values[first + 2 * i]), from_float<T>(values[first + 2 * i + 1]));
        }
      }
      store_vector(target + first, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

/// The first `left` of W neighbours, zeros for the others.
template <int W, class T>
__device__ __forceinline__ void load_first(const T* source, int64_t left, float (&values)[W]) {
  if (left >= W) {
    load<W>(source, values);
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) values[i] = i < left ? to_float(source[i]) : 0.0f;
  }
}

/// Stores the first `left` of W neighbours.
template <int W, class T>
__device__ __forceinline__ void store_first(T* target, int64_t left, const float (&values)[W]) {
  if (left >= W) {
    store<W>(target, values);
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      if (i < left) target[i] = from_float<T>(values[i]);
    }
  }
}

}  // namespace vlmq
