// Rows and columns in processing order, by tiles of 32x32. Where the order turns a pair of a
// symmetric matrix around, the value stands in the other triangle: it is read along the tile's
// columns, so that neighbours in the order are neighbours in memory either way.
#include <cstdint>

#include "device/launch.cuh"

namespace vlmq::factor {
namespace {

constexpr int kSide = 32;
constexpr int kWarps = 8;
constexpr int kStride = kSide + 1;  // rows and columns of the tile without bank conflicts

__global__ void __launch_bounds__(kSide* kWarps) permute_kernel(vlmq_permute_args args) {
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  const int64_t n = args.n;
  const int64_t row0 = int64_t{blockIdx.y} * kSide, col0 = int64_t{blockIdx.x} * kSide;
  const int lane = static_cast<int>(threadIdx.x) % kSide;
  const int warp = static_cast<int>(threadIdx.x) / kSide;
  // Row i and column j of out, of the two passes: whether its value is read in this one.
  const auto read = [&](int64_t i, int64_t j, bool turned_pass) {
    if (i >= n || j >= n || i > j) return;
    const int64_t a = args.order[i], b = args.order[j];
    const bool turned = args.symmetric != 0 && a > b;
    if (turned != turned_pass) return;
    float value;
    if (i == j && args.diagonal != nullptr) {
      value = args.diagonal[a];
    } else {
      value = turned ? args.x[b * n + a] : args.x[a * n + b];
    }
    tile[(i - row0) * kStride + (j - col0)] = value;
  };
  if (col0 + kSide > row0) {
    for (int r = warp; r < kSide; r += kWarps) read(row0 + r, col0 + lane, false);
    if (args.symmetric != 0) {
      for (int r = warp; r < kSide; r += kWarps) read(row0 + lane, col0 + r, true);
    }
  }
  __syncthreads();
  const int64_t j = col0 + lane;
  for (int64_t i = row0 + warp; i < row0 + kSide && i < n; i += kWarps) {
    if (j < n) args.out[i * n + j] = i > j ? 0.0f : tile[(i - row0) * kStride + lane];
  }
}

}  // namespace
}  // namespace vlmq::factor

VLMQ_CALL(vlmq_permute, args, stream) {
  using namespace vlmq::factor;
  if (args == nullptr || args->n < 0) return VLMQ_BAD_ARGUMENT;
  if (args->n == 0) return VLMQ_OK;
  const int64_t tiles = vlmq::ceil_div(args->n, kSide);
  if (args->x == nullptr || args->order == nullptr || args->out == nullptr ||
      args->out == args->x || tiles > UINT16_MAX) {
    return VLMQ_BAD_ARGUMENT;
  }
  const auto side = static_cast<unsigned>(tiles);
  return VLMQ_LAUNCH(permute_kernel, dim3(side, side), dim3(kSide * kWarps),
                     kSide * kStride * sizeof(float), stream, *args);
}
