#include "emulator/scheduler.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace vlmq::emulator {

__thread const ThreadView* current;
__thread Worker* worker;

namespace {

constexpr size_t kTokenBytes = (2 * kBarriers + kMaxWarps * (kLanes + 1)) * 8;

std::mutex one_report;

void* map(size_t bytes) {
  void* got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) {
    std::fprintf(stderr, "emulator: no memory for %zu bytes\n", bytes);
    std::abort();
  }
  return got;
}

// What a thread is at, for grouping in reports.
bool same_place(const Thread& a, const Thread& b) {
  return a.exited == b.exited && a.waits_at == b.waits_at &&
         (a.waits_at == nullptr ||
          (a.site.line == b.site.line && a.site.file == b.site.file && a.detail == b.detail));
}

// One line for each place, with the threads that are there.
void report_threads(const Worker& w) {
  bool told[kMaxThreads] = {};
  for (unsigned first = 0; first < w.thread_count; ++first) {
    const Thread& thread = w.threads[first];
    if (told[first]) continue;
    if (thread.exited) {
      std::fprintf(stderr, "  returned: threads");
    } else if (thread.waits_at == nullptr) {
      std::fprintf(stderr, "  able to run: threads");
    } else {
      std::fprintf(stderr, "  at %s (0x%x), %s:%d: threads", thread.waits_at, thread.detail,
                   thread.site.file, thread.site.line);
    }
    for (unsigned i = first; i < w.thread_count; ++i) {
      if (!same_place(thread, w.threads[i])) continue;
      const unsigned start = i;
      for (; i < w.thread_count && same_place(thread, w.threads[i]); ++i) told[i] = true;
      std::fprintf(stderr, start + 1 == i ? " %u" : " %u-%u", start, i - 1);
    }
    std::fprintf(stderr, "\n");
  }
}

void shuffle(Random& random, unsigned char* values, unsigned count) {
  for (unsigned i = count; i > 1; --i) {
    const unsigned j = random.below(i);
    const unsigned char swapped = values[j];
    values[j] = values[i - 1];
    values[i - 1] = swapped;
  }
}

[[noreturn]] void thread_main() {
  Worker& w = *worker;
#if defined(VLMQ_SANITIZE_ADDRESS)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (w.host_stack == nullptr) {
    w.host_stack = bottom;
    w.host_stack_bytes = bytes;
  }
#endif
  acquire(&w.launch->begun);
  w.launch->entry(w.launch->arguments);
  Thread& thread = *self();
  thread.exited = true;
  thread.warp->exited |= 1u << thread.lane;
  check_no_one_waits_for(thread);
  if (w.barriers[0].arrived != 0) {
    fail(w.barriers[0].site,
         "barrier after exit: a thread returns while others wait at __syncthreads");
  }
  release(&w.launch->ended);
  Thread* next = --w.live == 0 ? &w.host : next_thread(w, thread.warp);
  if (next == nullptr) report_deadlock();
  switch_to(w, thread, *next, true);
  __builtin_unreachable();
}

}  // namespace

void fail(Site site, const char* format, ...) {
  one_report.lock();  // never unlocked: the first failure is the one to read
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "emulator: ");
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (site.file != nullptr) std::fprintf(stderr, "\n  at %s:%d", site.file, site.line);
  if (const Worker* w = worker; w != nullptr && w->launch != nullptr) {
    const uint3 block = w->view.index;
    std::fprintf(stderr, "\n  kernel %s, block (%u, %u, %u)", w->launch->kernel, block.x, block.y,
                 block.z);
    if (current != nullptr && current != &w->host)
      std::fprintf(stderr, ", thread %u", current->linear);
    std::fprintf(stderr, ", seed %llu\n", static_cast<unsigned long long>(w->launch->seed));
    report_threads(*w);
  } else {
    std::fprintf(stderr, "\n");
  }
  std::fflush(stderr);
  std::abort();
}

void report_deadlock() {
  fail(
      {nullptr, 0},
      "deadlock: no thread can go on (divergent barrier, or threads waiting for different things)");
}

Worker* Worker::create() {
  auto* created = static_cast<Worker*>(map(sizeof(Worker)));
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (char*& stacks : created->stack_sets) {
    stacks = static_cast<char*>(map(kMaxThreads * kStackBytes));
    // An overflow faults instead of changing the neighbour's variables.
    for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kStackBytes, page, PROT_NONE);
  }
  return created;
}

