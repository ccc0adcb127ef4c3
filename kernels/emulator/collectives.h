// Barriers, shuffles and votes under their CUDA names.
#pragma once

#include "emulator/runtime.h"

namespace vlmq::emulator {

template <class T>
T shuffle_value(const char* operation, unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(operation, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned lane() { return current->linear % 32; }

// The lane to read, or its own when that lies outside the lane's segment of `width`.
inline unsigned within(unsigned source, int width) {
  const unsigned segment = ~(static_cast<unsigned>(width) - 1);
  return (source & segment) == (lane() & segment) && source < 32 ? source : lane();
}

}  // namespace vlmq::emulator

inline void __syncthreads(VLMQ_SITE_ALONE) { vlmq::emulator::barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu VLMQ_SITE) {
  vlmq::emulator::sync_warp(mask, site);
}
inline void __threadfence() { vlmq::emulator::fence(); }
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32 VLMQ_SITE) {
  using namespace vlmq::emulator;
  const unsigned start = lane() & ~(static_cast<unsigned>(width) - 1);
  return shuffle_value("__shfl_sync", mask, value, start + source % width, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32 VLMQ_SITE) {
  using namespace vlmq::emulator;
  return shuffle_value("__shfl_xor_sync", mask, value, within(lane() ^ flip, width), site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32 VLMQ_SITE) {
  using namespace vlmq::emulator;
  return shuffle_value("__shfl_down_sync", mask, value, within(lane() + delta, width), site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32 VLMQ_SITE) {
  using namespace vlmq::emulator;
  return shuffle_value("__shfl_up_sync", mask, value, within(lane() - delta, width), site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate VLMQ_SITE) {
  return vlmq::emulator::ballot("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate VLMQ_SITE) {
  return vlmq::emulator::ballot("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate VLMQ_SITE) {
  return vlmq::emulator::ballot("__all_sync", mask, predicate != 0, site) == mask;
}
