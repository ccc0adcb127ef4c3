// What the emulator and the device headers compute, for comparison with plain arithmetic.

#include "device/launch.cuh"
#include "device/limits.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"

namespace {

using vlmq::bf16;
using vlmq::f16;

template <class T>
__global__ void widen(const uint16_t* bits, float* values, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) values[i] = vlmq::to_float(vlmq::from_bits<T>(bits[i]));
}

template <class T>
__global__ void narrow(const float* values, uint16_t* bits, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) bits[i] = vlmq::to_bits(vlmq::from_float<T>(values[i]));
}

// Rows of 24 elements: 48 bytes, a multiple of 16 as ldmatrix wants, and unlike the tile's width.
constexpr int kStride = 24;

template <class T>
__device__ void fill_tile(T* tile, const float* from, int rows, int cols) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * cols; i += 32) {
    tile[i / cols * kStride + i % cols] = vlmq::from_float<T>(from[i]);
  }
}

// d[16][16] += a[16][16] b[16][16], by one warp. a is stored as [m][k] or [k][m], b as [n][k] or
// [k][n]; `pairwise` brings b by ldmatrix.x2, one half at a time.
template <class T, bool AIsTransposed, bool BIsTransposed, bool Pairwise>
__global__ void multiply(const float* a, const float* b, float* d) {
  T* a_tile = reinterpret_cast<T*>(vlmq::dynamic_shared());
  T* b_tile = a_tile + 16 * kStride;
  const int lane = static_cast<int>(threadIdx.x);
  fill_tile(a_tile, a, 16, 16);
  fill_tile(b_tile, b, 16, 16);
  __syncwarp();
  uint32_t fa[4], fb[4];
  if (AIsTransposed) {
    const vlmq::FragmentRow at = vlmq::fragment_a_km(lane);
    vlmq::ldmatrix_x4_trans(fa, a_tile + at.row * kStride + at.col);
  } else {
    const vlmq::FragmentRow at = vlmq::fragment_a_mk(lane);
    vlmq::ldmatrix_x4(fa, a_tile + at.row * kStride + at.col);
  }
  if (Pairwise) {
    for (int half = 0; half < 2; ++half) {
      uint32_t pair[2];
      const vlmq::FragmentRow at =
          BIsTransposed ? vlmq::fragment_b_kn(lane % 16) : vlmq::fragment_b_nk(lane % 16);
      if (BIsTransposed) {
        vlmq::ldmatrix_x2_trans(pair, b_tile + at.row * kStride + at.col + 8 * half);
      } else {
        vlmq::ldmatrix_x2(pair, b_tile + (at.row + 8 * half) * kStride + at.col);
      }
      fb[2 * half] = pair[0];
      fb[2 * half + 1] = pair[1];
    }
  } else if (BIsTransposed) {
    const vlmq::FragmentRow at = vlmq::fragment_b_kn(lane);
    vlmq::ldmatrix_x4_trans(fb, b_tile + at.row * kStride + at.col);
  } else {
    const vlmq::FragmentRow at = vlmq::fragment_b_nk(lane);
    vlmq::ldmatrix_x4(fb, b_tile + at.row * kStride + at.col);
  }
  for (int half = 0; half < 2; ++half) {
    float sums[4];
    for (int i = 0; i < 4; ++i) {
      sums[i] = d[vlmq::accumulator_row(lane, i) * 16 + 8 * half + vlmq::accumulator_col(lane, i)];
    }
    const uint32_t pair[2] = {fb[2 * half], fb[2 * half + 1]};
    vlmq::Mma<T>::multiply(sums, fa, pair);
    for (int i = 0; i < 4; ++i) {
      d[vlmq::accumulator_row(lane, i) * 16 + 8 * half + vlmq::accumulator_col(lane, i)] = sums[i];
    }
  }
}

