// One number a row, a block a row: the sum of a term of each element.
#pragma once

#include "decoder/vectors.cuh"
#include "device/reduce.cuh"

namespace vlmq {

/// `out[row]` = term.finish(sum of term(x[row, col], col), cols).
template <int W, class T, class Term>
__global__ void __launch_bounds__(256)
    row_sums_kernel(const T* x, Term term, float* out, int64_t rows, int64_t cols) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float sum = 0.0f;
    for (int64_t col = int64_t{threadIdx.x} * W; col < cols; col += int64_t{blockDim.x} * W) {
      float values[W];
      load<W>(x + row * cols + col, values);
#pragma unroll
      for (int i = 0; i < W; ++i) sum += term(values[i], col + i);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) out[row] = term.finish(sum, cols);
  }
}

/// Launches it; `x` `[rows, cols]` of a type that the caller has checked, neither number 0.
template <class Term>
vlmq_status row_sums(const void* x, vlmq_dtype dtype, Term term, float* out, int64_t rows,
                     int64_t cols, vlmq_stream stream) {
  return with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool wide = cols % kWide == 0 && is_aligned(x, 16);
    const auto run = [&](auto* kernel, int width) {
      return VLMQ_LAUNCH(kernel, blocks_of(rows, 1), threads_of_row(cols / width),
                         32 * sizeof(float), stream, static_cast<const T*>(x), term, out, rows,
                         cols);
    };
    return wide ? run(row_sums_kernel<kWide, T, Term>, kWide) : run(row_sums_kernel<1, T, Term>, 1);
  });
}

}  // namespace vlmq
