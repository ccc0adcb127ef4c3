// cp.async: done at once, or only at the wait that covers it, as the schedule's seed decides.
#pragma once

#include "emulator/runtime.h"

namespace vlmq::emulator {

inline void check_aligned(const void* pointer, size_t alignment, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    fail(site, "misaligned %s: %p is not a multiple of %zu", what, pointer, alignment);
  }
}

// Here and not in the runtime, so that the sanitizers see the accesses as the copying thread's own.
inline void perform(const Copy& copy) {
  if (copy.size == 16 && copy.valid == 16) {
    *static_cast<uint4*>(copy.target) = *static_cast<const uint4*>(copy.source);
    return;
  }
  auto* target = static_cast<unsigned char*>(copy.target);
  const auto* source = static_cast<const unsigned char*>(copy.source);
  for (unsigned i = 0; i < copy.size; ++i) target[i] = i < copy.valid ? source[i] : 0;
}

inline void copy_async(void* target, const void* source, unsigned size, int valid, Site site) {
  check_aligned(target, size, "target of cp.async", site);
  check_aligned(source, size, "source of cp.async", site);
  if (valid < 0 || valid > static_cast<int>(size))
    fail(site, "cp.async of %d valid bytes of %u", valid, size);
  const Copy copy{target, source, size, static_cast<unsigned>(valid)};
  const bool late = defer_copy(copy, site);
  // A bad address is reported here, where it was made, also when the data moves later; until then
  // the target is NaN.
  perform(copy);
  if (late) {
    for (unsigned i = 0; i < size; ++i) static_cast<unsigned char*>(target)[i] = 0xff;
  }
}

inline void wait_copies(unsigned groups_in_flight) {
  for (Copy copy; next_copy_due(groups_in_flight, &copy);) perform(copy);
}

// A thread that returns lets its copies go on: what another thread reads of them is a race.
inline void finish_copies() {
  commit_copies();
  wait_copies(0);
}

}  // namespace vlmq::emulator