// The same from registers alone, the layout written out from the PTX manual (figures of
// mma.m16n8k16 and m16n8k8).
template <class T>
__global__ void multiply_from_registers(const float* a, const float* b, float* d) {
  const int group = static_cast<int>(threadIdx.x) >> 2,
            in_group = static_cast<int>(threadIdx.x) & 3;
  for (int n = 0; n < 16; n += 8) {
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 8; i += 2) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int col = in_group * 2 + (i >= 4 ? 8 : 0);
      fa[i / 2] = vlmq::pack2(vlmq::from_float<T>(a[row * 16 + col]),
                              vlmq::from_float<T>(a[row * 16 + col + 1]));
    }
    for (int i = 0; i < 4; i += 2) {
      const int row = in_group * 2 + (i >= 2 ? 8 : 0);
      fb[i / 2] = vlmq::pack2(vlmq::from_float<T>(b[row * 16 + n + group]),
                              vlmq::from_float<T>(b[(row + 1) * 16 + n + group]));
    }
    float sums[4];
    for (int i = 0; i < 4; ++i) {
      sums[i] = d[(i < 2 ? group : group + 8) * 16 + n + in_group * 2 + (i & 1)];
    }
    vlmq::Mma<T>::multiply(sums, fa, fb);
    for (int i = 0; i < 4; ++i) {
      d[(i < 2 ? group : group + 8) * 16 + n + in_group * 2 + (i & 1)] = sums[i];
    }
  }
}

__global__ void multiply_tf32(const float* a, const float* b, float* d) {
  const int group = static_cast<int>(threadIdx.x) >> 2,
            in_group = static_cast<int>(threadIdx.x) & 3;
  for (int n = 0; n < 16; n += 8) {
    float sums[4];
    for (int i = 0; i < 4; ++i) {
      sums[i] = d[(i < 2 ? group : group + 8) * 16 + n + in_group * 2 + (i & 1)];
    }
    for (int k = 0; k < 16; k += 8) {
      uint32_t fa[4], fb[2];
      for (int i = 0; i < 4; ++i) {
        const int row = i == 0 || i == 2 ? group : group + 8;
        fa[i] = vlmq::cvt_tf32(a[row * 16 + k + in_group + (i < 2 ? 0 : 4)]);
      }
      for (int i = 0; i < 2; ++i)
        fb[i] = vlmq::cvt_tf32(b[(k + in_group + 4 * i) * 16 + n + group]);
      vlmq::mma_m16n8k8_tf32(sums, fa, fb);
    }
    for (int i = 0; i < 4; ++i) {
      d[(i < 2 ? group : group + 8) * 16 + n + in_group * 2 + (i & 1)] = sums[i];
    }
  }
}

// Per block: its sum and its maximum, and the sums of its warps by the other kinds of shuffle.
__global__ void reductions(const float* input, float* sums, float* maxima, float* warps) {
  float* scratch = reinterpret_cast<float*>(vlmq::dynamic_shared());
  const unsigned t = threadIdx.x;
  const float value = input[blockIdx.x * blockDim.x + t];
  const float sum = vlmq::block_sum(value, scratch), largest = vlmq::block_max(value, scratch);
  float down = value, scan = value;
  for (int distance = 16; distance > 0; distance /= 2) {
    down += __shfl_down_sync(0xffffffffu, down, distance);
  }
  for (int distance = 1; distance < 8; distance *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, scan, distance, 8);
    if (t % 8 >= static_cast<unsigned>(distance)) scan += before;
  }
  // The four segments' last lanes hold their sums.
  float segments = 0;
  for (int segment = 0; segment < 4; ++segment) {
    segments += __shfl_sync(0xffffffffu, scan, 8 * segment + 7);
  }
  down = __shfl_sync(0xffffffffu, down, 0);
  if (t % 32 == 0) warps[(blockIdx.x * blockDim.x + t) / 32] = down == segments ? down : -1.0f;
  if (t == 0) sums[blockIdx.x] = sum;
  if (t == 0) maxima[blockIdx.x] = largest;
}

__global__ void split(const float* input, float* high, float* low, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const vlmq::Split parts = vlmq::split_bf16(input[i]);
  high[i] = vlmq::to_float(parts.high);
  low[i] = vlmq::to_float(parts.low);
}

