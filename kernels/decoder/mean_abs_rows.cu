// Importance of tokens: the mean magnitude of a row.

#include "decoder/row_sums.cuh"

namespace vlmq {
namespace {

struct Magnitude {
  __device__ float operator()(float value, int64_t) const { return fabsf(value); }
  __device__ float finish(float sum, int64_t cols) const { return sum / static_cast<float>(cols); }
};

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_mean_abs_rows, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->rows < 0 || args->cols < 0 || !is_dtype(args->dtype))
    return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->cols == 0) return VLMQ_OK;
  if (args->x == nullptr || args->means == nullptr) return VLMQ_BAD_ARGUMENT;
  return row_sums(args->x, args->dtype, Magnitude{}, args->means, args->rows, args->cols, stream);
}
