// Float32 products as the steps of a factorization need them.
#pragma once

#include "device/launch.cuh"
#include "factor/product_tile.cuh"

namespace vlmq::factor {

/// c = beta * c + alpha * a * op(b) on the entries (r, c) with r <= c + diagonal.
///
/// c may be a where there is one tile of columns, and b where there is one tile of rows: a tile is
/// written when it has read all that it reads.
struct ProductJob {
  Operands of;
  float* c;
  int64_t c_stride;
  float alpha;
  float beta;
  bool transposed = false;
  /// Entries below are neither read nor written, and tiles below cost nothing.
  int64_t diagonal = INT64_MAX;
  /// Device memory, or null. Where it is not negative, nothing is done.
  const int32_t* status = nullptr;
};

/// Enqueues a job. No rows or columns: nothing.
vlmq_status enqueue_product(const ProductJob& job, vlmq_stream stream);

}  // namespace vlmq::factor