// Of exactly the size asked for, so that AddressSanitizer sees the first byte beyond; fresh for
// each block, and NaN.
void Worker::provide_shared() {
  const size_t bytes = launch->shared_bytes;
  if (kFindRaces) {
    // A new mapping has no history: what the previous block did in the same place is no race.
    shared = bytes == 0 ? nullptr : static_cast<unsigned char*>(map(bytes));
    tokens = static_cast<char*>(map(kTokenBytes));
  } else if (shared == nullptr || bytes > shared_capacity) {
    std::free(shared);
    void* got = nullptr;
    if (posix_memalign(&got, 128, bytes == 0 ? 1 : bytes) != 0) fail({nullptr, 0}, "no memory");
    shared = static_cast<unsigned char*>(got);
  }
  shared_capacity = std::max(shared_capacity, bytes);
  for (size_t i = 0; i < bytes; ++i) shared[i] = 0xff;
  view.shared = shared;
}

void Worker::return_shared() {
#if defined(VLMQ_SANITIZE_ADDRESS)
  std::free(shared);
  shared = nullptr;
#elif defined(VLMQ_SANITIZE_THREAD)
  if (shared != nullptr) munmap(shared, launch->shared_bytes);
  munmap(tokens, kTokenBytes);
#endif
}

void Worker::start_thread(unsigned id) {
  Thread& thread = threads[id];
  const dim3 size = launch->block;
  thread.index = {id % size.x, id / size.x % size.y, id / (size.x * size.y)};
  thread.linear = id;
  thread.block = &view;
  thread.warp = &warps[id / kLanes];
  thread.lane = id % kLanes;
  thread.waits_at = nullptr;
  thread.exited = false;
  thread.first_copy = thread.end_copy = thread.commits = 0;
  // Tops of stacks 64 KiB apart fall into the same cache sets: spread them.
  const size_t offset = id % 16 * 256;
  thread.context.prepare(stacks + id * kStackBytes, kStackBytes - offset, thread_main);
  thread.fake_stack = nullptr;
#if defined(VLMQ_SANITIZE_THREAD)
  if (fibers[id] == nullptr) fibers[id] = __tsan_create_fiber(0);
  thread.fiber = fibers[id];
#endif
}

void Worker::start_block(uint64_t index) {
  const dim3 grid = launch->grid;
  thread_count = launch->block.x * launch->block.y * launch->block.z;
  warp_count = (thread_count + kLanes - 1) / kLanes;
  live = thread_count;
  view.index = {static_cast<unsigned>(index % grid.x),
                static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / (uint64_t{grid.x} * grid.y))};
  view.size = launch->block;
  view.grid = grid;
  random.state = (launch->seed + 1) * 0x9e3779b97f4a7c15ull ^ (index + 1) * 0xbf58476d1ce4e5b9ull;
  if (random.state == 0) random.state = 1;
  random.next();
  provide_shared();
  release(&launch->begun);
  const unsigned set = random.below(kFiberSets);
  stacks = stack_sets[set];
  fibers = fiber_sets[set];
  for (Barrier& barrier : barriers) {
    barrier.expected = barrier.arrived = 0;
    for (unsigned i = 0; i < warp_count; ++i) barrier.waiting[i] = 0;
  }
  for (unsigned i = 0; i < warp_count; ++i) {
    Warp& warp = warps[i];
    const unsigned lanes = thread_count - i * kLanes;
    warp.exists = lanes >= kLanes ? 0xffffffffu : (1u << lanes) - 1;
    warp.exited = 0;
    warp.cursor = 0;
    for (unsigned j = 0; j < kLanes; ++j) warp.order[j] = static_cast<unsigned char>(j);
    shuffle(random, warp.order, kLanes);
    for (unsigned j = 0; j < kLanes; ++j) warp.place[warp.order[j]] = static_cast<unsigned char>(j);
    warp.ready = 0;
    make_ready(warp, warp.exists);
    warp.open = nullptr;
    if (warp.pool == nullptr) {
      for (Rendezvous& meeting : warp.meetings) {
        meeting.next = warp.pool;
        warp.pool = &meeting;
      }
    }
    priority[i] = static_cast<unsigned char>(i);
  }
  shuffle(random, priority, warp_count);
  for (unsigned i = 0; i < thread_count; ++i) start_thread(i);
}

