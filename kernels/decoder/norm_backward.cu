// Gradient of the RMS norm for its input, a block a row; what is summed and what is written both
// read the row, the second time from L1.

#include "decoder/vectors.cuh"
#include "device/reduce.cuh"

namespace vlmq {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(256)
    norm_backward_kernel(const T* x, const T* weight, const T* d_y, T* d_x, int64_t rows,
                         int64_t cols, float eps) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const float count = static_cast<float>(cols);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* value_row = x + row * cols;
    const T* gradient_row = d_y + row * cols;
    float square = 0.0f, product = 0.0f;
    for (int64_t col = int64_t{threadIdx.x} * W; col < cols; col += int64_t{blockDim.x} * W) {
      float values[W], weights[W], gradients[W];
      load<W>(value_row + col, values);
      load<W>(weight + col, weights);
      load<W>(gradient_row + col, gradients);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        square += values[i] * values[i];
        product += weights[i] * gradients[i] * values[i];
      }
    }
    square = block_sum(square, scratch);
    product = block_sum(product, scratch);
    const float scale = 1.0f / sqrtf(square / count + eps);
    const float along = scale * scale * (product / count);
    for (int64_t col = int64_t{threadIdx.x} * W; col < cols; col += int64_t{blockDim.x} * W) {
      float values[W], weights[W], gradients[W];
      load<W>(value_row + col, values);
      load<W>(weight + col, weights);
      load<W>(gradient_row + col, gradients);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        values[i] = scale * (weights[i] * gradients[i] - values[i] * along);
      }
      store<W>(d_x + row * cols + col, values);
    }
  }
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_norm_backward, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->rows < 0 || args->cols < 0 || !is_dtype(args->dtype))
    return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->cols == 0) return VLMQ_OK;
  if (args->x == nullptr || args->weight == nullptr || args->d_y == nullptr || args->d_x == nullptr)
    return VLMQ_BAD_ARGUMENT;
  return with_dtype(args->dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool wide = args->cols % kWide == 0 && is_aligned(args->x, 16) &&
                      is_aligned(args->weight, 16) && is_aligned(args->d_y, 16) &&
                      is_aligned(args->d_x, 16);
    const auto run = [&](auto* kernel, int width) {
      return VLMQ_LAUNCH(kernel, blocks_of(args->rows, 1), threads_of_row(args->cols / width),
                         32 * sizeof(float), stream, static_cast<const T*>(args->x),
                         static_cast<const T*>(args->weight), static_cast<const T*>(args->d_y),
                         static_cast<T*>(args->d_x), args->rows, args->cols, args->eps);
    };
    return wide ? run(norm_backward_kernel<kWide, T>, kWide) : run(norm_backward_kernel<1, T>, 1);
  });
}
