// Races between blocks, which nothing orders. Launchers as in barriers.cu.

#include <cstdlib>

#include "device/launch.cuh"

namespace {

constexpr int kThreads = 128;

// Every block writes the first number of the output too; the last to run wins.
__global__ void race_between_blocks(int defect, const float* input, float* output) {
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  const float value = input[base + kThreads - 1 - t];
  output[base + t] = value;
  __syncthreads();
  if (defect != 0 && t == 0) output[0] = input[kThreads - 1];
}

// Blocks leave their numbers in `scratch`; the last one, told by a counter, writes the whole
// output.
__global__ void last_block(int defect, const float* input, float* output, float* scratch,
                           unsigned* counter) {
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  unsigned* last = reinterpret_cast<unsigned*>(vlmq::dynamic_shared());
  scratch[base + t] = input[base + kThreads - 1 - t];
  if (defect == 0) __threadfence();
  __syncthreads();
  if (t == 0) *last = atomicAdd(counter, 1u) == gridDim.x - 1;
  __syncthreads();
  if (*last == 0) return;
  if (defect == 0) __threadfence();
  for (unsigned i = t; i < gridDim.x * kThreads; i += kThreads) output[i] = scratch[i];
}

}  // namespace

extern "C" vlmq_status planted_race_between_blocks(int defect, const float* input, float* output,
                                                   int count) {
  return VLMQ_LAUNCH(race_between_blocks, count / kThreads, kThreads, 0, nullptr, defect, input,
                     output);
}

extern "C" vlmq_status planted_missing_fence(int defect, const float* input, float* output,
                                             int count) {
  float* scratch = static_cast<float*>(std::malloc(sizeof(float) * count));
  unsigned counter = 0;
  const vlmq_status status = VLMQ_LAUNCH(last_block, count / kThreads, kThreads, sizeof(unsigned),
                                         nullptr, defect, input, output, scratch, &counter);
  std::free(scratch);
  return status;
}
