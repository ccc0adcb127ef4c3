// One 128x128 tile of U^T diag(g^2) U or of (F - U)^T diag(g^2) U over a range of tokens.
//
// Tokens are the inner index. A stage of them comes as it lies in memory (cp.async), is made into
// float16 operands, and is multiplied while the next one is made:
//
//   global --cp.async--> raw[3] --own thread--> operands[2] --ldmatrix.trans--> mma --> sums
//
// Where a block has 99 KiB of shared memory instead of 163, stages are shorter or fewer (Stage).
// The products and their order are the same.
//
// Operands are float16 whatever the input: the weighted (left) one as high + low, 22 significant
// bits, where bfloat16 pairs would hold 16 and err by 2e-6 of the result's norm on uncorrelated
// tokens. float16's narrow range does not matter, for each column is scaled by a power of two (both
// operands by their own, undone at the end) to a largest magnitude in [2^14, 2^15): a bfloat16 is
// exact down to 2^-31 of its column's largest magnitude, and what lies below is off by 2^-39 of it.
// Made once per block and stage, an operand costs its conversion once; made in the fragments'
// registers, each of the warps that share it would repeat it.
#pragma once

#include <type_traits>

#include "device/arguments.cuh"
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "device/mma.cuh"
#include "device/ptx.cuh"
#include "device/types.cuh"

namespace vlmq::statistics {

constexpr int kTile = 128;     // rows and columns of a tile of H or C
constexpr int kThreads = 256;  // 8 warps, each 32 rows by 64 columns
constexpr int kWarpRows = 32;
constexpr int kWarpCols = 64;
constexpr int kPitch = kTile + 8;  // of an operand: 8 rows start in 8 different groups of banks

// Tensor cores truncate. Sums of squares lose 2e-8 of their size with each product of 16 tokens:
// the two products of 128 tokens 3e-7, the three (float32) of 64 as much. There the sum goes into
// one that is rounded.
template <class T>
constexpr int kPromotedTokens = sizeof(T) == 4 ? 64 : 128;

/// Elements of a copied chunk, 16 bytes.
template <class T>
constexpr int kElements = 16 / static_cast<int>(sizeof(T));

/// What one pass over tokens is about; tokens count from the pass's first.
struct Problem {
  const void* u;
  const void* f;
  const float* g;
  float* hessian;
  float* cross;
  const uint32_t* maxima;  // [3, features], see column_maxima
  float* partials;         // [splits, tiles, kTile, kTile], or null: sums go into hessian and cross
  int64_t u_stride;
  int64_t f_stride;
  int tokens;
  int features;
  int split_tokens;   // tokens of a block
  int hessian_tiles;  // the tiles of C follow
  bool aligned;       // all rows of u and f start at multiples of 16 bytes
  bool fast;
};

/// Places of `maxima`, and so of the scales.
enum Maximum { kRight = 0, kLeftHessian = 1, kLeftCross = 2 };

/// kSmall: within 99 KiB. 16-bit inputs then come in five stages of half the tokens, float32 ones,
/// whose stages are one mma long as they are, in two.
template <class T, bool kSmall>
struct Stage {
  static constexpr int kChunks = kTile / kElements<T>;
  static constexpr int kTokens = kSmall || sizeof(T) == 4 ? 16 : 32;
  static constexpr int kStages = !kSmall ? 3 : sizeof(T) == 4 ? 2 : 5;  // of inputs under way
  static constexpr int kPromotedStages = kPromotedTokens<T> / kTokens;
  static constexpr int kRows = kTokens * kChunks / kThreads;  // chunks of a thread, in one column
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kRawBytes = kTokens * kTile * sizeof(T);
  static constexpr bool kRightLow = sizeof(T) == 4;  // a float32 right operand is split too
  static constexpr int kParts = 3 + kRightLow;
  static constexpr int kOperandBytes = kTokens * kPitch * 2;

  // Shared memory, in bytes.
  static constexpr int kWeights = kStages * 3 * kRawBytes;
  static constexpr int kScales = kWeights + kStages * kThreads * kRows * sizeof(float);
  static constexpr int kOperands = kScales + 2 * kTile * sizeof(float);
  static constexpr int kSharedBytes = kOperands + 2 * kParts * kOperandBytes;

