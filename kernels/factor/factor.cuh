// The factorization H = R R^T in steps, for the calls that build on it.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "vlmq.h"

namespace vlmq::factor {

/// Consecutive blocks of 0..n, each at most VLMQ_BLOCK wide.
struct Blocks {
  const int32_t* ends;  // host memory, or null: all VLMQ_BLOCK wide but the last
  int64_t count;
  int64_t n;

  int64_t start(int64_t i) const { return i == 0 ? 0 : end(i - 1); }
  int64_t end(int64_t i) const {
    if (ends != nullptr) return ends[i];
    return i + 1 == count ? n : (i + 1) * VLMQ_BLOCK;
  }
  int64_t width(int64_t i) const { return end(i) - start(i); }

  /// First of the blocks that end with block `last` and are updated together: at most kSpan
  /// columns. c is then read and written n / kSpan times instead of n / VLMQ_BLOCK times, and most
  /// of the work is in products with an inner dimension long enough to hide the tile's start and
  /// end.
  int64_t span_first(int64_t last) const {
    int64_t first = last;
    while (first > 0 && end(last) - start(first - 1) <= kSpan) --first;
    return first;
  }

  static constexpr int64_t kSpan = 512;
};

/// Blocks of VLMQ_BLOCK columns.
inline Blocks uniform_blocks(int64_t n) { return {nullptr, ceil_div(n, VLMQ_BLOCK), n}; }

/// Whether blocks given by a caller are what the header asks for.
bool are_valid(const Blocks& blocks);

/// Bytes of `finish`.
constexpr size_t kFinishBytes = size_t{VLMQ_BLOCK} * VLMQ_BLOCK * sizeof(float);

struct FactorJob {
  float* h;         // [n, n]: H by its upper triangle in; root, zeros below the diagonal, out
  float* inverses;  // [n, VLMQ_BLOCK] out
  float* diagonal;  // [n] out
  float* finish;    // kFinishBytes of work space
  int32_t* status;  // out
  Blocks blocks;
};

/// Enqueues the whole factorization.
vlmq_status enqueue_factor(const FactorJob& job, vlmq_stream stream);

}  // namespace vlmq::factor
