// Defects of barriers. Every launcher of this folder reverses each 128 of `count` numbers, defect 0
// meaning none: output[128 b + t] = input[128 b + 127 - t].

#include "device/launch.cuh"
#include "device/ptx.cuh"

namespace {

constexpr int kThreads = 128;

__device__ float* shared_floats() { return reinterpret_cast<float*>(vlmq::dynamic_shared()); }

__global__ void missing_barrier(int defect, const float* input, float* output) {
  float* s = shared_floats();
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  s[t] = input[base + t];
  if (defect == 0) __syncthreads();
  output[base + t] = s[kThreads - 1 - t];
}

// Each round overwrites what slow threads of the round before may still have to read.
__global__ void missing_trailing_barrier(int defect, const float* input, float* output) {
  float* s = shared_floats();
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  float value = 0;
  for (int round = 0; round < 4; ++round) {
    s[t] = input[base + t] + static_cast<float>(round);
    __syncthreads();
    value += s[kThreads - 1 - t] - static_cast<float>(round);
    if (defect == 0) __syncthreads();
  }
  output[base + t] = value / 4;
}

__global__ void divergent_barrier(int defect, const float* input, float* output) {
  float* s = shared_floats();
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  s[t] = input[base + t];
  if (defect != 0 && t < 32) {
    __syncthreads();
    s[t] += 0.0f;
  } else {
    __syncthreads();
  }
  output[base + t] = s[kThreads - 1 - t];
}

__global__ void exit_before_barrier(int defect, const float* input, float* output) {
  float* s = shared_floats();
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  s[t] = input[base + t];
  if (defect != 0 && t == 5) return;
  __syncthreads();
  output[base + t] = s[kThreads - 1 - t];
}

// Two warps for each pair; asking for one warp more waits for ever.
__global__ void named_barrier_count(int defect, const float* input, float* output) {
  float* s = shared_floats();
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  s[t] = input[base + t];
  const int id = 1 + (t / 32 == 0 || t / 32 == 3);
  vlmq::bar_sync(id, defect == 0 ? 64 : 96);
  output[base + t] = s[kThreads - 1 - t];
}

}  // namespace

#define VLMQ_PLANTED(kernel)                                                                  \
  extern "C" vlmq_status planted_##kernel(int defect, const float* input, float* output,      \
                                          int count) {                                        \
    return VLMQ_LAUNCH(kernel, count / kThreads, kThreads, kThreads * sizeof(float), nullptr, \
                       defect, input, output);                                                \
  }

VLMQ_PLANTED(missing_barrier)
VLMQ_PLANTED(missing_trailing_barrier)
VLMQ_PLANTED(divergent_barrier)
VLMQ_PLANTED(exit_before_barrier)
VLMQ_PLANTED(named_barrier_count)
