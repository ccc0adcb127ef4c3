// Rotary embedding in place: a block a token, a thread some pairs of a head.

#include "decoder/vectors.cuh"

namespace vlmq {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(256)
    rotate_kernel(T* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int half,
                  float direction) {
  const int64_t pieces = half / W;
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    T* row = x + token * heads * 2 * half;
    for (int64_t item = threadIdx.x; item < heads * pieces; item += blockDim.x) {
      const int64_t head = item / pieces, pair = item % pieces * W;
      T* low = row + head * 2 * half + pair;
      float a[W], b[W], c[W], s[W];
      load<W>(low, a);
      load<W>(low + half, b);
      load<W>(cos + token * half + pair, c);
      load<W>(sin + token * half + pair, s);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float first = a[i], turn = direction * s[i];
        a[i] = first * c[i] - b[i] * turn;
        b[i] = b[i] * c[i] + first * turn;
      }
      store<W>(low, a);
      store<W>(low + half, b);
    }
  }
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_rotate, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->tokens < 0 || args->heads < 0 || args->head_dim < 0 ||
      args->head_dim % 2 != 0 || args->head_dim > INT32_MAX || !is_dtype(args->dtype))
    return VLMQ_BAD_ARGUMENT;
  if (args->tokens == 0 || args->heads == 0 || args->head_dim == 0) return VLMQ_OK;
  if (args->x == nullptr || args->cos == nullptr || args->sin == nullptr) return VLMQ_BAD_ARGUMENT;
  const int half = static_cast<int>(args->head_dim / 2);
  return with_dtype(args->dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool wide = half % kWide == 0 && is_aligned(args->x, 16) && is_aligned(args->cos, 16) &&
                      is_aligned(args->sin, 16);
    const auto run = [&](auto* kernel, int width) {
      return VLMQ_LAUNCH(kernel, blocks_of(args->tokens, 1),
                         threads_of_row(args->heads * (half / width)), 0, stream,
                         static_cast<T*>(args->x), args->cos, args->sin, args->tokens, args->heads,
                         half, args->transposed != 0 ? -1.0f : 1.0f);
    };
    return wide ? run(rotate_kernel<kWide, T>, kWide) : run(rotate_kernel<1, T>, 1);
  });
}
