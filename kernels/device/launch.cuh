// Launching kernels and enqueuing plain copies: CUDA's runtime, or the emulator.
#pragma once

#include <cstddef>

#include "vlmq.h"

#ifndef VLMQ_EMULATED
#include <cuda_runtime.h>
#endif

#include "device/failure.cuh"

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

/// Whether the emulator was told to refuse this.
inline vlmq_status refusal_of(const Operation& of) {
  const emulator::Error* error =
      emulator::enqueue(current_call, of.kernel != nullptr ? of.kernel : of.function);
  if (error == nullptr) return VLMQ_OK;
  begin_failure(of);
  say("%s", error->text);
  if (error->is_late) say_it_is_late();
  return error->lacks_image ? VLMQ_NO_KERNEL_IMAGE : VLMQ_CUDA_ERROR;
}

template <class... Parameters, class... Arguments>
vlmq_status launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, vlmq_stream, Arguments&&... arguments) {
  const vlmq_status status = refusal_of({"cudaLaunchKernel", name, grid, block, shared_bytes});
  if (status != VLMQ_OK) return status;
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
  const vlmq_status status = refusal_of({"cudaMemsetAsync", nullptr, {}, {}, 0});
  if (status == VLMQ_OK && bytes != 0) std::memset(target, byte, bytes);
  return status;
}

/// Copies between two places of device memory that do not overlap.
inline vlmq_status copy_async_d2d(void* target, const void* source, size_t bytes, vlmq_stream) {
  const vlmq_status status = refusal_of({"cudaMemcpyAsync", nullptr, {}, {}, 0});
  if (status == VLMQ_OK && bytes != 0) std::memcpy(target, source, bytes);
  return status;
}

#else

/// Adds which GPUs the library holds code for, and which one this is.
inline void say_architectures() {
  constexpr int kArchs[] = {__CUDA_ARCH_LIST__};
  const char* between = "; the library was built for compute capability ";
  for (const int arch : kArchs) {
    say("%s%d.%d", between, arch / 100, arch / 10 % 10);
    between = ", ";
  }
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
    say(", the GPU has %d.%d", major, minor);
  }
}

/// What the runtime answered, with a message where it is not good.
inline vlmq_status status_of(cudaError_t error, const Operation& of) {
  if (error == cudaSuccess) return VLMQ_OK;
  cudaGetLastError();  // the failure is reported here; the next call must not report it again
  begin_failure(of);
  say("%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      say_architectures();
      return VLMQ_NO_KERNEL_IMAGE;
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorLaunchTimeout:
    case cudaErrorLaunchFailure:
      say_it_is_late();
      return VLMQ_CUDA_ERROR;
    default:
      return VLMQ_CUDA_ERROR;
  }
}

template <class... Parameters, class... Arguments>
vlmq_status launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, vlmq_stream stream, Arguments&&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  Operation operation = {"cudaFuncSetAttribute", name, grid, block, shared_bytes};
  if (shared_bytes > 48 << 10) {  // more must be asked for
    const cudaError_t error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return status_of(error, operation);
  }
  operation.function = "cudaLaunchKernel";
  const auto enqueue = [&](Parameters... parameters) {
    void* pointers[] = {&parameters...};
    return cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream);
  };
  return status_of(enqueue(static_cast<Arguments&&>(arguments)...), operation);
}

inline vlmq_status fill_async(void* target, unsigned char byte, size_t bytes, vlmq_stream stream) {
  return status_of(cudaMemsetAsync(target, byte, bytes, stream),
                   {"cudaMemsetAsync", nullptr, {}, {}, 0});
}

inline vlmq_status copy_async_d2d(void* target, const void* source, size_t bytes,
                                  vlmq_stream stream) {
  return status_of(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, stream),
                   {"cudaMemcpyAsync", nullptr, {}, {}, 0});
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
#define VLMQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::vlmq::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
