// Defects of cp.async pipelines. Launchers as in barriers.cu.

#include "device/launch.cuh"
#include "device/ptx.cuh"

namespace {

constexpr int kThreads = 128;

// The 128 numbers arrive in four groups of 32, by 8 threads each, as the stages of a pipeline
// would.
__global__ void pipeline(int missing_wait, int wrong_count, int misaligned, const float* input,
                         float* output) {
  float* s = reinterpret_cast<float*>(vlmq::dynamic_shared());
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  for (unsigned group = 0; group < 4; ++group) {
    if (t < 8) {
      const unsigned at = group * 32 + 4 * t;
      vlmq::cp_async_16(s + at, input + base + at - (misaligned != 0 && at == 64 ? 1 : 0), 16);
    }
    vlmq::cp_async_commit();
  }
  float value = 0;
  for (unsigned group = 0; group < 4; ++group) {
    // Group g is there when at most 3 - g later ones are under way.
    const unsigned late = 3 - group + (wrong_count != 0 ? 1 : 0);
    if (missing_wait != 0) {
    } else if (late == 0) {
      vlmq::cp_async_wait<0>();
    } else if (late == 1) {
      vlmq::cp_async_wait<1>();
    } else if (late == 2) {
      vlmq::cp_async_wait<2>();
    } else if (late == 3) {
      vlmq::cp_async_wait<3>();
    }
    __syncthreads();
    if (3 - t / 32 == group) value = s[kThreads - 1 - t];
  }
  output[base + t] = value;
}

// Only the first bytes are valid: what lies behind them is not read, and arrives as zero.
__global__ void partial_copy(int defect, const float* input, float* output, int count) {
  float* s = reinterpret_cast<float*>(vlmq::dynamic_shared());
  const unsigned t = threadIdx.x, base = blockIdx.x * kThreads;
  const int valid = defect != 0 ? 4 : static_cast<int>(base + t) < count ? 4 : 0;
  vlmq::cp_async_4(s + t, input + base + t, valid);
  vlmq::cp_async_commit();
  vlmq::cp_async_wait<0>();
  __syncthreads();
  if (static_cast<int>(base + t) < count) {
    output[base + t] = s[kThreads - 1 - t];
  } else if (s[t] != 0.0f) {
    output[0] = s[t];
  }
}

vlmq_status run(int missing_wait, int wrong_count, int misaligned, const float* input,
                float* output, int count) {
  return VLMQ_LAUNCH(pipeline, count / kThreads, kThreads, kThreads * sizeof(float), nullptr,
                     missing_wait, wrong_count, misaligned, input, output);
}

}  // namespace

extern "C" vlmq_status planted_missing_wait(int defect, const float* input, float* output,
                                            int count) {
  return run(defect, 0, 0, input, output, count);
}

extern "C" vlmq_status planted_wrong_group_count(int defect, const float* input, float* output,
                                                 int count) {
  return run(0, defect, 0, input, output, count);
}

extern "C" vlmq_status planted_misaligned_copy(int defect, const float* input, float* output,
                                               int count) {
  return run(0, 0, defect, input, output, count);
}

// A block more than there is input for: its copies are all of zero bytes.
extern "C" vlmq_status planted_copy_beyond(int defect, const float* input, float* output,
                                           int count) {
  return VLMQ_LAUNCH(partial_copy, count / kThreads + 1, kThreads, kThreads * sizeof(float),
                     nullptr, defect, input, output, count);
}
