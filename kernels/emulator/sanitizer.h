// What AddressSanitizer and ThreadSanitizer must be told about fibers. The runtime itself is never
// instrumented: its own accesses would be taken for the CUDA threads'.
#pragma once

#include <cstddef>

#if defined(VLMQ_SANITIZE_ADDRESS)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}
#elif defined(VLMQ_SANITIZE_THREAD)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace vlmq::emulator {

#if defined(VLMQ_SANITIZE_THREAD)
constexpr bool kFindRaces = true;
inline void acquire(void* token) { __tsan_acquire(token); }
inline void release(void* token) { __tsan_release(token); }
#else
constexpr bool kFindRaces = false;
inline void acquire(void*) {}
inline void release(void*) {}
#endif

}  // namespace vlmq::emulator
