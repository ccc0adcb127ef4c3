// What attention's kernels share: tiles of rows in shared memory, and a warp's products of them.
//
// A warp owns 16 rows of one operand. Its accumulators have mma.cuh's layout for every type, so the
// kernels are written once: 16-bit types multiply on tensor cores, float32 with plain FMAs.
#pragma once

#include <cstdint>

#include "decoder/vectors.cuh"
#include "device/mma.cuh"
#include "device/ptx.cuh"

namespace vlmq {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;
constexpr unsigned kAllLanes = 0xffffffffu;

/// Widths that a head is padded to with zeros, `f(HeadDim<N>{})` for the least that holds it.
template <int N>
struct HeadDim {
  static constexpr int kValue = N;
};

template <class F>
vlmq_status with_head_dim(int64_t head_dim, F&& f) {
  if (head_dim <= 32) return f(HeadDim<32>{});
  if (head_dim <= 64) return f(HeadDim<64>{});
  if (head_dim <= 80) return f(HeadDim<80>{});
  if (head_dim <= 128) return f(HeadDim<128>{});
  if (head_dim <= 256) return f(HeadDim<256>{});
  return VLMQ_BAD_ARGUMENT;
}

/// Heads and spans that the kernels take: spans count rows in 32 bits, heads are a grid's y.
inline bool is_attention_shape(int64_t q_rows, int64_t k_rows, int64_t span_count, int64_t heads,
                               int64_t kv_heads, int64_t head_dim) {
  return q_rows >= 0 && q_rows <= INT32_MAX && k_rows >= 0 && k_rows <= INT32_MAX &&
         span_count >= 0 && heads > 0 && heads <= 65535 && kv_heads > 0 && heads % kv_heads == 0 &&
         head_dim > 0 && head_dim % 2 == 0 && head_dim <= 256;
}

/// Blocks along x for tiles of `rows` of the longest span, in each span; 0 where a grid can not
/// have as many.
inline unsigned span_tiles(int64_t longest, int64_t rows, int64_t span_count) {
  const int64_t tiles = ceil_div(longest, rows);
  return tiles <= INT32_MAX / span_count ? static_cast<unsigned>(tiles * span_count) : 0;
}

/// A row of a tile is 16 bytes longer than its elements: an odd number of 16-byte pieces, so that
/// the eight rows of one ldmatrix (or of one float4 of each) lie in different banks.
template <class T, int kDim>
constexpr int kTileStride = kDim + 16 / static_cast<int>(sizeof(T));

/// Starts bringing rows of one head into a tile, zeros where there is no row or no column. The
/// caller commits, waits and synchronizes. `wide`: rows begin at multiples of 16 bytes and are
/// multiples of 16 bytes long.
template <int kRows, int kDim, int kThreads, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* rows, int64_t row_stride,
                                          int valid_rows, int head_dim, bool wide) {
  constexpr int kStride = kTileStride<T, kDim>;
  if (wide) {
    constexpr int kPiece = 16 / sizeof(T), kPieces = kDim / kPiece;
    static_assert(kDim % kPiece == 0, "whole pieces");
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kThreads) {
      const int row = i / kPieces, col = i % kPieces * kPiece;
      const bool valid = row < valid_rows && col < head_dim;
      cp_async_16(tile + row * kStride + col, valid ? rows + row * row_stride + col : rows,
                  valid ? 16 : 0);
    }
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kDim; i += kThreads) {
      const int row = i / kDim, col = i % kDim;
      const bool valid = row < valid_rows && col < head_dim;
      tile[row * kStride + col] = valid ? rows[row * row_stride + col] : from_float<T>(0.0f);
    }
  }
}

/// Rounds the warp's 16 rows and stores the `valid_rows` first of them. kCols columns from
/// `first_col` of the head; rows of the head begin at `rows`.
template <int kCols, class T>
__device__ __forceinline__ void store_rows(T* rows, int64_t row_stride, int valid_rows,
                                           int first_col, int head_dim, bool wide,
                                           const float (&values)[kCols / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int row = accumulator_row(lane, i), col = first_col + n * 8 + accumulator_col(lane, i);
      // A head is even: of a lane's two neighbours both are inside or none is.
      if (row >= valid_rows || col >= head_dim) continue;
      T* to = rows + row * row_stride + col;
      if constexpr (sizeof(T) == 4) {
        if (wide) {
          store_vector(to, make_float2(values[n][i], values[n][i + 1]));
          continue;
        }
      } else {
        if (wide) {
          store_vector(to, pack2(from_float<T>(values[n][i]), from_float<T>(values[n][i + 1])));
          continue;
        }
      }
      to[0] = from_float<T>(values[n][i]);
      to[1] = from_float<T>(values[n][i + 1]);
    }
  }
}

/// Products of a warp's 16 rows, for 16-bit types.
template <class T, int kDim>
struct Products {
  static constexpr int kStride = kTileStride<T, kDim>;

  /// Shared memory that `accumulate` needs for each warp.
  static constexpr size_t scratch_bytes(int) { return 0; }

