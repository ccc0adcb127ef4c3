// How much shared memory a block may have. A kernel that would like more than every GPU gives has a
// variant with less, chosen at its launch by what the device offers, with the same results to the
// bit.
#pragma once

#include <atomic>
#include <cstddef>

#ifndef VLMQ_EMULATED
#include <cuda_runtime.h>
#endif

namespace vlmq {

/// What compute capabilities 8.6, 8.9 and 12.x give a block, and so every GPU from 8.0 on. No
/// kernel, or no kernel's small variant, may take more.
constexpr size_t kLeastShared = 99 << 10;

/// What 8.0 and 8.7 give; 9.0 and 10.x give 227 KiB.
constexpr size_t kAmpleShared = 163 << 10;

/// Bytes of shared memory that the current device gives a block. 0 where it can not be asked: small
/// variants are taken then, and the first launch tells what is wrong with the device.
inline size_t shared_bytes_of_a_block() {
#ifdef VLMQ_EMULATED
  return emulator::shared_bytes_of_a_block();
#else
  constexpr int kDevices = 64;              // beyond them each call asks
  static std::atomic<int> known[kDevices];  // 0: not asked yet
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();  // the launch meets it again
    return 0;
  }
  const bool kept = device < kDevices;
  if (kept) bytes = known[device].load(std::memory_order_relaxed);
  if (bytes != 0) return static_cast<size_t>(bytes);
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
      cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  if (kept) known[device].store(bytes, std::memory_order_relaxed);
  return static_cast<size_t>(bytes);
#endif
}

/// Calls f with the first of two layouts of a block whose kSharedBytes the device offers. A layout
/// that every GPU has room for needs no second one.
template <class Ample, class Small, class F>
auto with_layout(F&& f) {
  static_assert(Ample::kSharedBytes <= kAmpleShared, "8.0 would get the small layout");
  if constexpr (Ample::kSharedBytes > kLeastShared) {
    static_assert(Small::kSharedBytes <= kLeastShared, "some GPUs have less");
    if (shared_bytes_of_a_block() < Ample::kSharedBytes) return f(Small{});
  }
  return f(Ample{});
}

}  // namespace vlmq
