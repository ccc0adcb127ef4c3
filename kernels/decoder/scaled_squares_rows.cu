// What a token weighs in the statistics: its row's squares, each channel in its own unit.

#include "decoder/row_sums.cuh"

namespace vlmq {
namespace {

struct ScaledSquare {
  const float* scales;
  __device__ float operator()(float value, int64_t col) const {
    const float scaled = value * scales[col];
    return scaled * scaled;
  }
  __device__ float finish(float sum, int64_t) const { return sum; }
};

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_scaled_squares_rows, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->rows < 0 || args->cols < 0 || !is_dtype(args->dtype))
    return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->cols == 0) return VLMQ_OK;
  if (args->x == nullptr || args->scales == nullptr || args->sums == nullptr)
    return VLMQ_BAD_ARGUMENT;
  return row_sums(args->x, args->dtype, ScaledSquare{args->scales}, args->sums, args->rows,
                  args->cols, stream);
}