void Worker::run_block(const Launch& what, uint64_t index) {
  worker = this;
  launch = &what;
  host.linear = kMaxThreads;
  start_block(index);
#if defined(VLMQ_SANITIZE_THREAD)
  host.fiber = __tsan_get_current_fiber();
#endif
  host_stack = nullptr;
  switch_to(*this, host, *next_thread(*this, nullptr), false);
  return_shared();
  current = nullptr;
  launch = nullptr;
  worker = nullptr;
}

// After each barrier another warp may be the one to run ahead: fixed or rotating orders hide
// missing trailing barriers.
static void draw_priorities(Worker& w) { shuffle(w.random, w.priority, w.warp_count); }

static void meet(Barrier& at, unsigned expected, const char* name, uint32_t detail, bool same_site,
                 Site site) {
  Worker& w = *worker;
  Thread& thread = *self();
  if (at.arrived == 0) {
    at.expected = expected;
    at.site = site;
  } else if (at.expected != expected) {
    thread.waits_at = name, thread.site = site, thread.detail = detail;
    fail(site, "divergent barrier: %s with %u threads, where others wait with %u", name, expected,
         at.expected);
  } else if (same_site && (at.site.line != site.line || at.site.file != site.file)) {
    thread.waits_at = name, thread.site = site, thread.detail = detail;
    fail(site, "divergent barrier: others wait at %s:%d", at.site.file, at.site.line);
  }
  void* token = w.token(at);
  release(token);
  at.waiting[&*thread.warp - w.warps] |= 1u << thread.lane;
  if (++at.arrived == at.expected) {
    at.arrived = 0;
    ++at.epoch;
    for (unsigned i = 0; i < w.warp_count; ++i) {
      make_ready(w.warps[i], at.waiting[i]);
      at.waiting[i] = 0;
    }
    draw_priorities(w);
    switch_away(false);
  } else {
    thread.waits_at = name, thread.site = site, thread.detail = detail;
    switch_away(true);
    thread.waits_at = nullptr;
  }
  acquire(token);
}

void barrier(Site site) {
  Worker& w = *worker;
  if (w.live != w.thread_count) {
    Thread& thread = *self();
    thread.waits_at = "__syncthreads", thread.site = site, thread.detail = 0;
    fail(site, "barrier after exit: __syncthreads where %u threads of the block have returned",
         w.thread_count - w.live);
  }
  meet(w.barriers[0], w.thread_count, "__syncthreads", 0, true, site);
}

void named_barrier(int id, int threads, Site site) {
  if (id < 1 || id >= static_cast<int>(kBarriers))
    fail(site, "named barrier %d: ids are 1 to 15", id);
  if (threads < 32 || threads % 32 != 0)
    fail(site, "named barrier of %d threads: whole warps only", threads);
  meet(worker->barriers[id], static_cast<unsigned>(threads), "bar_sync", static_cast<uint32_t>(id),
       false, site);
}

// Orders everything before it in one thread with everything after it in a thread that fences later:
// more than CUDA promises without an atomic between the two.
void fence() {
  static char token;
  release(&token);
  acquire(&token);
}

bool defer_copy(const Copy& copy, Site site) {
  Worker& w = *worker;
  if (w.random.next() & 1) return false;
  Thread& thread = *self();
  if (thread.end_copy - thread.first_copy == kMaxCopies) {
    fail(site, "a thread has more than %u cp.async under way: is there no wait?", kMaxCopies);
  }
  w.copies[thread.linear][thread.end_copy++ % kMaxCopies] = {copy, thread.commits};
  return true;
}

void commit_copies() { ++self()->commits; }

bool next_copy_due(unsigned groups_in_flight, Copy* copy) {
  Thread& thread = *self();
  if (thread.first_copy == thread.end_copy) return false;
  const QueuedCopy& queued = worker->copies[thread.linear][thread.first_copy % kMaxCopies];
  if (queued.group + groups_in_flight >= thread.commits) return false;
  *copy = queued.copy;
  ++thread.first_copy;
  return true;
}

}  // namespace vlmq::emulator
