// Conversion between the element types.

#include "decoder/vectors.cuh"

namespace vlmq {
namespace {

constexpr int kThreads = 256;

template <int W, class From, class To>
__global__ void __launch_bounds__(kThreads) convert_kernel(const From* x, To* out, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * kThreads * W;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * W; i < count; i += step) {
    float values[W];
    load_first<W>(x + i, count - i, values);
    store_first<W>(out + i, count - i, values);
  }
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_convert, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->count < 0 || !is_dtype(args->from) || !is_dtype(args->to))
    return VLMQ_BAD_ARGUMENT;
  if (args->count == 0) return VLMQ_OK;
  if (args->x == nullptr || args->out == nullptr) return VLMQ_BAD_ARGUMENT;
  return with_dtype(args->from, [&](auto from) {
    return with_dtype(args->to, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      const auto run = [&](auto* kernel, int width) {
        return VLMQ_LAUNCH(kernel, blocks_of(args->count, kThreads * width), kThreads, 0, stream,
                           static_cast<const From*>(args->x), static_cast<To*>(args->out),
                           args->count);
      };
      return is_aligned(args->x, 16) && is_aligned(args->out, 16)
                 ? run(convert_kernel<kWide, From, To>, kWide)
                 : run(convert_kernel<1, From, To>, 1);
    });
  });
}
