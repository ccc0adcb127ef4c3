// A 128x128 block in shared memory: A = L D L^T from the last column backwards, L unit upper
// triangular, and the inverse of L, in float64, because cancellation bites here. L and D are what
// the solver reads (L = R diag(R)^-1, D = diag(R)^2), and they need one division a column and no
// square root in the chain of dependent steps.
//
// Narrower blocks are padded with a unit diagonal, which changes nothing of the rest.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "device/limits.cuh"
#include "vlmq.h"

namespace vlmq::factor {

constexpr int kBlock = VLMQ_BLOCK;
constexpr int kBlockThreads = 256;
constexpr int kPanel = 16;  // columns that one warp factors at a time
constexpr int kPackedSize = kBlock * (kBlock + 1) / 2;

static_assert(kBlock % kPanel == 0, "whole panels");

/// Shared memory of the block: 83 592 bytes.
struct DiagonalShared {
  double packed[kPackedSize];       // upper triangle, see packed_index
  double unscaled[kPanel][kBlock];  // the panel's columns of L D
  double pivots[kBlock];            // D
  double reciprocals[kPanel];       // of the panel's pivots
  int32_t failed;                   // column whose pivot is not positive, or -1
};
static_assert(sizeof(DiagonalShared) <= kLeastShared, "some GPUs have less");

/// Packed by columns. Neighbours down a column are neighbours in memory, and the triangular numbers
/// are distinct modulo each power of two: neither a column nor a row has bank conflicts.
__device__ __forceinline__ int packed_index(int row, int col) { return col * (col + 1) / 2 + row; }

/// Factors the panel's own 16x16 triangle: a warp, lane i holds row i; the upper 16 lanes repeat
/// the lower ones.
__device__ __forceinline__ void factor_panel_triangle(DiagonalShared& shared, int base) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane % kPanel;
  double a[kPanel];
#pragma unroll
  for (int c = 0; c < kPanel; ++c) {
    a[c] = row <= c ? shared.packed[packed_index(base + row, base + c)] : 0.0;
  }
  int failed = -1;
#pragma unroll
  for (int c = kPanel - 1; c >= 0; --c) {
    const double pivot = __shfl_sync(kAll, a[c], c);
    // Also refuses NaN. What follows a failure is not used.
    if (failed < 0 && !(pivot > 0.0 && pivot <= 1.7976931348623157e308)) failed = base + c;
    const double reciprocal = 1.0 / pivot, scaled = a[c] * reciprocal;
    if (lane == c) {
      shared.pivots[base + c] = pivot;
      shared.reciprocals[c] = reciprocal;
    }
#pragma unroll
    for (int k = 0; k < c; ++k) {
      // Entries of column k below row k are not part of the triangle: no right one depends on them.
      a[k] -= scaled * __shfl_sync(kAll, a[c], k);
    }
    a[c] = scaled;
  }
  __syncwarp();  // the upper lanes have read what the lower ones write
  if (lane < kPanel) {
#pragma unroll
    for (int c = 0; c < kPanel; ++c) {
      if (row < c) shared.packed[packed_index(base + row, base + c)] = a[c];
    }
  }
  if (lane == 0) shared.failed = failed;
}

/// The panel's rows above its triangle, a thread per row: L D by substitution, then L.
__device__ __forceinline__ void solve_panel_rows(DiagonalShared& shared, int base) {
  const int row = static_cast<int>(threadIdx.x);
  if (row >= base) return;
  double u[kPanel];
#pragma unroll
  for (int c = kPanel - 1; c >= 0; --c) {
    double sum = shared.packed[packed_index(row, base + c)];
#pragma unroll
    for (int k = c + 1; k < kPanel; ++k) {
      sum -= u[k] * shared.packed[packed_index(base + c, base + k)];
    }
    u[c] = sum;
  }
#pragma unroll
  for (int c = 0; c < kPanel; ++c) {
    shared.unscaled[c][row] = u[c];
    shared.packed[packed_index(row, base + c)] = u[c] * shared.reciprocals[c];
  }
}

