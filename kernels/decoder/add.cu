// Sums and differences of activations, and float32 products rounded once with their bias, a row
// that is repeated.

#include "decoder/vectors.cuh"

namespace vlmq {
namespace {

constexpr int kThreads = 256;

/// `repeated`: b is one row.
template <int W, class A, class T>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const A* a, const T* b, T* out, int64_t rows, int64_t cols, bool repeated,
               float sign, float factor) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x * W;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const int64_t start = row * cols;
    const T* other = repeated ? b : b + start;
    for (int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * W; i < cols; i += step) {
      float values[W], others[W];
      load_first<W>(a + start + i, cols - i, values);
      load_first<W>(other + i, cols - i, others);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        values[j] = __fmul_rn(factor, __fmaf_rn(sign, others[j], values[j]));
      }
      store_first<W>(out + start + i, cols - i, values);
    }
  }
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_add, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->rows < 0 || args->cols < 0 ||
      (args->b_rows != args->rows && args->b_rows != 1) || !is_dtype(args->dtype))
    return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->cols == 0) return VLMQ_OK;
  if (args->a == nullptr || args->b == nullptr || args->out == nullptr) return VLMQ_BAD_ARGUMENT;
  const bool repeated = args->b_rows != args->rows;
  // Without a repeated row the matrices are one long row, whatever their shape.
  const int64_t rows = repeated ? args->rows : 1;
  const int64_t cols = repeated ? args->cols : args->rows * args->cols;
  const auto add = [&](auto a_tag, auto tag) {
    using A = decltype(a_tag);
    using T = decltype(tag);
    const bool wide = (rows == 1 || cols % kWide == 0) && is_aligned(args->a, 16) &&
                      is_aligned(args->b, 16) && is_aligned(args->out, 16);
    const auto run = [&](auto* kernel, int width) {
      const unsigned threads = threads_of_row(ceil_div(cols, width));
      dim3 grid = blocks_of(cols, int64_t{threads} * width);
      grid.y = static_cast<unsigned>(rows < 65535 ? rows : 65535);
      return VLMQ_LAUNCH(kernel, grid, threads, 0, stream, static_cast<const A*>(args->a),
                         static_cast<const T*>(args->b), static_cast<T*>(args->out), rows, cols,
                         repeated, args->sign, args->factor);
    };
    return wide ? run(add_kernel<kWide, A, T>, kWide) : run(add_kernel<1, A, T>, 1);
  };
  return with_dtype(args->dtype, [&](auto tag) {
    return args->float_a != 0 ? add(float{}, tag) : add(tag, tag);
  });
}
