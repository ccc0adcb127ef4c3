// What a token weighs in the statistics: its row's squares, each channel in its own unit, a block a
// row.

#include "block/vectors.cuh"
#include "device/reduce.cuh"

namespace vlmq {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(256)
    scaled_squares_rows_kernel(const T* x, const float* scales, float* sums, int64_t rows,
                               int64_t cols) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float sum = 0.0f;
    for (int64_t col = int64_t{threadIdx.x} * W; col < cols; col += int64_t{blockDim.x} * W) {
      float values[W];
      load<W>(x + row * cols + col, values);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float scaled = values[i] * scales[col + i];
        sum += scaled * scaled;
      }
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[row] = sum;
  }
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_scaled_squares_rows, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->rows < 0 || args->cols < 0 || !is_dtype(args->dtype))
    return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->cols == 0) return VLMQ_OK;
  if (args->x == nullptr || args->scales == nullptr || args->sums == nullptr)
    return VLMQ_BAD_ARGUMENT;
  return with_dtype(args->dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool wide = args->cols % kWide == 0 && is_aligned(args->x, 16);
    const auto run = [&](auto* kernel, int width) {
      return VLMQ_LAUNCH(kernel, blocks_of(args->rows, 1), threads_of_row(args->cols / width),
                         32 * sizeof(float), stream, static_cast<const T*>(args->x), args->scales,
                         args->sums, args->rows, args->cols);
    };
    return wide ? run(scaled_squares_rows_kernel<kWide, T>, kWide)
                : run(scaled_squares_rows_kernel<1, T>, 1);
  });
}
