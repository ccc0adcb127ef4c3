// What the calls of the C API ask of their arguments: known values of enums, aligned pointers.
//
// An enum's known values are listed here or beside the kernels that tell them apart, and nowhere is
// an unknown one taken for another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "device/types.cuh"
#include "vlmq.h"

namespace vlmq {

/// The number in an enum that a C caller filled: C++ may not read one that has no name as an enum.
template <class Enum>
int number_in(const Enum& named) {
  static_assert(sizeof(Enum) == sizeof(int), "an enum of C is an int");
  int number;
  std::memcpy(&number, &named, sizeof number);
  return number;
}

inline bool is_dtype(const vlmq_dtype& dtype) {
  const int number = number_in(dtype);
  return number == VLMQ_F32 || number == VLMQ_BF16 || number == VLMQ_F16;
}

/// `f(T{})` for the type that `dtype` names.
template <class F>
vlmq_status with_dtype(const vlmq_dtype& dtype, F&& f) {
  if (!is_dtype(dtype)) return VLMQ_BAD_ARGUMENT;
  switch (dtype) {
    case VLMQ_F32:
      return f(float{});
    case VLMQ_BF16:
      return f(bf16{});
    case VLMQ_F16:
      return f(f16{});
  }
  return VLMQ_BAD_ARGUMENT;
}

/// Whether a pointer is a multiple of `bytes`; NULL is.
__host__ __device__ inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

/// Whether every row of a matrix is a multiple of 16 bytes, `stride` elements from row to row.
template <class T>
__host__ __device__ bool has_aligned_rows(const T* matrix, int64_t stride) {
  return is_aligned(matrix, 16) && stride % static_cast<int64_t>(16 / sizeof(T)) == 0;
}

}  // namespace vlmq
