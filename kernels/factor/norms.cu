// ||x||^2, and tr(x H x^T) = sum x o (2 x triu(H) - x diag(H)): partial sums a block in the work
// space, then one block adds them up. The product's tiles are never stored.
#include <cstdint>

#include "device/arguments.cuh"
#include "device/types.cuh"
#include "factor/product_tile.cuh"
#include "factor/sum.cuh"

namespace vlmq::factor {
namespace {

static_assert(kThreads == kSumThreads, "the tile's block is the sum's block");

/// Blocks of the plain norm: enough for each processor of any GPU to have several.
constexpr int64_t kMostParts = 1024;
constexpr int64_t kPerThread = 16;  // elements, at least, before there is another block

__global__ void __launch_bounds__(kSumThreads)
    square_kernel(const float* x, int64_t count, double* parts) {
  double sum = 0.0;
  const int64_t step = int64_t{gridDim.x} * kSumThreads;
  for (int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x; i < count; i += step) {
    const double value = x[i];
    sum += value * value;
  }
  sum = block_sum(sum, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

template <bool kVector>
__global__ void __launch_bounds__(kThreads, 1) weighted_kernel(Operands of, double* parts) {
  const int64_t tile_rows = ceil_div(of.rows, kTile);
  const int64_t row0 = blockIdx.x % tile_rows * kTile, col0 = blockIdx.x / tile_rows * kTile;
  const int64_t cols = of.cols;
  of.inner = min(col0 + kTile, cols);  // below the tile's last column the triangle ends
  TileSums sums;
  multiply_tile<false, kVector, true>(sums, of, row0, col0);
  double sum = 0.0;
  const auto add = [&](int64_t row, int64_t col, float product) {
    if (row >= of.rows || col >= cols) return;
    const double x = of.a[row * of.a_stride + col], h = of.b[col * of.b_stride + col];
    sum += x * (2.0 * product - x * h);
  };
  for_each_pair(row0, col0, [&](int64_t row, int64_t col, int m, int n, int i) {
    add(row, col, sums[m][n][i]);
    add(row, col + 1, sums[m][n][i + 1]);
  });
  __syncthreads();  // the tile's buffers are free
  sum = block_sum(sum, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kSumThreads)
    total_kernel(const double* parts, int64_t count, double* norm) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += parts[i];
  sum = block_sum(sum, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) *norm = sum;
}

int64_t parts_of(const vlmq_squared_norm_args& args) {
  if (args.h != nullptr) return ceil_div(args.rows, kTile) * ceil_div(args.cols, kTile);
  const int64_t wanted = ceil_div(args.rows * args.cols, kSumThreads * kPerThread);
  return wanted < kMostParts ? wanted : kMostParts;
}

/// Sizes that can be counted: then parts_of does not overflow.
bool has_sizes(const vlmq_squared_norm_args* args) {
  return args != nullptr && args->rows >= 0 && args->cols >= 0 &&
         (args->cols == 0 || args->rows <= (INT64_MAX >> 8) / args->cols);
}

}  // namespace
}  // namespace vlmq::factor

extern "C" size_t vlmq_squared_norm_workspace_bytes(const vlmq_squared_norm_args* args) {
  using namespace vlmq::factor;
  return has_sizes(args) ? static_cast<size_t>(parts_of(*args)) * sizeof(double) : 0;
}

VLMQ_CALL(vlmq_squared_norm, args, stream) {
  using namespace vlmq::factor;
  if (!has_sizes(args) || args->norm == nullptr) return VLMQ_BAD_ARGUMENT;
  // The sum of nothing is still written.
  const int64_t rows = args->rows, cols = args->cols;
  if (rows == 0 || cols == 0) return vlmq::fill_async(args->norm, 0, sizeof(double), stream);
  const int64_t parts = parts_of(*args);
  if (args->x == nullptr || args->workspace == nullptr || parts > INT32_MAX ||
      args->workspace_bytes < static_cast<size_t>(parts) * sizeof(double)) {
    return VLMQ_BAD_ARGUMENT;
  }
  double* workspace = static_cast<double*>(args->workspace);
  const dim3 grid(static_cast<unsigned>(parts));
  vlmq_status status;
  if (args->h == nullptr) {
    status = VLMQ_LAUNCH(square_kernel, grid, dim3(kSumThreads), kSumSharedBytes, stream, args->x,
                         rows * cols, workspace);
  } else {
    const Operands of = {args->x, args->h, cols, cols, rows, cols, cols};
    const bool vector =
        vlmq::has_aligned_rows(args->x, cols) && vlmq::has_aligned_rows(args->h, cols);
    auto* kernel = vector ? weighted_kernel<true> : weighted_kernel<false>;
    status = VLMQ_LAUNCH(kernel, grid, dim3(kThreads), kTileSharedBytes, stream, of, workspace);
  }
  if (status != VLMQ_OK) return status;
  return VLMQ_LAUNCH(total_kernel, dim3(1), dim3(kSumThreads), kSumSharedBytes, stream, workspace,
                     parts, args->norm);
}
