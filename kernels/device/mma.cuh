// Fragments of mma.sync: who holds what, how ldmatrix brings it, and splitting float32 into pairs
// of bf16.
//
// clang-format off
//
// Lane l, with g = l / 4 and t = l % 4, holds of d += a b:
//
//   m16n8k16 (bf16, f16): a register is two neighbours along k, the lower k in its low half
//
//     a          | k 2t, 2t+1 | k 2t+8, 2t+9         b            | column g
//     -----------+------------+-------------         -------------+---------
//     row g      |    a[0]    |    a[2]              k 2t,   2t+1 |   b[0]
//     row g + 8  |    a[1]    |    a[3]              k 2t+8, 2t+9 |   b[1]
//
//   m16n8k8 (tf32): a register is one element
//
//     a          |  k t   |  k t+4                   b            | column g
//     -----------+--------+--------                  -------------+---------
//     row g      |  a[0]  |  a[2]                    k t          |   b[0]
//     row g + 8  |  a[1]  |  a[3]                    k t+4        |   b[1]
//
//   either, in float32
//
//     d          | column 2t | column 2t+1
//     -----------+-----------+------------
//     row g      |   d[0]    |   d[1]
//     row g + 8  |   d[2]    |   d[3]
//
// clang-format on
#pragma once

#include "device/ptx.cuh"
#include "device/types.cuh"

namespace vlmq {

/// d += a b, 16x16 times 16x8, for either 16-bit type.
template <class T>
struct Mma;

template <>
struct Mma<bf16> {
#ifdef VLMQ_EMULATED
  static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] VLMQ_SITE) {
    mma_m16n8k16_bf16(d, a, b, site);
  }
#else
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    mma_m16n8k16_bf16(d, a, b);
  }
#endif
};

template <>
struct Mma<f16> {
#ifdef VLMQ_EMULATED
  static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] VLMQ_SITE) {
    mma_m16n8k16_f16(d, a, b, site);
  }
#else
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    mma_m16n8k16_f16(d, a, b);
  }
#endif
};

/// Where element i (0 to 3) of a lane's d lies in the 16x8 tile.
__device__ __forceinline__ int accumulator_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
__device__ __forceinline__ int accumulator_col(int lane, int i) { return lane % 4 * 2 + i % 2; }

/// First element of the 8 that a lane names for one ldmatrix_x4 that brings a whole fragment; the
/// caller turns it into an address by its own (swizzled or padded) layout of the tile.
struct FragmentRow {
  int row, col;
};

/// a[0..3] of the 16x16 tile stored as [m][k], without trans.
__device__ __forceinline__ FragmentRow fragment_a_mk(int lane) {
  return {lane % 16, lane / 16 * 8};
}

/// a[0..3] of the 16x16 tile stored as [k][m], with trans.
__device__ __forceinline__ FragmentRow fragment_a_km(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
}

/// b[0..1] of two neighbouring 16x8 tiles (r[0..1] the first, r[2..3] the second) stored as [n][k],
/// 16 rows of n, without trans.
__device__ __forceinline__ FragmentRow fragment_b_nk(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
}

/// The same stored as [k][n], with trans.
__device__ __forceinline__ FragmentRow fragment_b_kn(int lane) {
  return {lane % 16, lane / 16 * 8};
}

/// A float32 as the sum of two bf16: high rounds it, low rounds what is left. |value - high - low|
/// <= 2^-17 |value|.
struct Split {
  bf16 high, low;
};

__device__ __forceinline__ Split split_bf16(float value) {
  const bf16 high = from_float<bf16>(value);
  return {high, from_float<bf16>(__fsub_rn(value, to_float(high)))};
}

/// The same for two neighbours, packed for a fragment.
struct SplitPair {
  uint32_t high, low;
};

__device__ __forceinline__ SplitPair split_bf16_pair(float first, float second) {
  const Split a = split_bf16(first), b = split_bf16(second);
  return {pack2(a.high, b.high), pack2(a.low, b.low)};
}

}  // namespace vlmq