  static_assert(kTokens * kChunks % kThreads == 0, "each thread has as many chunks");
  static_assert(kTokens % 16 == 0, "an mma takes 16 tokens");
  static_assert(kPromotedTokens<T> % kTokens == 0, "promotions are not a matter of the stages");
};

/// The power of two that brings a column's largest magnitude, given by its bits, into [2^14, 2^15).
/// It and its inverse are normal numbers. A column of zeros, or with a NaN or an infinity, stays as
/// it is.
__device__ __forceinline__ float scale_of(uint32_t maximum) {
  const int exponent = static_cast<int>(maximum >> 23);
  if (maximum == 0 || exponent == 255) return 1.0f;
  return __uint_as_float(static_cast<uint32_t>(min(127 + 14 + 127 - exponent, 253)) << 23);
}

/// Of a power of two that scale_of made, exactly: a division would be a call for each entry.
__device__ __forceinline__ float inverse_of(float scale) {
  return __uint_as_float(0x7f000000u - __float_as_uint(scale));
}

template <class T>
__device__ __forceinline__ void widen_chunk(const void* raw, float (&values)[kElements<T>]) {
  const uint4 words = load_vector<uint4>(raw);
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<T, bf16>) {  // one instruction for either half
      values[2 * i] = __uint_as_float(word[i] << 16);
      values[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    } else {
      values[2 * i] = to_float(low_of<T>(word[i]));
      values[2 * i + 1] = to_float(high_of<T>(word[i]));
    }
  }
}

/// Rounds to float16, stores, and leaves in `values` what rounding took away (exact in float32).
template <int kCount>
__device__ __forceinline__ void store_part(f16* target, float (&values)[kCount]) {
  uint32_t words[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const f16 first = from_float<f16>(values[2 * i]), second = from_float<f16>(values[2 * i + 1]);
    values[2 * i] -= to_float(first);
    values[2 * i + 1] -= to_float(second);
    words[i] = pack2(first, second);
  }
  if constexpr (kCount == 8) {
    store_vector(target, uint4{words[0], words[1], words[2], words[3]});
  } else {
    store_vector(target, uint2{words[0], words[1]});
  }
}

/// The sums of one tile in a block's registers. S: a Stage of T. kCross: of C, else of H. kLow: the
/// left operand's low part counts. nvcc inlines all of it unasked, as registers need; forced, the
/// whole kernel is one function for g++ too, and its sanitized build takes six times as long.
template <class T, class S, bool kCross, bool kLow>
class TileSum {
 public:
  __device__ __forceinline__ TileSum(const Problem& problem, int row, int col, int first, int end)
      : p(problem),
        row0(row * kTile),
        col0(col * kTile),
        first(first),
        end(end),
        shared(dynamic_shared()),
        thread(static_cast<int>(threadIdx.x)) {
    left_valid = max(0, min(kElements<T>, p.features - row0 - chunk_col()));
    right_valid = max(0, min(kElements<T>, p.features - col0 - chunk_col()));
    token = first + chunk_row(0);
    u_row = static_cast<const T*>(p.u) + token * p.u_stride + chunk_col();
    f_row = kCross ? static_cast<const T*>(p.f) + token * p.f_stride + chunk_col() : nullptr;
    // A warp none of whose entries is wanted only copies and converts.
    const int last_col = min(warp_col() + kWarpCols, p.features) - 1;
    active =
        warp_row() < p.features && warp_col() <= last_col && (kCross || warp_row() <= last_col);
  }

  __device__ void run() {
    for (int i = thread; i < 2 * kTile; i += kThreads) {
      const int column = i < kTile ? row0 + i : col0 + i - kTile;
      const int of = i >= kTile ? kRight : kCross ? kLeftCross : kLeftHessian;
      scales()[i] =
          column < p.features ? scale_of(p.maxima[int64_t{of} * p.features + column]) : 1.0f;
    }
    __syncthreads();

    const int stages = static_cast<int>(ceil_div(end - first, S::kTokens));
    read_weights();
    for (int stage = 0; stage < S::kStages; ++stage) copy();
    convert(0);
    copy();
    for (int stage = 0; stage < stages; ++stage) {
      // The stage's operands are complete, and the other buffer's have been read.
      __syncthreads();
      if (stage + 1 < stages) {
        convert(stage + 1);
        copy();
      }
      if (active) {
        multiply(stage);
        if ((stage + 1) % S::kPromotedStages == 0) promote();
      }
    }
    if (active) promote();
  }