/// Takes the panel's part off the triangle before it, in tiles of 4x4 a thread.
__device__ __forceinline__ void update_triangle(DiagonalShared& shared, int base) {
  const int tiles = base / 4;
  for (int index = static_cast<int>(threadIdx.x); index < tiles * tiles; index += kBlockThreads) {
    const int row = index % tiles * 4, col = index / tiles * 4;
    if (row > col) continue;
    double sums[4][4] = {};
#pragma unroll 4
    for (int k = 0; k < kPanel; ++k) {
      double left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[i] = shared.packed[packed_index(row + i, base + k)];
        right[i] = shared.unscaled[k][col + i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += left[i] * right[j];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (row + i <= col + j) shared.packed[packed_index(row + i, col + j)] -= sums[i][j];
      }
    }
  }
}

/// packed: A in, L out (strictly above the diagonal; the diagonal holds what is left of A), pivots.
/// Returns the last column whose pivot is not positive, or -1, the same for all threads. The
/// triangle has been written and a barrier passed before the call.
__device__ __forceinline__ int factor_diagonal(DiagonalShared& shared) {
  for (int base = kBlock - kPanel; base >= 0; base -= kPanel) {
    if (threadIdx.x < 32) factor_panel_triangle(shared, base);
    __syncthreads();
    const int failed = shared.failed;
    if (failed >= 0) return failed;
    solve_panel_rows(shared, base);
    __syncthreads();
    update_triangle(shared, base);
    __syncthreads();
  }
  return -1;
}

/// One step of inverting by doubling: with the inverses X of the diagonal blocks of `Half` columns
/// in place, the block between two of them becomes -X_11 L_12 X_22. Each thread has Half / 4
/// entries.
template <int Half>
__device__ __forceinline__ void invert_between(double* packed) {
  constexpr int kRows = Half / 16, kCols = 4, kPerPair = 4 * Half;
  static_assert(kBlock / (2 * Half) * kPerPair == kBlockThreads, "each thread has one tile");
  const int thread = static_cast<int>(threadIdx.x), within = thread % kPerPair;
  const int first = thread / kPerPair * 2 * Half, second = first + Half;
  const int row = first + within % 16 * kRows, col = second + within / 16 * kCols;
  const auto upper = [&](int i, int j) { return i <= j ? packed[packed_index(i, j)] : 0.0; };
  const auto store = [&](const double(&sums)[kRows][kCols], double sign) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) packed[packed_index(row + i, col + j)] = sign * sums[i][j];
    }
    __syncthreads();
  };
  double right_sums[kRows][kCols] = {};
  for (int k = second; k < col + kCols; ++k) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const double right = upper(k, col + j);
#pragma unroll
      for (int i = 0; i < kRows; ++i) right_sums[i][j] += packed[packed_index(row + i, k)] * right;
    }
  }
  store(right_sums, 1.0);
  double left_sums[kRows][kCols] = {};
  for (int k = row; k < second; ++k) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const double left = upper(row + i, k);
#pragma unroll
      for (int j = 0; j < kCols; ++j) left_sums[i][j] += left * packed[packed_index(k, col + j)];
    }
  }
  store(left_sums, -1.0);
}

/// packed: L, of which only what lies above the diagonal is read, in; its inverse, with the unit
/// diagonal, out.
__device__ __forceinline__ void invert_unit_triangle(double* packed) {
  const int thread = static_cast<int>(threadIdx.x), base = thread / kPanel * kPanel;
  const int col = thread % kPanel;
  // Column `col` of the inverse of each 16x16 diagonal block, by substitution.
  double x[kPanel];
  if (thread < kBlock) {
#pragma unroll
    for (int i = kPanel - 1; i >= 0; --i) {
      x[i] = i == col ? 1.0 : 0.0;
#pragma unroll
      for (int k = i + 1; k < kPanel; ++k) x[i] -= packed[packed_index(base + i, base + k)] * x[k];
    }
  }
  __syncthreads();
  if (thread < kBlock) {
#pragma unroll
    for (int i = 0; i < kPanel; ++i) {
      if (i <= col) packed[packed_index(base + i, base + col)] = x[i];
    }
  }
  __syncthreads();
  invert_between<16>(packed);
  invert_between<32>(packed);
  invert_between<64>(packed);
}

}  // namespace vlmq::factor
