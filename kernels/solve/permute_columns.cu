// Columns of a weight in processing order, in float32: what the solver starts from.
#include "device/arguments.cuh"
#include "device/launch.cuh"
#include "device/types.cuh"

namespace vlmq {
namespace {

constexpr int kThreads = 256;
// Of a thread: its places in the order stay in registers while it goes down the rows.
constexpr int kColumns = 4;
// Rows that a block takes in turn: enough to pay for reading the order, few enough for blocks to be
// many.
constexpr long long kRows = 8;
constexpr long long kMostBlocks = 65535;  // along y

template <class T>
__global__ void __launch_bounds__(kThreads) permute_columns_kernel(vlmq_permute_columns_args args) {
  const long long first = static_cast<long long>(blockIdx.x) * kThreads * kColumns + threadIdx.x;
  int from[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const long long column = first + i * kThreads;
    from[i] = column < args.cols ? args.order[column] : -1;
  }
  for (long long row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const T* const x = static_cast<const T*>(args.x) + row * args.cols;
    float* const out = args.out + row * args.cols;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const long long column = first + i * kThreads;
      if (column < args.cols) out[column] = from[i] >= 0 ? to_float(x[from[i]]) : 0.0f;
    }
  }
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_permute_columns, args, stream) {
  using namespace vlmq;
  if (!args || args->rows < 0 || args->cols < 0 || args->cols > INT32_MAX) return VLMQ_BAD_ARGUMENT;
  if (!is_dtype(args->dtype)) return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->cols == 0) return VLMQ_OK;
  if (!args->x || !args->order || !args->out) return VLMQ_BAD_ARGUMENT;
  const long long down = ceil_div(static_cast<long long>(args->rows), kRows);
  const dim3 grid(
      static_cast<unsigned>(ceil_div(args->cols, static_cast<long long>(kThreads) * kColumns)),
      static_cast<unsigned>(down < kMostBlocks ? down : kMostBlocks));
  return with_dtype(args->dtype, [&](auto tag) {
    return VLMQ_LAUNCH(permute_columns_kernel<decltype(tag)>, grid, kThreads, 0, stream, *args);
  });
}
