// Passes over an upper triangle: a block of threads per row.
#include "factor/upper.cuh"

#include "device/arguments.cuh"
#include "device/types.cuh"

namespace vlmq::factor {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float scaled(const ScalingJob& job, int64_t row, int64_t col,
                                        float value) {
  if (col < row) return 0.0f;
  switch (job.how) {
    case Scaling::kRoot:
      return col == row ? 1.0f : __fmul_rn(value, __fdiv_rn(1.0f, job.diagonal[col]));
    case Scaling::kCross: {
      const float d = job.diagonal[col];
      return col == row ? 0.0f : __fmul_rn(value, __fdiv_rn(job.alpha, __fmul_rn(d, d)));
    }
    case Scaling::kInverse:
      break;
  }
  return __fdiv_rn(value, job.diagonal[row]);
}

__global__ void __launch_bounds__(kThreads) scaling_kernel(ScalingJob job) {
  if (job.status != nullptr && *job.status >= 0) return;
  const int64_t row = blockIdx.x;
  float* x = job.x + row * job.n;
  // What lies below the diagonal is not read: it may be anything.
  if (has_aligned_rows(job.x, job.n)) {
    for (int64_t col = threadIdx.x * 4; col < job.n; col += kThreads * 4) {
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (col + 3 >= row) {
        v = load_vector<float4>(x + col);
        v.x = scaled(job, row, col, v.x);
        v.y = scaled(job, row, col + 1, v.y);
        v.z = scaled(job, row, col + 2, v.z);
        v.w = scaled(job, row, col + 3, v.w);
      }
      store_vector(x + col, v);
    }
  } else {
    for (int64_t col = threadIdx.x; col < job.n; col += kThreads) {
      x[col] = col < row ? 0.0f : scaled(job, row, col, x[col]);
    }
  }
}

__global__ void __launch_bounds__(VLMQ_BLOCK) clear_below_kernel(float* x, int64_t n) {
  const int64_t row = blockIdx.x, col = row - 1 - threadIdx.x;
  if (col >= 0 && threadIdx.x < VLMQ_BLOCK - 1) x[row * n + col] = 0.0f;
}

}  // namespace

vlmq_status enqueue_scaling(const ScalingJob& job, vlmq_stream stream) {
  if (job.n == 0) return VLMQ_OK;
  return VLMQ_LAUNCH(scaling_kernel, dim3(static_cast<unsigned>(job.n)), dim3(kThreads), 0, stream,
                     job);
}

vlmq_status enqueue_clear_below(float* x, int64_t n, vlmq_stream stream) {
  if (n == 0) return VLMQ_OK;
  return VLMQ_LAUNCH(clear_below_kernel, dim3(static_cast<unsigned>(n)), dim3(VLMQ_BLOCK), 0,
                     stream, x, n);
}

}  // namespace vlmq::factor
