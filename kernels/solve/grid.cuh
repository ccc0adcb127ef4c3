// The grid of codes of a group of weights, and rounding to it. Every product, sum and quotient is
// rounded by itself, as the CPU device rounds it: the same weights give the same codes.
#pragma once

#include <cstdint>

#include "device/arguments.cuh"
#include "device/types.cuh"
#include "format/bits.cuh"
#include "vlmq.h"

namespace vlmq {

struct Grid {
  float scale, zero;
};

struct Rounded {
  float level;  // code - zero
  float value;
};

/// Steps of the range search.
constexpr int kSteps = 80;

__host__ __device__ constexpr float largest_code(int bits) {
  return static_cast<float>((1 << bits) - 1);
}

/// `x`, a weight in units of the scale, as code - zero.
__device__ __forceinline__ float level_of(float x, float zero, float largest) {
  // Both ends are integers, so clamping before rounding is clamping after it, and what is left is
  // below 2^22, where adding and subtracting 1.5 * 2^23 rounds to an integer, ties to even.
  constexpr float kRound = 12582912.0f;
  x = fmaxf(fminf(x, __fsub_rn(largest, zero)), -zero);
  return __fsub_rn(__fadd_rn(x, kRound), kRound);
}

__device__ __forceinline__ Rounded round_to_grid(float w, Grid grid, float largest) {
  const float level = level_of(__fdiv_rn(w, grid.scale), grid.zero, largest);
  return {level, __fmul_rn(grid.scale, level)};
}

/// An integer below 2^8 stands in the lowest byte of itself plus 2^23.
__device__ __forceinline__ uint8_t byte_of(float integer) {
  return static_cast<uint8_t>(__float_as_uint(__fadd_rn(integer, 8388608.0f)) & 0xff);
}

__device__ __forceinline__ uint8_t code_of(Rounded rounded, Grid grid) {
  return byte_of(__fadd_rn(rounded.level, grid.zero));
}

__device__ __forceinline__ float round_scale(float scale, vlmq_dtype type) {
  switch (type) {
    case VLMQ_F16:
      scale = to_float(from_float<f16>(scale));
      return scale == 0.0f ? to_float(from_bits<f16>(1)) : scale;
    case VLMQ_BF16:
      scale = to_float(from_float<bf16>(scale));
      return scale == 0.0f ? to_float(from_bits<bf16>(1)) : scale;
    case VLMQ_F32:
      break;
  }
  return scale == 0.0f ? __uint_as_float(1) : scale;
}

/// Scale and zero for weights in [lo, hi], lo <= 0 <= hi; a scale that its type cannot hold is
/// infinite.
__device__ __forceinline__ Grid grid_of_range(float lo, float hi, const vlmq_grid_rule& rule) {
  const float largest = largest_code(rule.bits);
  const float middle = static_cast<float>(1 << (rule.bits - 1));
  if (lo == 0.0f && hi == 0.0f) return {1.0f, middle};
  const float range = rule.symmetric ? __fmul_rn(2.0f, fmaxf(hi, -lo)) : __fsub_rn(hi, lo);
  const float scale = round_scale(__fdiv_rn(range, largest), rule.scale_type);
  if (rule.symmetric) return {scale, middle};
  const float zero = rintf(__fdiv_rn(-lo, scale));
  return {scale, fminf(fmaxf(zero, static_cast<float>(rule.smallest_zero)), largest)};
}

/// |x|^2.4 = a a^(1/5) with a = x^2, within 1e-6 relative. z = a^(-1/5) comes from Newton's
/// z (6 - a z^5) / 5; its start, linear in the bits of a, is within 3.3 %, and three steps square
/// that error away.
__device__ __forceinline__ float power(float x) {
  const float a = __fmul_rn(x, x);
  const float start = __fsub_rn(1277920000.0f, __fmul_rn(0.2f, __int2float_rn(__float_as_int(a))));
  float z = __int_as_float(__float2int_rz(start));
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const float z2 = __fmul_rn(z, z);
    const float az5 = __fmul_rn(__fmul_rn(__fmul_rn(a, z2), z2), z);
    z = __fmul_rn(z, __fsub_rn(1.2f, __fmul_rn(0.2f, az5)));
  }
  const float z2 = __fmul_rn(z, z);
  return __fmul_rn(a, __fmul_rn(__fmul_rn(a, z2), z2));
}

/// Candidate k of the range search.
__device__ __forceinline__ Grid shrunken_grid(float lo, float hi, int k,
                                              const vlmq_grid_rule& rule) {
  const float shrink = __fsub_rn(1.0f, __fdiv_rn(__int2float_rn(k), 100.0f));
  return grid_of_range(__fmul_rn(lo, shrink), __fmul_rn(hi, shrink), rule);
}

