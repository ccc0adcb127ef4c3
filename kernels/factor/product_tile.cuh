// One 128x128 tile of a float32 product on the tensor cores: sums = a * op(b).
//
// Each float32 is split into two tf32 numbers, x = high + low, and three products are summed:
// low * high, high * low, high * high. What is left out, low * low, is below 2^-22 of the product,
// and its sign is random. Tensor cores truncate their sums (on average half an ulp of the running
// sum each time, always towards zero), so a sum stays in them for kDepth steps of k only, 12
// instructions: at most 3e-7 of the sum. Then it is added to float32 registers, rounded to nearest.
//
// 8 warps, each 64x32 of the tile. Two buffers of kDepth columns of a and rows of op(b), filled by
// cp.async: 73 728 bytes.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "device/limits.cuh"
#include "device/mma.cuh"
#include "device/ptx.cuh"

namespace vlmq::factor {

constexpr int kTile = 128;     // rows and columns of a tile
constexpr int kDepth = 32;     // of one buffer along the inner dimension
constexpr int kThreads = 256;  // of a block
constexpr int kWarpRows = 64, kWarpCols = 32;
constexpr int kStepsM = kWarpRows / 16, kStepsN = kWarpCols / 8;

// Floats from row to row in shared memory. [rows][k]: the 8 rows of 16 bytes that ldmatrix reads at
// once, and [k][cols]: the 4 rows of 8 floats of a fragment, cover each of the 32 banks once.
constexpr int kRowStride = kDepth + 4;
constexpr int kPanelStride = kTile + 8;
constexpr int kBufferFloats = kTile * kRowStride;  // of one operand
constexpr size_t kTileSharedBytes = 4 * kBufferFloats * sizeof(float);

static_assert(kTileSharedBytes <= kLeastShared, "some GPUs have less");
static_assert(kThreads / 32 * kWarpRows * kWarpCols == kTile * kTile, "warps cover the tile");
static_assert(kRowStride % 32 == 4, "ldmatrix without bank conflicts");
static_assert(kPanelStride % 32 == 8, "fragments of b without bank conflicts");
static_assert(kDepth * kPanelStride <= kBufferFloats, "either layout of b fits");

/// a: [rows, inner], b: [inner, cols], or [cols, inner] where transposed.
struct Operands {
  const float* a;
  const float* b;
  int64_t a_stride, b_stride;
  int64_t rows, cols, inner;
};

/// A thread's part of the tile.
using TileSums = float[kStepsM][kStepsN][4];

/// high: 11 significant bits, ties away from zero. low holds more bits than tf32; the tensor core
/// drops them, 2^-22 of the value at most. One addition and one mask, where cvt.rna also tests for
/// NaN: the splitting is the second largest part of the issued instructions.
struct SplitTf32 {
  uint32_t high, low;
};

__device__ __forceinline__ SplitTf32 split_tf32(uint32_t bits) {
  const uint32_t high = (bits + 0x1000u) & 0xffffe000u;
  return {high, __float_as_uint(__fsub_rn(__uint_as_float(bits), __uint_as_float(high)))};
}

/// Starts copying kTile rows of x, kDepth columns from k on, to [row][k]; zeros outside.
template <bool kVector>
__device__ __forceinline__ void copy_rows(float* tile, const float* x, int64_t stride, int64_t row0,
                                          int64_t rows, int64_t k0, int64_t inner) {
  constexpr int kWidth = kVector ? 4 : 1;  // floats of a copy
  constexpr int kPerRow = kDepth / kWidth, kRowsAtOnce = kThreads / kPerRow;
  const int thread = static_cast<int>(threadIdx.x);
  const int k = thread % kPerRow * kWidth;
  const int64_t left = inner - k0 - k;
  const int valid = static_cast<int>(left < 0 ? 0 : left < kWidth ? left : kWidth);
#pragma unroll
  for (int r = thread / kPerRow; r < kTile; r += kRowsAtOnce) {
    const bool inside = valid > 0 && row0 + r < rows;
    const float* from = inside ? x + (row0 + r) * stride + k0 + k : x;
    float* to = tile + r * kRowStride + k;
    if (kVector) {
      cp_async_16(to, from, inside ? valid * 4 : 0);
    } else {
      cp_async_4(to, from, inside ? 4 : 0);
    }
  }
}

/// The same of kDepth rows of x from k on, kTile columns, to [k][column].
template <bool kVector>
__device__ __forceinline__ void copy_panel(float* tile, const float* x, int64_t stride,
                                           int64_t col0, int64_t cols, int64_t k0, int64_t inner) {
  constexpr int kWidth = kVector ? 4 : 1;
  constexpr int kPerRow = kTile / kWidth, kRowsAtOnce = kThreads / kPerRow;
  const int thread = static_cast<int>(threadIdx.x);
  const int c = thread % kPerRow * kWidth;
  const int64_t left = cols - col0 - c;
  const int valid = static_cast<int>(left < 0 ? 0 : left < kWidth ? left : kWidth);
#pragma unroll
  for (int k = thread / kPerRow; k < kDepth; k += kRowsAtOnce) {
    const bool inside = valid > 0 && k0 + k < inner;
    const float* from = inside ? x + (k0 + k) * stride + col0 + c : x;
    float* to = tile + k * kPanelStride + c;
    if (kVector) {
      cp_async_16(to, from, inside ? valid * 4 : 0);
    } else {
      cp_async_4(to, from, inside ? 4 : 0);
    }
  }
}

__device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / 32 % 2 * 64; }
__device__ __forceinline__ int warp_col() { return static_cast<int>(threadIdx.x) / 64 * 32; }

