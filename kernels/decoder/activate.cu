// Nonlinearities, alone or gating another operand.

#include "decoder/vectors.cuh"

namespace vlmq {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float activated(float x, vlmq_activation activation) {
  switch (activation) {
    case VLMQ_SILU:
      return x / (1.0f + expf(-x));
    case VLMQ_QUICK_GELU:
      return x / (1.0f + expf(-1.702f * x));
    case VLMQ_GELU:
      // As 1 + erf a value near x = -4 would keep three digits.
      return 0.5f * x * erfcf(x * -0.70710678f);  // 1 / sqrt(2)
    case VLMQ_GELU_TANH:
      // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), without the cancellation.
      return x / (1.0f + expf(-1.5957691f * (x + 0.044715f * x * x * x)));  // 2 sqrt(2 / pi)
  }
  return x;
}

template <int W, class T>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(const T* x, const T* up, T* y, int64_t count, vlmq_activation activation) {
  const int64_t step = int64_t{gridDim.x} * kThreads * W;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * W; i < count; i += step) {
    float values[W], factors[W] = {};
    load_first<W>(x + i, count - i, values);
    if (up != nullptr) load_first<W>(up + i, count - i, factors);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      values[j] = activated(values[j], activation);
      if (up != nullptr) values[j] *= factors[j];
    }
    store_first<W>(y + i, count - i, values);
  }
}

bool is_activation(const vlmq_activation& activation) {
  const int number = number_in(activation);
  return number == VLMQ_SILU || number == VLMQ_GELU || number == VLMQ_GELU_TANH ||
         number == VLMQ_QUICK_GELU;
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_activate, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->count < 0 || !is_activation(args->activation) ||
      !is_dtype(args->dtype))
    return VLMQ_BAD_ARGUMENT;
  if (args->count == 0) return VLMQ_OK;
  if (args->x == nullptr || args->y == nullptr) return VLMQ_BAD_ARGUMENT;
  return with_dtype(args->dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool wide =
        is_aligned(args->x, 16) && is_aligned(args->up, 16) && is_aligned(args->y, 16);
    const auto run = [&](auto* kernel, int width) {
      return VLMQ_LAUNCH(kernel, blocks_of(args->count, kThreads * width), kThreads, 0, stream,
                         static_cast<const T*>(args->x), static_cast<const T*>(args->up),
                         static_cast<T*>(args->y), args->count, args->activation);
    };
    return wide ? run(activate_kernel<kWide, T>, kWide) : run(activate_kernel<1, T>, 1);
  });
}
