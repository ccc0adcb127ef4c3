// Sums in float64, in an order fixed by the shape alone.
#pragma once

#include "device/launch.cuh"
#include "device/reduce.cuh"

namespace vlmq::factor {

constexpr int kSumThreads = 256;
constexpr size_t kSumSharedBytes = kSumThreads / 32 * sizeof(double);

/// The sum over the block of kSumThreads, the same bits in each thread. `scratch`: kSumSharedBytes
/// of shared memory that nobody reads or writes any more.
///
/// It adds the warps' sums in turn, where reduce.cuh's block_sum adds them as a tree: made one, the
/// last bits of either's results would change.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  for (int i = 0; i < kSumThreads / 32; ++i) total += scratch[i];
  return total;
}

}  // namespace vlmq::factor
