// RMS and layer norm: a block a row. The row is read again for each pass: it comes from L1, which
// holds the longest row in use (29568 16-bit elements, 58 KiB).

#include "decoder/vectors.cuh"
#include "device/reduce.cuh"

namespace vlmq {
namespace {

/// Sum over the row of f(element), given to every thread.
template <int W, class T, class F>
__device__ __forceinline__ float row_sum(const T* x, int64_t cols, float* scratch, F f) {
  float sum = 0.0f;
  for (int64_t col = int64_t{threadIdx.x} * W; col < cols; col += int64_t{blockDim.x} * W) {
    float values[W];
    load<W>(x + col, values);
#pragma unroll
    for (int i = 0; i < W; ++i) sum += f(values[i]);
  }
  return block_sum(sum, scratch);
}

template <int W, class T>
__global__ void __launch_bounds__(256) norm_kernel(const T* x, const T* weight, const T* bias, T* y,
                                                   int64_t rows, int64_t cols, float eps) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const float count = static_cast<float>(cols);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* from = x + row * cols;
    T* to = y + row * cols;
    // The variance is summed around the mean: sum(x^2) - mean^2 would cancel where the mean is
    // large.
    const float mean = bias == nullptr ? 0.0f : row_sum<W>(from, cols, scratch, [](float value) {
                                                  return value;
                                                }) / count;
    const float variance =
        row_sum<W>(from, cols, scratch,
                   [mean](float value) { return (value - mean) * (value - mean); }) /
        count;
    const float scale = 1.0f / sqrtf(variance + eps);
    for (int64_t col = int64_t{threadIdx.x} * W; col < cols; col += int64_t{blockDim.x} * W) {
      float values[W], weights[W], biases[W] = {};
      load<W>(from + col, values);
      load<W>(weight + col, weights);
      if (bias != nullptr) load<W>(bias + col, biases);
#pragma unroll
      for (int i = 0; i < W; ++i) values[i] = (values[i] - mean) * scale * weights[i] + biases[i];
      store<W>(to + col, values);
    }
  }
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_norm, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->rows < 0 || args->cols < 0 || !is_dtype(args->dtype))
    return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->cols == 0) return VLMQ_OK;
  if (args->x == nullptr || args->weight == nullptr || args->y == nullptr) return VLMQ_BAD_ARGUMENT;
  return with_dtype(args->dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool wide = args->cols % kWide == 0 && is_aligned(args->x, 16) &&
                      is_aligned(args->weight, 16) && is_aligned(args->bias, 16) &&
                      is_aligned(args->y, 16);
    const auto run = [&](auto* kernel, int width) {
      return VLMQ_LAUNCH(kernel, blocks_of(args->rows, 1), threads_of_row(args->cols / width),
                         32 * sizeof(float), stream, static_cast<const T*>(args->x),
                         static_cast<const T*>(args->weight), static_cast<const T*>(args->bias),
                         static_cast<T*>(args->y), args->rows, args->cols, args->eps);
    };
    return wide ? run(norm_kernel<kWide, T>, kWide) : run(norm_kernel<1, T>, 1);
  });
}
