// The first row with a value that no statistic should take in: a block a row.

#include "decoder/vectors.cuh"

namespace vlmq {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(256)
    first_non_finite_row_kernel(const T* x, int* first, int64_t rows, int64_t cols) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    bool finite = true;
    for (int64_t col = int64_t{threadIdx.x} * W; col < cols; col += int64_t{blockDim.x} * W) {
      float values[W];
      load<W>(x + row * cols + col, values);
#pragma unroll
      for (int i = 0; i < W; ++i) finite = finite && fabsf(values[i]) <= 3.402823466e38f;
    }
    // A minimum of integers is the same in any order.
    if (__any_sync(0xffffffffu, !finite) && threadIdx.x % 32 == 0) {
      atomicMin(first, static_cast<int>(row));
    }
  }
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_first_non_finite_row, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->rows < 0 || args->rows > INT32_MAX || args->cols < 0 ||
      !is_dtype(args->dtype))
    return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->cols == 0) return VLMQ_OK;
  if (args->x == nullptr || args->row == nullptr) return VLMQ_BAD_ARGUMENT;
  return with_dtype(args->dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool wide = args->cols % kWide == 0 && is_aligned(args->x, 16);
    const auto run = [&](auto* kernel, int width) {
      return VLMQ_LAUNCH(kernel, blocks_of(args->rows, 1), threads_of_row(args->cols / width), 0,
                         stream, static_cast<const T*>(args->x), args->row, args->rows, args->cols);
    };
    return wide ? run(first_non_finite_row_kernel<kWide, T>, kWide)
                : run(first_non_finite_row_kernel<1, T>, 1);
  });
}