// 64-bit sum, least and greatest of all numbers, and which of their low 5 bits occur.
__global__ void atomics(const int* input, int count, unsigned long long* sum, int* least,
                        int* greatest, unsigned* seen) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  atomicAdd(sum, static_cast<unsigned long long>(static_cast<long long>(input[i])));
  atomicMin(least, input[i]);
  atomicMax(greatest, input[i]);
  atomicOr(seen, 1u << (input[i] & 31));
}

template <class T>
vlmq_status run_multiply(int layout, const float* a, const float* b, float* d) {
  constexpr size_t kShared = 2 * 16 * kStride * sizeof(T);
  switch (layout) {
    case 0:
      return VLMQ_LAUNCH(multiply_from_registers<T>, 1, 32, 0, nullptr, a, b, d);
    case 1:
      return VLMQ_LAUNCH((multiply<T, false, false, false>), 1, 32, kShared, nullptr, a, b, d);
    case 2:
      return VLMQ_LAUNCH((multiply<T, false, true, false>), 1, 32, kShared, nullptr, a, b, d);
    case 3:
      return VLMQ_LAUNCH((multiply<T, true, false, false>), 1, 32, kShared, nullptr, a, b, d);
    case 4:
      return VLMQ_LAUNCH((multiply<T, true, true, false>), 1, 32, kShared, nullptr, a, b, d);
    case 5:
      return VLMQ_LAUNCH((multiply<T, false, false, true>), 1, 32, kShared, nullptr, a, b, d);
    case 6:
      return VLMQ_LAUNCH((multiply<T, false, true, true>), 1, 32, kShared, nullptr, a, b, d);
    default:
      return VLMQ_BAD_ARGUMENT;
  }
}

int blocks_of(int count, int threads) { return static_cast<int>(vlmq::ceil_div(count, threads)); }

}  // namespace

extern "C" {

vlmq_status numerics_widen(int half, const uint16_t* bits, float* values, int count) {
  const int blocks = blocks_of(count, 256);
  if (half != 0) return VLMQ_LAUNCH(widen<f16>, blocks, 256, 0, nullptr, bits, values, count);
  return VLMQ_LAUNCH(widen<bf16>, blocks, 256, 0, nullptr, bits, values, count);
}

vlmq_status numerics_narrow(int half, const float* values, uint16_t* bits, int count) {
  const int blocks = blocks_of(count, 256);
  if (half != 0) return VLMQ_LAUNCH(narrow<f16>, blocks, 256, 0, nullptr, values, bits, count);
  return VLMQ_LAUNCH(narrow<bf16>, blocks, 256, 0, nullptr, values, bits, count);
}

// type: 0 bf16, 1 f16, 2 tf32.
vlmq_status numerics_multiply(int type, int layout, const float* a, const float* b, float* d) {
  if (type == 2) return VLMQ_LAUNCH(multiply_tf32, 1, 32, 0, nullptr, a, b, d);
  return type == 1 ? run_multiply<f16>(layout, a, b, d) : run_multiply<bf16>(layout, a, b, d);
}

vlmq_status numerics_reductions(const float* input, float* sums, float* maxima, float* warps,
                                int blocks, int threads) {
  return VLMQ_LAUNCH(reductions, blocks, threads, 32 * sizeof(float), nullptr, input, sums, maxima,
                     warps);
}

vlmq_status numerics_split(const float* input, float* high, float* low, int count) {
  return VLMQ_LAUNCH(split, blocks_of(count, 128), 128, 0, nullptr, input, high, low, count);
}

vlmq_status numerics_atomics(const int* input, int count, unsigned long long* sum, int* least,
                             int* greatest, unsigned* seen) {
  return VLMQ_LAUNCH(atomics, blocks_of(count, 128), 128, 0, nullptr, input, count, sum, least,
                     greatest, seen);
}

size_t numerics_shared_bytes() { return vlmq::shared_bytes_of_a_block(); }

}  // extern "C"
