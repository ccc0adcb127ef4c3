// The grid of a group by what it does to the layer: the group's own solve with each candidate, and
// the one of least loss. Losses are sums in the order of the columns, rounded as the CPU device
// rounds them.
#pragma once

#include "solve/grid.cuh"
#include "solve/triangle.cuh"

namespace vlmq {

constexpr int kShrinks = 16;  // candidates that shrink the range
constexpr int kShifts = 8;    // and those that move the zero
constexpr int kTogether = 4;  // candidates that are solved side by side
static_assert(kShrinks % kTogether == 0 && kShifts % kTogether == 0, "batches are full");

/// Candidate k; from kShrinks on `from` is the best of those before.
__device__ __forceinline__ Grid loss_candidate(int k, Range range, Grid from,
                                               const vlmq_grid_rule& rule) {
  if (k < kShrinks) {
    const float shrink = __fsub_rn(1.0f, __fmul_rn(__int2float_rn(k), 0.046875f));
    return grid_of_range(__fmul_rn(range.lo, shrink), __fmul_rn(range.hi, shrink), rule);
  }
  const int pair = (k - kShrinks) / 2;
  const float stretch = 0.875f + 0.125f * __int2float_rn(pair);
  const float zero = __fadd_rn(from.zero, k % 2 == 0 ? -1.0f : 1.0f);
  return {round_scale(__fmul_rn(from.scale, stretch), rule.scale_type),
          fminf(fmaxf(zero, static_cast<float>(rule.smallest_zero)), largest_code(rule.bits))};
}

/// Candidates in all: a zero that is fixed does not move.
__host__ __device__ inline int loss_candidates(const vlmq_grid_rule& rule) {
  return rule.symmetric ? kShrinks : kShrinks + kShifts;
}

/// A weight's error on a candidate's grid. By the reciprocal of the scale: a quotient a weight and
/// candidate would cost more than all else.
__device__ __forceinline__ float candidate_error(float w, Grid grid, float reciprocal,
                                                 float largest) {
  const float level = level_of(__fmul_rn(w, reciprocal), grid.zero, largest);
  return __fsub_rn(w, __fmul_rn(grid.scale, level));
}

/// loss + (error unit)^2 weight.
__device__ __forceinline__ float add_loss(float loss, float error, float unit, float weight) {
  const float e = __fmul_rn(error, unit);
  return __fadd_rn(loss, __fmul_rn(__fmul_rn(e, e), weight));
}

/// Adds to `losses` those of the columns `begin` to `end` of a block, each candidate's errors
/// carried on among them. All lanes of a row come to the same. `weights(c)` are the row's columns
/// c to c + 3 before the first is quantized, `diagonal[c]` R's; `inverse(panel, i, c)` and
/// `products(panel, i, c)` the columns c to c + 3 of row i, which lies in `panel`, of the block's
/// triangles.
template <int kLanes, bool kCross, class Weights, class Inverse, class Products>
__device__ __forceinline__ void add_losses(const Weights& weights, const Inverse& inverse,
                                           const Products& products, const float* diagonal,
                                           int begin, int end, float unit, float largest,
                                           const Grid (&grids)[kTogether],
                                           float (&losses)[kTogether]) {
  constexpr unsigned kWarp = 0xffffffffu;
  constexpr int kPanel = Shape<kLanes>::kPanel, kPanels = Shape<kLanes>::kPanels;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int first = begin / kPanel, last = (end - 1) / kPanel;
  float reciprocals[kTogether];
#pragma unroll
  for (int c = 0; c < kTogether; ++c) reciprocals[c] = __fdiv_rn(1.0f, grids[c].scale);
  // Registers are named from the current panel on.
  float4 x[kTogether][kPanels];
#pragma unroll
  for (int j = 0; j < kPanels; ++j) {
    const float4 w = first + j <= last ? weights((first + j) * kPanel + 4 * lane)
                                       : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int c = 0; c < kTogether; ++c) x[c][j] = w;
  }
  for (int panel = first; panel <= last; ++panel) {
    const int here = panel * kPanel + 4 * lane;
    for (int owner = 0; owner < kLanes; ++owner) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = panel * kPanel + 4 * owner + e;
        if (i < begin || i >= end) continue;  // of a neighbouring group
        const float d = diagonal[i], weight = __fmul_rn(d, d);
        float column[kTogether], error[kTogether];
#pragma unroll
        for (int c = 0; c < kTogether; ++c) {
          column[c] = __shfl_sync(kWarp, element(x[c][0], e), owner, kLanes);
          error[c] = candidate_error(column[c], grids[c], reciprocals[c], largest);
          losses[c] = add_loss(losses[c], error[c], unit, weight);
        }
#pragma unroll
        for (int j = 0; j < kPanels; ++j) {
          if (panel + j > last) continue;
          const float4 u = inverse(panel, i, here + j * kPanel);
          const float4 p = kCross ? products(panel, i, here + j * kPanel) : u;
#pragma unroll
          for (int c = 0; c < kTogether; ++c) {
            subtract(x[c][j], error[c], u);
            if (kCross) subtract(x[c][j], -column[c], p);
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kTogether; ++c) {
#pragma unroll
      for (int j = 0; j + 1 < kPanels; ++j) x[c][j] = x[c][j + 1];
    }
  }
}

/// The least loss so far, and whose it is; the first of equals.
struct Least {
  float loss;
  Grid grid;