/// Range of a group and 0.
struct Range {
  float lo, hi;

  /// What errors are measured in: powers of tiny weights would underflow.
  __device__ float unit() const { return __fdiv_rn(1.0f, fmaxf(fmaxf(hi, -lo), 1.17549435e-38f)); }
};

/// The range of `count` weights, found by kLanes neighbouring lanes together; all lanes of the warp
/// must come. `weights(i)` may be called for any i by any of the row's lanes.
template <int kLanes, class Weights>
__device__ __forceinline__ Range range_of_group(const Weights& weights, int count) {
  static_assert(kLanes <= 32 && 32 % kLanes == 0, "a row's lanes lie in one warp");
  constexpr unsigned kWarp = 0xffffffffu;
  float lo = 0.0f, hi = 0.0f;
  for (int i = static_cast<int>(threadIdx.x) % kLanes; i < count; i += kLanes) {
    const float w = weights(i);
    lo = fminf(lo, w);
    hi = fmaxf(hi, w);
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    lo = fminf(lo, __shfl_xor_sync(kWarp, lo, distance));
    hi = fmaxf(hi, __shfl_xor_sync(kWarp, hi, distance));
  }
  return {lo, hi};
}

/// The least of kLanes neighbouring lanes' losses, and of equals the smallest candidate.
template <int kLanes, class Loss>
__device__ __forceinline__ void least_of_lanes(Loss& least, int& best) {
  constexpr unsigned kWarp = 0xffffffffu;
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const Loss other = __shfl_xor_sync(kWarp, least, distance);
    const int k = __shfl_xor_sync(kWarp, best, distance);
    if (other < least || (other == least && k < best)) {
      least = other;
      best = k;
    }
  }
}

/// The shrunken range of the least sum |w - q|^2.4.
template <int kLanes, class Weights>
__device__ __forceinline__ Grid grid_of_least_power(Range range, const Weights& weights, int count,
                                                    const vlmq_grid_rule& rule) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const float lo = range.lo, hi = range.hi, unit = range.unit();
  // Each lane tries candidates of its own, from the first weight to the last: a sum that lanes
  // shared would round otherwise than the CPU's, and choose otherwise among candidates that are
  // nearly alike.
  const float largest = largest_code(rule.bits);
  double least = __int_as_float(0x7f800000);  // infinity
  int best = 0;
  for (int k = lane; k < kSteps; k += kLanes) {
    const Grid grid = shrunken_grid(lo, hi, k, rule);
    double loss = 0.0;
    for (int i = 0; i < count; ++i) {
      const float w = weights(i);
      const float error = __fsub_rn(w, round_to_grid(w, grid, largest).value);
      loss = __dadd_rn(loss, static_cast<double>(power(__fmul_rn(error, unit))));
    }
    if (loss < least) {
      least = loss;
      best = k;
    }
  }
  least_of_lanes<kLanes>(least, best);  // of equals the widest range
  return shrunken_grid(lo, hi, best, rule);
}

/// The grid of a group by its weights alone, see range_of_group.
template <int kLanes, class Weights>
__device__ __forceinline__ Grid grid_of_group(const Weights& weights, int count,
                                              const vlmq_grid_rule& rule) {
  const Range range = range_of_group<kLanes>(weights, count);
  switch (rule.grid) {
    case VLMQ_MINMAX:
      return grid_of_range(range.lo, range.hi, rule);
    case VLMQ_MSE:
      return grid_of_least_power<kLanes>(range, weights, count, rule);
    case VLMQ_LOSS:
      break;  // hangs on more than the weights, see loss.cuh
  }
  return {__int_as_float(0x7f800000), 0.0f};  // check_scale tells of it
}

/// Tells the host of the first row whose scale does not fit.
__device__ __forceinline__ void check_scale(float scale, long long row, int32_t* status) {
  if (!(fabsf(scale) < __int_as_float(0x7f800000))) atomicMin(status, static_cast<int>(row));
}

inline bool is_grid(const vlmq_grid& grid) {
  const int number = number_in(grid);
  return number == VLMQ_MINMAX || number == VLMQ_MSE || number == VLMQ_LOSS;
}

inline bool valid_rule(const vlmq_grid_rule& rule) {
  return valid_bits(rule.bits) && is_grid(rule.grid) && is_dtype(rule.scale_type) &&
         rule.smallest_zero >= 0 && rule.smallest_zero < 1 << rule.bits;
}

}  // namespace vlmq
