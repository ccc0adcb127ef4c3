// Sums and maxima of a warp and of a block, in an order fixed by the shape alone.
#pragma once

#ifndef VLMQ_EMULATED
#include <cuda_runtime.h>
#endif

namespace vlmq {

/// The sum over the 32 lanes, the same bits in each: a tree in which both partners add the same two
/// numbers.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

/// The maximum over the 32 lanes, NaN ignored unless all are.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

/// The sum over a block of whole warps, given to every thread. `scratch`: 32 floats of shared
/// memory, free again when all threads have passed the next barrier of the block or the next
/// block_sum or block_max.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  value = warp_sum(value);
  __syncthreads();  // the previous use of scratch has been read
  if (lane == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

/// The maximum, likewise.
__device__ __forceinline__ float block_max(float value, float* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  value = warp_max(value);
  __syncthreads();
  if (lane == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_max(scratch[lane < warps ? lane : 0]);
}

}  // namespace vlmq