  __device__ void take(float other, Grid of) {
    if (other < loss) {
      loss = other;
      grid = of;
    }
  }
};

/// Before any candidate: the full range. Weights that the storage type cannot hold are an error,
/// not clipped until it can.
__device__ __forceinline__ Least least_before(Range range, const vlmq_grid_rule& rule) {
  const float infinity = __int_as_float(0x7f800000);
  const Grid full = grid_of_range(range.lo, range.hi, rule);
  return {fabsf(full.scale) < infinity ? infinity : -infinity, full};
}

/// The grid of the columns `begin` to `end` of a block, see add_losses.
template <int kLanes, bool kCross, class Weights, class Inverse, class Products>
__device__ __forceinline__ Grid grid_of_least_loss(Range range, const Weights& weights,
                                                   const Inverse& inverse, const Products& products,
                                                   const float* diagonal, int begin, int end,
                                                   const vlmq_grid_rule& rule) {
  Least least = least_before(range, rule);
  Grid from = least.grid;
  const int candidates = loss_candidates(rule);
  for (int k = 0; k < candidates; k += kTogether) {
    if (k == kShrinks) from = least.grid;
    Grid grids[kTogether];
    float losses[kTogether];
#pragma unroll
    for (int c = 0; c < kTogether; ++c) {
      grids[c] = loss_candidate(k + c, range, from, rule);
      losses[c] = 0.0f;
    }
    add_losses<kLanes, kCross>(weights, inverse, products, diagonal, begin, end, range.unit(),
                               largest_code(rule.bits), grids, losses);
#pragma unroll
    for (int c = 0; c < kTogether; ++c) least.take(losses[c], grids[c]);
  }
  return least.grid;
}

/// The same without statistics, by kLanes neighbouring lanes together, see range_of_group: the loss
/// is the sum of squared errors, and each lane tries candidates of its own.
template <int kLanes, class Weights>
__device__ __forceinline__ Grid grid_of_least_squares(const Weights& weights, int count,
                                                      const vlmq_grid_rule& rule) {
  const Range range = range_of_group<kLanes>(weights, count);
  const float unit = range.unit(), largest = largest_code(rule.bits);
  Least least = least_before(range, rule);
  Grid from = least.grid;
  const int candidates = loss_candidates(rule);
  for (int start = 0; start < candidates; start += kShrinks) {
    const int end = start + kShrinks < candidates ? start + kShrinks : candidates;
    float mine = __int_as_float(0x7f800000);
    int best = end;
    for (int k = start + static_cast<int>(threadIdx.x) % kLanes; k < end; k += kLanes) {
      const Grid grid = loss_candidate(k, range, from, rule);
      const float reciprocal = __fdiv_rn(1.0f, grid.scale);
      float loss = 0.0f;
      for (int i = 0; i < count; ++i) {
        loss = add_loss(loss, candidate_error(weights(i), grid, reciprocal, largest), unit, 1.0f);
      }
      if (loss < mine) {
        mine = loss;
        best = k;
      }
    }
    least_of_lanes<kLanes>(mine, best);
    if (best < end) least.take(mine, loss_candidate(best, range, from, rule));
    from = least.grid;
  }
  return least.grid;
}

}  // namespace vlmq
