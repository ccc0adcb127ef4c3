// Codes to weights: scale * (code - zero), eight neighbouring columns a thread.
#include "device/arguments.cuh"
#include "device/launch.cuh"
#include "device/types.cuh"

namespace vlmq {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;        // of a thread: 16 bytes of a 16-bit type
constexpr unsigned kRows = 65535;  // the most blocks along y; each takes every kRows-th row

/// Stores values rounded to T with as few stores as the address allows.
template <class T>
__device__ __forceinline__ void store_columns(T* target, const float (&values)[kColumns],
                                              long long valid) {
  if (valid < kColumns || !is_aligned(target, 16)) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i < valid) target[i] = from_float<T>(values[i]);
    }
    return;
  }
  if constexpr (sizeof(T) == 4) {
    store_vector(target, make_float4(values[0], values[1], values[2], values[3]));
    store_vector(target + 4, make_float4(values[4], values[5], values[6], values[7]));
  } else {
    store_vector(target, make_uint4(pack2(from_float<T>(values[0]), from_float<T>(values[1])),
                                    pack2(from_float<T>(values[2]), from_float<T>(values[3])),
                                    pack2(from_float<T>(values[4]), from_float<T>(values[5])),
                                    pack2(from_float<T>(values[6]), from_float<T>(values[7]))));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(vlmq_dequantize_args args) {
  const long long column = (static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x) * kColumns;
  const long long valid = args.cols - column;
  if (valid <= 0) return;
  const uint32_t group_columns = static_cast<uint32_t>(args.cols / args.groups);
  uint32_t group[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    group[i] = 0;
    if (i >= valid) continue;
    group[i] = args.group_index != nullptr ? static_cast<uint32_t>(args.group_index[column + i])
                                           : static_cast<uint32_t>(column + i) / group_columns;
  }
  for (long long row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const uint8_t* const codes = args.codes + row * args.cols + column;
    uint8_t code[kColumns];
    if (valid >= kColumns && is_aligned(codes, 8)) {
      const uint2 eight = load_vector<uint2>(codes);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        code[i] = static_cast<uint8_t>((i < 4 ? eight.x : eight.y) >> i % 4 * 8 & 0xff);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) code[i] = i < valid ? codes[i] : uint8_t{0};
    }
    const float* const scales = args.scales + row * args.groups;
    const uint8_t* const zeros = args.zeros + row * args.groups;
    float values[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      values[i] = __fmul_rn(scales[group[i]], static_cast<float>(code[i] - zeros[group[i]]));
    }
    store_columns(static_cast<T*>(args.out) + row * args.cols + column, values, valid);
  }
}

bool valid(const vlmq_dequantize_args& a) {
  if (a.rows < 0 || a.cols < 0 || a.groups < 0 || a.cols > INT32_MAX) return false;
  if (!is_dtype(a.dtype)) return false;
  if (a.rows == 0 || a.cols == 0) return true;
  if (!a.codes || !a.scales || !a.zeros || !a.out || a.groups == 0) return false;
  return a.group_index || a.cols % a.groups == 0;
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_dequantize, args, stream) {
  using namespace vlmq;
  if (!args || !valid(*args)) return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->cols == 0) return VLMQ_OK;
  const dim3 grid(
      static_cast<unsigned>(ceil_div(args->cols, static_cast<long long>(kThreads) * kColumns)),
      static_cast<unsigned>(args->rows < kRows ? args->rows : kRows));
  return with_dtype(args->dtype, [&](auto tag) {
    return VLMQ_LAUNCH(dequantize_kernel<decltype(tag)>, grid, kThreads, 0, stream, *args);
  });
}
