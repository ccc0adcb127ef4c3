// Launching kernels and enqueuing plain copies: CUDA's runtime, or the emulator.
#pragma once

#include <cstddef>

#include "vlmq.h"

#ifndef VLMQ_EMULATED
#include <cuda_runtime.h>
#endif

namespace vlmq {

/// The block's dynamic shared memory, the only kind in use: aligned to 128 bytes, holding NaN under
/// the emulator. Carve it up in one place per kernel; the size is what the launcher passed to
/// VLMQ_LAUNCH.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef VLMQ_EMULATED
  return emulator::current->block->shared;
#else
  extern __shared__ __align__(128) unsigned char vlmq_dynamic_shared[];
  return vlmq_dynamic_shared;
#endif
}

#ifdef VLMQ_EMULATED

template <class... Parameters, class... Arguments>
vlmq_status launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, vlmq_stream, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  emulator::launch(
      name, grid, block, shared_bytes,
      [](const void* pointer) {
        const Call& called = *static_cast<const Call*>(pointer);
        std::apply(called.kernel, called.arguments);
        emulator::finish_copies();
      },
      &call);
  return VLMQ_OK;
}

/// Sets `bytes` bytes from `target` on to `byte`.
inline vlmq_status fill_async(void* target, unsigned char byte, size_t bytes, vlmq_stream) {
  if (bytes != 0) std::memset(target, byte, bytes);
  return VLMQ_OK;
}

/// Copies between two places of device memory that do not overlap.
inline vlmq_status copy_async_d2d(void* target, const void* source, size_t bytes, vlmq_stream) {
  if (bytes != 0) std::memcpy(target, source, bytes);
  return VLMQ_OK;
}

#else

inline vlmq_status status_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return VLMQ_OK;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      cudaGetLastError();
      return VLMQ_NO_KERNEL_IMAGE;
    default:
      cudaGetLastError();  // the failure is reported here; the next call must not report it again
      return VLMQ_CUDA_ERROR;
  }
}

template <class... Parameters, class... Arguments>
vlmq_status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   vlmq_stream stream, Arguments&&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 << 10) {  // more must be asked for
    const cudaError_t error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return status_of(error);
  }
  const auto enqueue = [&](Parameters... parameters) {
    void* pointers[] = {&parameters...};
    return cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream);
  };
  return status_of(enqueue(static_cast<Arguments&&>(arguments)...));
}

inline vlmq_status fill_async(void* target, unsigned char byte, size_t bytes, vlmq_stream stream) {
  return status_of(cudaMemsetAsync(target, byte, bytes, stream));
}

inline vlmq_status copy_async_d2d(void* target, const void* source, size_t bytes,
                                  vlmq_stream stream) {
  return status_of(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, stream));
}

#endif

/// Rounds the quotient up.
__host__ __device__ constexpr long long ceil_div(long long count, long long size) {
  return (count + size - 1) / size;
}

}  // namespace vlmq

/// `vlmq_status s = VLMQ_LAUNCH((kernel<A, B>), grid, block, shared_bytes, stream, arguments...);`
/// Raises the limit of dynamic shared memory where needed. Never waits. Grid and block must not be
/// empty.
#ifdef VLMQ_EMULATED
#define VLMQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::vlmq::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#else
#define VLMQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::vlmq::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#endif
