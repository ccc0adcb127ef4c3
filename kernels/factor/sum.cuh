// Sums in float64, in an order fixed by the shape alone.
#pragma once

#include "device/launch.cuh"

namespace vlmq::factor {

constexpr int kSumThreads = 256;
constexpr size_t kSumSharedBytes = kSumThreads / 32 * sizeof(double);

/// The sum over the block of kSumThreads, the same bits in each thread. `scratch`: kSumSharedBytes
/// of shared memory that nobody reads or writes any more.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  for (int i = 0; i < kSumThreads / 32; ++i) total += scratch[i];
  return total;
}

}  // namespace vlmq::factor