/// The fragments of b of one step of 8 along k. kUpper: b counts by its upper triangle only;
/// `below` is k - column of the tile's first element.
template <bool kTransposed, bool kUpper>
__device__ __forceinline__ void load_b(SplitTf32 (&b)[kStepsN][2], const float* tile, int k,
                                       int64_t below) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (kTransposed) {
    static_assert(!(kTransposed && kUpper), "no call needs the triangle of a transposed operand");
#pragma unroll
    for (int n = 0; n < kStepsN; n += 2) {
      uint32_t r[4];
      const int row = warp_col() + n * 8 + lane % 8 + lane / 16 * 8;
      ldmatrix_x4(r, tile + row * kRowStride + k + lane / 8 % 2 * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[n + i / 2][i % 2] = split_tf32(r[i]);
    }
  } else {
#pragma unroll
    for (int n = 0; n < kStepsN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = k + lane % 4 + i * 4, col = warp_col() + n * 8 + lane / 4;
        float value = tile[row * kPanelStride + col];
        if (kUpper && below + row > col) value = 0.0f;
        b[n][i] = split_tf32(__float_as_uint(value));
      }
    }
  }
}

/// sums += a * op(b) of one buffer.
template <bool kTransposed, bool kUpper>
__device__ __forceinline__ void multiply_buffer(TileSums& sums, const float* a_tile,
                                                const float* b_tile, int64_t below) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  TileSums part = {};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#pragma unroll 2  // in full, ptxas spills a few registers of the weighted norm there
#else
#pragma unroll
#endif
  for (int k = 0; k < kDepth; k += 8) {
    SplitTf32 b[kStepsN][2];
    load_b<kTransposed, kUpper>(b, b_tile, k, below);
#pragma unroll
    for (int m = 0; m < kStepsM; ++m) {
      uint32_t r[4], high[4], low[4];
      ldmatrix_x4(r, a_tile + (warp_row() + m * 16 + lane % 16) * kRowStride + k + lane / 16 * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const SplitTf32 split = split_tf32(r[i]);
        high[i] = split.high;
        low[i] = split.low;
      }
      // Small products first; the sums of one kind are independent of one another.
#pragma unroll
      for (int n = 0; n < kStepsN; ++n) {
        mma_m16n8k8_tf32(part[m][n], low, {b[n][0].high, b[n][1].high});
      }
#pragma unroll
      for (int n = 0; n < kStepsN; ++n) {
        mma_m16n8k8_tf32(part[m][n], high, {b[n][0].low, b[n][1].low});
      }
#pragma unroll
      for (int n = 0; n < kStepsN; ++n) {
        mma_m16n8k8_tf32(part[m][n], high, {b[n][0].high, b[n][1].high});
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kStepsM; ++m) {
#pragma unroll
    for (int n = 0; n < kStepsN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = __fadd_rn(sums[m][n][i], part[m][n][i]);
    }
  }
}

/// sums = the tile at row0, col0, along the whole inner dimension. kVector: both operands start at
/// a multiple of 16 bytes, and so do their rows. On return nothing of a and b is read any more by
/// this block: their rows and columns of this tile may be overwritten.
template <bool kTransposed, bool kVector, bool kUpper = false>
__device__ __forceinline__ void multiply_tile(TileSums& sums, const Operands& of, int64_t row0,
                                              int64_t col0) {
  float* buffers = reinterpret_cast<float*>(dynamic_shared());
  const auto a_of = [&](int64_t step) { return buffers + step % 2 * 2 * kBufferFloats; };
  const auto b_of = [&](int64_t step) { return a_of(step) + kBufferFloats; };
  const auto copy = [&](int64_t step) {
    const int64_t k0 = step * kDepth;
    copy_rows<kVector>(a_of(step), of.a, of.a_stride, row0, of.rows, k0, of.inner);
    if (kTransposed) {
      copy_rows<kVector>(b_of(step), of.b, of.b_stride, col0, of.cols, k0, of.inner);
    } else {
      copy_panel<kVector>(b_of(step), of.b, of.b_stride, col0, of.cols, k0, of.inner);
    }
    cp_async_commit();
  };
  // Nothing but padding: the tensor cores are left to the other warps.
  const bool active = row0 + warp_row() < of.rows && col0 + warp_col() < of.cols;
  const int64_t steps = ceil_div(of.inner, kDepth);
#pragma unroll
  for (int m = 0; m < kStepsM; ++m) {
#pragma unroll
    for (int n = 0; n < kStepsN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
    }
  }
  if (steps > 0) copy(0);
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<0>();
    __syncthreads();  // this buffer is there, and all have done with the other
    if (step + 1 < steps) copy(step + 1);
    if (active) {
      multiply_buffer<kTransposed, kUpper>(sums, a_of(step), b_of(step), step * kDepth - col0);
    }
  }
}

/// visit(row, column, m, n, i) for each pair of neighbours sums[m][n][i], sums[m][n][i + 1] of a
/// thread's part of the tile; the column is even.
template <class Visit>
__device__ __forceinline__ void for_each_pair(int64_t row0, int64_t col0, Visit visit) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < kStepsM; ++m) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int64_t row = row0 + warp_row() + m * 16 + accumulator_row(lane, i);
#pragma unroll
      for (int n = 0; n < kStepsN; ++n) {
        visit(row, col0 + warp_col() + n * 8 + accumulator_col(lane, i), m, n, i);
      }
    }
  }
}

}  // namespace vlmq::factor
