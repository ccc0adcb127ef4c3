// Defects of warp operations. Launchers as in barriers.cu.

#include "device/launch.cuh"
#include "device/mma.cuh"

namespace {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

// The mirrored warp's number of the same lane; mirroring the lanes remains.
__device__ float mirrored_warp(const float* input) {
  return input[blockIdx.x * kThreads + (3 - threadIdx.x / 32) * 32 + threadIdx.x % 32];
}

__device__ void give(float* output, float value) {
  output[blockIdx.x * kThreads + threadIdx.x] = value;
}

// The halves of the warp take different branches, and each asks for all lanes.
__global__ void divergent_shuffle(int defect, const float* input, float* output) {
  float value = mirrored_warp(input);
  if (defect != 0 && threadIdx.x % 32 < 16) {
    value = __shfl_xor_sync(kAll, value, 31);
  } else {
    value = __shfl_xor_sync(kAll, value, 31);
  }
  give(output, value);
}

__global__ void divergent_operation(int defect, const float* input, float* output) {
  float value = mirrored_warp(input);
  if (defect != 0 && threadIdx.x % 32 == 3) {
    value = static_cast<float>(__ballot_sync(kAll, 1));
  } else {
    value = __shfl_xor_sync(kAll, value, 31);
  }
  give(output, value);
}

__global__ void exited_lane(int defect, const float* input, float* output) {
  const float value = mirrored_warp(input);
  if (defect != 0 && threadIdx.x == 70) return;
  give(output, __shfl_xor_sync(kAll, value, 31));
}

__global__ void outside_its_mask(int defect, const float* input, float* output) {
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const unsigned mask = defect != 0 && threadIdx.x % 32 == 20 ? 0x0000ffffu : half;
  float value = mirrored_warp(input);
  value = __shfl_xor_sync(mask, value, 15);  // mirrors within the half
  give(output, __shfl_xor_sync(kAll, value, 16));
}

__global__ void source_outside_mask(int defect, const float* input, float* output) {
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  float value = mirrored_warp(input);
  value = __shfl_xor_sync(half, value, defect != 0 ? 31 : 15);
  give(output, __shfl_xor_sync(kAll, value, defect != 0 ? 0 : 16));
}

// Lanes of one warp hand numbers over in shared memory.
__global__ void missing_syncwarp(int defect, const float* input, float* output) {
  float* s = reinterpret_cast<float*>(vlmq::dynamic_shared());
  s[threadIdx.x] = mirrored_warp(input);
  if (defect == 0) __syncwarp();
  give(output, s[threadIdx.x ^ 31]);
}

// A shuffle makes lanes meet but orders no memory: only ThreadSanitizer can tell it from
// __syncwarp.
__global__ void shuffle_is_no_fence(int defect, const float* input, float* output) {
  float* s = reinterpret_cast<float*>(vlmq::dynamic_shared());
  s[threadIdx.x] = mirrored_warp(input);
  const float kept = __shfl_sync(kAll, static_cast<float>(threadIdx.x), 0);
  if (defect == 0) __syncwarp();
  give(output, s[threadIdx.x ^ 31] + 0.0f * kept);
}

// Numbers cross shared memory as pairs of 16-bit halves, through ldmatrix.
__global__ void misaligned_ldmatrix(int defect, const float* input, float* output) {
  unsigned char* s = vlmq::dynamic_shared() + threadIdx.x / 32 * 512;
  const unsigned lane = threadIdx.x % 32;
  reinterpret_cast<float*>(s)[lane] = mirrored_warp(input);
  for (unsigned i = 1; i < 4; ++i) reinterpret_cast<float*>(s)[32 * i + lane] = 0.0f;
  __syncwarp();
  uint32_t r[4];
  vlmq::ldmatrix_x4(r, s + lane * 16 + (defect != 0 && lane == 9 ? 4 : 0));
  // r[0] of lane l is word l of the first matrix.
  give(output, __shfl_xor_sync(kAll, __uint_as_float(r[0]), 31));
}

}  // namespace

#define VLMQ_PLANTED(kernel)                                                                      \
  extern "C" vlmq_status planted_##kernel(int defect, const float* input, float* output,          \
                                          int count) {                                            \
    return VLMQ_LAUNCH(kernel, count / kThreads, kThreads, 2048, nullptr, defect, input, output); \
  }

VLMQ_PLANTED(divergent_shuffle)
VLMQ_PLANTED(divergent_operation)
VLMQ_PLANTED(exited_lane)
VLMQ_PLANTED(outside_its_mask)
VLMQ_PLANTED(source_outside_mask)
VLMQ_PLANTED(missing_syncwarp)
VLMQ_PLANTED(shuffle_is_no_fence)
VLMQ_PLANTED(misaligned_ldmatrix)