  /// s += x y^T: x the warp's 16 rows, y 8 * kTiles rows.
  template <int kTiles>
  __device__ __forceinline__ static void multiply_transposed(float (&s)[kTiles][4], const T* x,
                                                             const T* y) {
    static_assert(kTiles % 2 == 0 && kDim % 16 == 0, "one ldmatrix brings 16 rows and columns");
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const FragmentRow of_x = fragment_a_mk(lane), of_y = fragment_b_nk(lane);
    x += of_x.row * kStride + of_x.col;
    y += of_y.row * kStride + of_y.col;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#pragma unroll 2  // in full, ptxas spills a few registers in the backward kernel there
#else
#pragma unroll
#endif
    for (int k = 0; k < kDim; k += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, x + k);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, y + n * 8 * kStride + k);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        Mma<T>::multiply(s[n], a, first);
        Mma<T>::multiply(s[n + 1], a, second);
      }
    }
  }

  /// o += p y: p 16 rows of 8 * kTiles columns as accumulators hold them, which is how a left
  /// operand is held too; y as many rows, of which kOut columns.
  template <int kTiles, int kOut>
  __device__ __forceinline__ static void accumulate(float (&o)[kOut / 8][4],
                                                    const float (&p)[kTiles][4], const T* y,
                                                    float*) {
    static_assert(kTiles % 2 == 0 && kOut % 16 == 0, "one ldmatrix brings 16 rows and columns");
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const FragmentRow of_y = fragment_b_kn(lane);
    y += of_y.row * kStride + of_y.col;
#pragma unroll
    for (int k = 0; k < kTiles; k += 2) {
      const uint32_t a[4] = {pair(p[k][0], p[k][1]), pair(p[k][2], p[k][3]),
                             pair(p[k + 1][0], p[k + 1][1]), pair(p[k + 1][2], p[k + 1][3])};
#pragma unroll
      for (int n = 0; n < kOut / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, y + k * 8 * kStride + n * 8);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        Mma<T>::multiply(o[n], a, first);
        Mma<T>::multiply(o[n + 1], a, second);
      }
    }
  }

 private:
  __device__ __forceinline__ static uint32_t pair(float first, float second) {
    return pack2(from_float<T>(first), from_float<T>(second));
  }
};

/// The same for float32, in the same layout: for small models and for checking.
template <int kDim>
struct Products<float, kDim> {
  static constexpr int kStride = kTileStride<float, kDim>;

  static constexpr size_t scratch_bytes(int cols) { return 16 * scratch_stride(cols) * 4; }

  template <int kTiles>
  __device__ __forceinline__ static void multiply_transposed(float (&s)[kTiles][4], const float* x,
                                                             const float* y) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    x += lane / 4 * kStride;
    y += lane % 4 * 2 * kStride;
#pragma unroll 1
    for (int k = 0; k < kDim; k += 4) {
      const float4 upper = load_vector<float4>(x + k);
      const float4 lower = load_vector<float4>(x + 8 * kStride + k);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float4 even = load_vector<float4>(y + n * 8 * kStride + k);
        const float4 odd = load_vector<float4>(y + (n * 8 + 1) * kStride + k);
        add_dot(s[n][0], upper, even);
        add_dot(s[n][1], upper, odd);
        add_dot(s[n][2], lower, even);
        add_dot(s[n][3], lower, odd);
      }
    }
  }

  /// A lane needs all columns of its two rows of p: they pass through shared memory.
  template <int kTiles, int kOut>
  __device__ __forceinline__ static void accumulate(float (&o)[kOut / 8][4],
                                                    const float (&p)[kTiles][4], const float* y,
                                                    float* scratch) {
    constexpr int kScratch = scratch_stride(kTiles * 8);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    __syncwarp();  // what was there before has been read
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        store_vector(
            scratch + accumulator_row(lane, i) * kScratch + n * 8 + accumulator_col(lane, i),
            make_float2(p[n][i], p[n][i + 1]));
      }
    }
    __syncwarp();
    const float* upper = scratch + lane / 4 * kScratch;
    const float* lower = upper + 8 * kScratch;
    y += lane % 4 * 2;
#pragma unroll 1
    for (int k = 0; k < kTiles * 8; ++k) {
      const float above = upper[k], below = lower[k];
#pragma unroll
      for (int n = 0; n < kOut / 8; ++n) {
        const float2 right = load_vector<float2>(y + k * kStride + n * 8);
        o[n][0] = fmaf(above, right.x, o[n][0]);
        o[n][1] = fmaf(above, right.y, o[n][1]);
        o[n][2] = fmaf(below, right.x, o[n][2]);
        o[n][3] = fmaf(below, right.y, o[n][3]);
      }
    }
  }

 private:
  __host__ __device__ static constexpr int scratch_stride(int cols) { return cols + 4; }

  __device__ __forceinline__ static void add_dot(float& sum, float4 a, float4 b) {
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    sum = fmaf(a.w, b.w, sum);
  }
};

}  // namespace vlmq
