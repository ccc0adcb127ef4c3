// The CUDA threads of one block on one OS thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/fiber.h"
#include "emulator/runtime.h"
#include "emulator/sanitizer.h"

namespace vlmq::emulator {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxWarps = kMaxThreads / kLanes;
constexpr unsigned kBarriers = 16;
// Copies that one thread may have under way: 4 stages of 16 KiB tiles of two operands with 128
// threads need 64.
constexpr unsigned kMaxCopies = 256;
#if defined(VLMQ_SANITIZE_ADDRESS) || defined(VLMQ_SANITIZE_THREAD)
constexpr size_t kStackBytes = 256 << 10;  // instrumented frames are several times as large
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

constexpr unsigned kFiberSets = kFindRaces ? 2 : 1;

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  void (*entry)(const void*);
  const void* arguments;
  uint64_t seed;
  // ThreadSanitizer's edges from the host to the threads and back. Blocks are not ordered among
  // themselves.
  mutable char begun = 0, ended = 0;
};

// xorshift64*: schedules need variety, not quality.
struct Random {
  uint64_t state;
  uint32_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<uint32_t>(state * 0x2545f4914f6cdd1dull >> 32);
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>(uint64_t{next()} * bound >> 32); }
};

struct Warp;

struct Thread : ThreadView {
  Warp* warp;
  unsigned lane;
  // While it waits: the operation, and the mask of lanes or the barrier's number.
  const char* waits_at;
  Site site;
  uint32_t detail;
  bool exited;
  Context context;
  void* fake_stack;  // AddressSanitizer's
  void* fiber;       // ThreadSanitizer's
  // Copies in order of issue, in a ring; groups are numbered by the commits before them.
  unsigned first_copy, end_copy, commits;
};

struct QueuedCopy {
  Copy copy;
  unsigned group;
};

// What one lane brings to a warp's operation and takes away.
union alignas(16) LaneData {
  uint64_t value;
  uint32_t words[4];
  struct {
    uint32_t a[4], b[2];
    float d[4];
  } multiply;
};

// One meeting of lanes. It goes back to the pool only when its last lane has read the others' data,
// so neither data nor ThreadSanitizer's token is ever shared with the next meeting.
struct Rendezvous {
  const char* operation;
  Site site;
  uint32_t mask, arrived;
  unsigned leaving;
  Rendezvous* next;
  LaneData lanes[kLanes];
};

struct Warp {
  uint32_t exists, exited;  // by lane
  // Lanes that can run, by their place in the order, and where the search for the next one begins.
  uint32_t ready;
  unsigned cursor;
  unsigned char order[kLanes], place[kLanes];  // each the other's inverse
  Rendezvous* open;
  Rendezvous* pool;
  // A lane waits at one meeting and may still have to leave none: as many meetings as lanes can be
  // under way.
  Rendezvous meetings[kLanes + 1];
};

struct Barrier {
  unsigned expected, arrived, epoch;
  Site site;
  uint32_t waiting[kMaxWarps];
};

struct Worker {
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  Barrier barriers[kBarriers];
  QueuedCopy copies[kMaxThreads][kMaxCopies];
  unsigned char priority[kMaxWarps];
  unsigned warp_count, thread_count, live;
  BlockView view;
  const Launch* launch;
  Random random;
  Thread host;  // the OS thread itself, which a block returns to
  const void* host_stack;
  size_t host_stack_bytes;
  char* stacks;  // of the running block
  unsigned char* shared;
  size_t shared_capacity;
  // ThreadSanitizer needs 0.4 ms and some 600 KB for a fiber, so they serve again. A fiber that
  // goes on in another block orders the two blocks up to the barriers of the first; two sets, drawn
  // for each block, leave neighbours unordered.
  char* stack_sets[kFiberSets];
  void* fiber_sets[kFiberSets][kMaxThreads];
  void** fibers;  // of the running block
  // What barriers and meetings release and acquire, 8 bytes each: new for each block, or they would
  // order blocks.
  char* tokens;
  Worker* next_free;

  static Worker* create();
  // Two tokens a barrier in turn: with one, a late waker would also acquire what was released for
  // the next epoch, which hides races.
  void* token(const Barrier& barrier) {
    return tokens + ((&barrier - barriers) * 2 + barrier.epoch % 2) * 8;
  }
  void* token(const Warp& warp, const Rendezvous& meeting) {
    return tokens +
           (2 * kBarriers + (&warp - warps) * (kLanes + 1) + (&meeting - warp.meetings)) * 8;
  }
  void run_block(const Launch& launch, uint64_t index);

 private:
  void start_block(uint64_t index);
  void provide_shared();
  void return_shared();
  void start_thread(unsigned id);
};

// The worker of this OS thread. As `current`, one instruction.
extern __thread Worker* worker __attribute__((tls_model("initial-exec")));

inline Thread* self() { return static_cast<Thread*>(const_cast<ThreadView*>(current)); }

inline void make_ready(Warp& warp, uint32_t lanes) {
  for (; lanes != 0; lanes &= lanes - 1) warp.ready |= 1u << warp.place[__builtin_ctz(lanes)];
}

[[noreturn]] void report_deadlock();

// What follows stands here to be inlined: a warp's operation switches 32 times, and most of a
// test's time is such switches.

// The place of the next lane that can run, of one that is there.
inline unsigned next_place(const Warp& warp) {
  const uint32_t ahead = warp.ready & ~0u << warp.cursor;
  return static_cast<unsigned>(__builtin_ctz(ahead != 0 ? ahead : warp.ready));
}

inline Thread* ready_lane(Worker& w, Warp& warp) {
  if (warp.ready == 0) return nullptr;
  Thread* const lanes = &w.threads[(&warp - w.warps) * kLanes];
  const unsigned place = next_place(warp);
  warp.ready &= ~(1u << place);
  warp.cursor = (place + 1) % kLanes;
  // The one behind it will want its stack.
  if (warp.ready != 0) lanes[warp.order[next_place(warp)]].context.prefetch();
  return &lanes[warp.order[place]];
}

inline Thread* next_thread(Worker& w, Warp* preferred) {
  if (preferred != nullptr) {
    if (Thread* thread = ready_lane(w, *preferred)) return thread;
  }
  for (unsigned i = 0; i < w.warp_count; ++i) {
    if (Thread* thread = ready_lane(w, w.warps[w.priority[i]])) return thread;
  }
  return nullptr;
}

inline void switch_to(Worker& w, Thread& from, Thread& to, bool from_ends) {
  current = &to;
#if defined(VLMQ_SANITIZE_ADDRESS)
  const bool to_host = &to == &w.host;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack,
                                 to_host ? w.host_stack : w.stacks + to.linear * kStackBytes,
                                 to_host ? w.host_stack_bytes : kStackBytes);
  from.context.switch_to(to.context);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#elif defined(VLMQ_SANITIZE_THREAD)
  (void)w, (void)from_ends;
  __tsan_switch_to_fiber(to.fiber, 1);  // 1: no edge between the two
  from.context.switch_to(to.context);
#else
  (void)w, (void)from_ends;
  from.context.switch_to(to.context);
#endif
}

// Gives up the processor; the thread must have been marked ready, or wait at what another one will
// release.
inline void switch_away(bool stay_in_warp) {
  Worker& w = *worker;
  Thread& thread = *self();
  Thread* next = next_thread(w, stay_in_warp ? thread.warp : nullptr);
  if (next == nullptr) report_deadlock();
  if (next != &thread) switch_to(w, thread, *next, false);
}

void check_no_one_waits_for(Thread& leaver);

}  // namespace vlmq::emulator
