// Accesses that must not be: beyond the end, off their alignment, before anything was written.
// Launchers as in barriers.cu.

#include "device/launch.cuh"
#include "device/limits.cuh"
#include "device/types.cuh"

namespace {

constexpr int kThreads = 128;

__device__ float* shared_floats() { return reinterpret_cast<float*>(vlmq::dynamic_shared()); }

__global__ void global_read_beyond(int defect, const float* input, float* output) {
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  const float value = input[base + kThreads - 1 - t + (defect != 0 && t == 0 ? 1 : 0)];
  output[base + t] = defect != 0 && t == 0 ? 0.0f : value;
}

__global__ void global_write_beyond(int defect, const float* input, float* output) {
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  output[base + t] = input[base + kThreads - 1 - t];
  if (defect != 0 && t == kThreads - 1) output[base + t + 1] = 0.0f;
}

__global__ void shared_beyond(int defect, const float* input, float* output) {
  float* s = shared_floats();
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  s[t] = input[base + t];
  __syncthreads();
  output[base + t] = s[kThreads - 1 - t];
  if (defect != 0 && t == 0) output[base] = s[kThreads];
}

// 16 bytes at a multiple of 4.
__global__ void misaligned_vector(int defect, const float* input, float* output) {
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  if (t >= kThreads / 4) return;
  const unsigned shift = defect != 0 && t == 7 ? 1 : 0;
  const float4 value = vlmq::load_vector<float4>(input + base + kThreads - 4 - 4 * t - shift);
  vlmq::store_vector(output + base + 4 * t, make_float4(value.w, value.z, value.y, value.x));
}

// The same with a plain cast, which the undefined-behaviour sanitizer sees.
__global__ void misaligned_cast(int defect, const float* input, float* output) {
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  if (t >= kThreads / 4) return;
  const unsigned shift = defect != 0 && t == 7 ? 1 : 0;
  const float* from = input + base + kThreads - 4 - 4 * t - shift;
  const float4 value = *reinterpret_cast<const float4*>(from);
  vlmq::store_vector(output + base + 4 * t, make_float4(value.w, value.z, value.y, value.x));
}

// One place that no thread fills.
__global__ void uninitialised_shared(int defect, const float* input, float* output) {
  float* s = shared_floats();
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  if (defect == 0 || t != 40) s[t] = input[base + t];
  __syncthreads();
  output[base + t] = s[kThreads - 1 - t];
}

__global__ void undefined_shift(int defect, const float* input, float* output) {
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  const unsigned width = defect != 0 ? 32 : 7;
  output[base + t] = input[base + (1u << width) % kThreads + kThreads - 1 - t - (defect != 0)];
}

// A block that asks for all there is, and for a byte more.
__global__ void shared_beyond_the_limit(int, const float* input, float* output) {
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  output[base + t] = input[base + kThreads - 1 - t];
}

}  // namespace

#define VLMQ_PLANTED(kernel)                                                                  \
  extern "C" vlmq_status planted_##kernel(int defect, const float* input, float* output,      \
                                          int count) {                                        \
    return VLMQ_LAUNCH(kernel, count / kThreads, kThreads, kThreads * sizeof(float), nullptr, \
                       defect, input, output);                                                \
  }

VLMQ_PLANTED(global_read_beyond)
VLMQ_PLANTED(global_write_beyond)
VLMQ_PLANTED(shared_beyond)
VLMQ_PLANTED(misaligned_vector)
VLMQ_PLANTED(misaligned_cast)
VLMQ_PLANTED(uninitialised_shared)
VLMQ_PLANTED(undefined_shift)

extern "C" vlmq_status planted_shared_beyond_the_limit(int defect, const float* input,
                                                       float* output, int count) {
  const size_t bytes = vlmq::shared_bytes_of_a_block() + (defect != 0 ? 1 : 0);
  return VLMQ_LAUNCH(shared_beyond_the_limit, count / kThreads, kThreads, bytes, nullptr, defect,
                     input, output);
}
