// Passes over an upper triangle.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "vlmq.h"

namespace vlmq::factor {

/// What becomes of x[i, j], with d the diagonal of R. Below the diagonal: zero.
enum class Scaling {
  kRoot,     // x / d[j], 1 on the diagonal
  kCross,    // alpha * x / d[j]^2, 0 on the diagonal
  kInverse,  // x / d[i], also on the diagonal
};

struct ScalingJob {
  float* x;  // [n, n]
  const float* diagonal;
  int64_t n;
  Scaling how;
  float alpha;            // of kCross
  const int32_t* status;  // where not negative, nothing is done; or null
};

vlmq_status enqueue_scaling(const ScalingJob& job, vlmq_stream stream);

/// Zeros x[i, j] for i - VLMQ_BLOCK < j < i: all that lies below the diagonal in the diagonal
/// blocks.
vlmq_status enqueue_clear_below(float* x, int64_t n, vlmq_stream stream);

}  // namespace vlmq::factor