  /// Calls `store(row, col, value)`, row and column counted in the tile, for this thread's entries,
  /// `value` being `load(row, col)` and the sum. A half is loaded before any of it is stored: the
  /// compiler may not move a load over a store, and each would wait for memory by itself.
  template <class Load, class Store>
  __device__ void each(Load load, Store store) {
    if (!active) return;
    const int lane = thread % 32;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const auto in_half = [&](auto&& visit) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            visit(warp_row() - row0 + m * 16 + accumulator_row(lane, i),
                  warp_col() - col0 + n * 8 + accumulator_col(lane, i), n, i);
          }
        }
      };
      float old[8][4];
      in_half([&](int row, int col, int n, int i) { old[n][i] = load(row, col); });
      in_half([&](int row, int col, int n, int i) {
        const float sum =
            sums[m][n][i] * inverse_of(scales()[row]) * inverse_of(scales()[kTile + col]);
        store(row, col, old[n][i] + sum);
      });
    }
  }

 private:
  __device__ __forceinline__ int warp_row() const { return row0 + thread / 32 % 4 * kWarpRows; }
  __device__ __forceinline__ int warp_col() const { return col0 + thread / 128 * kWarpCols; }
  __device__ __forceinline__ float* scales() const {
    return reinterpret_cast<float*>(shared + S::kScales);
  }
  /// The thread's own, like its chunks: no other reads them.
  __device__ __forceinline__ float* weights() const {
    return reinterpret_cast<float*>(shared + S::kWeights) + (slot * kThreads + thread) * S::kRows;
  }
  /// The thread's chunks: u's for the left operand, u's for the right one, f's.
  __device__ __forceinline__ unsigned char* raw(int tile, int i) const {
    return shared + (slot * 3 + tile) * S::kRawBytes + (i * kThreads + thread) * 16;
  }
  /// Parts: 0 and 1 the left operand's high and low, 2 and 3 the right one's.
  __device__ __forceinline__ f16* operand(int stage, int part) const {
    return reinterpret_cast<f16*>(shared + S::kOperands +
                                  (stage % 2 * S::kParts + part) * S::kOperandBytes);
  }
  __device__ __forceinline__ int chunk_row(int i) const {
    return thread / S::kChunks + i * S::kRowStep;
  }
  __device__ __forceinline__ int chunk_col() const { return thread % S::kChunks * kElements<T>; }

  /// Weights are read one stage before the copies that they decide on, not to wait for them there.
  __device__ void read_weights() {
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      const int at = token + i * S::kRowStep;
      next[i] = at >= end ? 0.0f : p.g == nullptr ? 1.0f : p.g[at];
    }
  }

  /// Starts copying the next stage's chunks; past the last stage it only closes a group. Rows that
  /// do not start at multiples of 16 bytes take the slow way within the same kernel: a branch a
  /// stage is free, and the kernel need not be compiled twice.
  __device__ void copy() {
    if (token - chunk_row(0) < end) {
      if (p.aligned)
        copy_chunks<true>();
      else
        copy_chunks<false>();
      token += S::kTokens;
      u_row += S::kTokens * p.u_stride;
      if constexpr (kCross) f_row += S::kTokens * p.f_stride;
      read_weights();
    }
    cp_async_commit();
    slot = slot == S::kStages - 1 ? 0 : slot + 1;
  }

  /// Tokens of weight zero become zeros: what they hold, perhaps NaN, must reach neither operand.
  template <bool kAligned>
  __device__ void copy_chunks() {
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      const bool read = next[i] != 0.0f;
      const T* u_chunk = u_row + i * S::kRowStep * p.u_stride;
      copy_chunk<kAligned>(raw(0, i), u_chunk + row0, read ? left_valid : 0);
      copy_chunk<kAligned>(raw(1, i), u_chunk + col0, read ? right_valid : 0);
      if constexpr (kCross) {
        const T* f_chunk = f_row + i * S::kRowStep * p.f_stride;
        copy_chunk<kAligned>(raw(2, i), f_chunk + row0, read ? left_valid : 0);
      }
      weights()[i] = next[i] * next[i];
    }
  }

  template <bool kAligned>
  __device__ static void copy_chunk(unsigned char* target, const T* source, int valid) {
    if constexpr (kAligned) {
      cp_async_16(target, source, valid * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll 1
      for (int e = 0; e < kElements<T>; ++e)
        reinterpret_cast<T*>(target)[e] = e < valid ? source[e] : from_float<T>(0.0f);
    }
  }

  /// Makes a stage's operands of the oldest chunks that this thread copied, whose place is the next
  /// copy's: its own wait is enough.
  __device__ void convert(int stage) {
    cp_async_wait<S::kStages - 1>();
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      const int row = chunk_row(i), place = row * kPitch + chunk_col();
      const float weight = weights()[i];
      float values[kElements<T>];
      widen_chunk<T>(raw(0, i), values);
      if constexpr (kCross) {
        float float_path[kElements<T>];
        widen_chunk<T>(raw(2, i), float_path);
#pragma unroll
        for (int e = 0; e < kElements<T>; ++e) values[e] = float_path[e] - values[e];
      }
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) values[e] *= weight;
      scale(values, 0);
      store_part(operand(stage, 0) + place, values);
      if constexpr (kLow) store_part(operand(stage, 1) + place, values);

      widen_chunk<T>(raw(1, i), values);
      scale(values, kTile);
      store_part(operand(stage, 2) + place, values);
      if constexpr (kLow && S::kRightLow) store_part(operand(stage, 3) + place, values);
    }
  }

  __device__ void scale(float (&values)[kElements<T>], int from) const {
#pragma unroll
    for (int e = 0; e < kElements<T>; e += 4) {
      const float4 by = load_vector<float4>(scales() + from + chunk_col() + e);
      values[e] *= by.x;
      values[e + 1] *= by.y;
      values[e + 2] *= by.z;
      values[e + 3] *= by.w;
    }
  }

  /// Adds a stage's products: low x high, high x low where the right operand has one, high x high;
  /// low x low is below 2^-22 of the result.
  __device__ void multiply(int stage) {
    const int lane = thread % 32;
    const FragmentRow a = fragment_a_km(lane), b = fragment_b_kn(lane);
    const int left_place = a.row * kPitch + warp_row() - row0 + a.col;
    const int right_place = b.row * kPitch + warp_col() - col0 + b.col;
#pragma unroll
    for (int k = 0; k < S::kTokens; k += 16) {
      uint32_t high[2][4], low[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int place = k * kPitch + left_place + m * 16;
        ldmatrix_x4_trans(high[m], operand(stage, 0) + place);
        if constexpr (kLow) ldmatrix_x4_trans(low[m], operand(stage, 1) + place);
      }
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        const int place = k * kPitch + right_place + n * 8;
        uint32_t right[4];
        ldmatrix_x4_trans(right, operand(stage, 2) + place);
        if constexpr (kLow) add(low, right, n);
        if constexpr (kLow && S::kRightLow) {
          uint32_t right_low[4];
          ldmatrix_x4_trans(right_low, operand(stage, 3) + place);
          add(high, right_low, n);
        }
        add(high, right, n);
      }
    }
  }

  __device__ void add(const uint32_t (&left)[2][4], const uint32_t (&right)[4], int n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t b[2] = {right[2 * half], right[2 * half + 1]};
#pragma unroll
      for (int m = 0; m < 2; ++m) Mma<f16>::multiply(products[m][n + half], left[m], b);
    }
  }

  __device__ void promote() {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[m][n][i] += products[m][n][i];
          products[m][n][i] = 0.0f;
        }
      }
    }
  }

  const Problem& p;
  const int row0, col0, first, end;
  unsigned char* const shared;
  const int thread;
  int left_valid, right_valid;  // elements of the thread's chunks that lie in the matrix
  bool active;

  // Of the next copy: its place, the token of the thread's first chunk, its row in u and f at the
  // chunk's offset in a tile, the weights of its tokens.
  int slot = 0;
  int token;
  const T* u_row;
  const T* f_row;
  float next[S::kRows];

  float products[2][8][4] = {};  // inside the tensor cores
  float sums[2][8][4] = {};
};

}  // namespace vlmq::statistics
