// Launches: checks the configuration as a GPU would and spreads the blocks over OS threads.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "emulator/scheduler.h"

namespace vlmq::emulator {

namespace {

std::mutex free_workers_lock;
Worker* free_workers;

Worker* take_worker() {
  const std::lock_guard<std::mutex> held(free_workers_lock);
  if (free_workers == nullptr) return Worker::create();
  Worker* taken = free_workers;
  free_workers = taken->next_free;
  return taken;
}

void give_back(Worker* given) {
  const std::lock_guard<std::mutex> held(free_workers_lock);
  given->next_free = free_workers;
  free_workers = given;
}

uint64_t from_environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  const uint64_t value = std::strtoull(text, &end, 10);
  if (*end != '\0') fail({nullptr, 0}, "%s=%s is not a number", name, text);
  return value;
}

// Of the calling OS thread, so that tests which run side by side each have their own.
thread_local bool seed_is_set;
thread_local uint64_t set_seed;
thread_local uint64_t set_shared_kib;  // 0: as the environment says

// KiB of shared memory that GPUs give a block: compute capability 8.6, 8.9 and 12.x; 8.0 and 8.7;
// 9.0 and 10.x.
uint64_t checked_shared_kib(uint64_t kib) {
  if (kib != 99 && kib != 163 && kib != 227) {
    fail({nullptr, 0}, "%llu KiB of shared memory: GPUs give a block 99, 163 or 227 KiB",
         static_cast<unsigned long long>(kib));
  }
  return kib;
}

constexpr Error kErrors[] = {
    {"cudaErrorInvalidValue: invalid argument", false, false},
    {"cudaErrorMemoryAllocation: out of memory", false, false},
    {"cudaErrorLaunchOutOfResources: too many resources requested for launch", false, false},
    {"cudaErrorNoKernelImageForDevice: no kernel image is available for execution on the device",
     false, true},
    {"cudaErrorIllegalAddress: an illegal memory access was encountered", true, false},
    {"cudaErrorMisalignedAddress: misaligned address", true, false},
    {"cudaErrorLaunchFailure: unspecified launch failure", true, false},
};

// A failure to come, or one that has come.
struct Fault {
  std::string name;
  const Error* error = nullptr;  // none
  uint64_t ahead = 0;            // operations of that name up to the one that fails
  bool is_raised = false;        // a late error, from then on
};

// NAME:ERROR or NAME:ERROR:N.
Fault fault_of(const char* text) {
  const std::string all = text;
  const size_t first = all.find(':'), second = all.find(':', first + 1);
  Fault fault;
  fault.name = all.substr(0, first);
  fault.ahead = second == std::string::npos ? 1 : std::strtoull(&all[second + 1], nullptr, 10);
  if (first != std::string::npos) {
    const std::string error = all.substr(first + 1, second - first - 1) + ":";
    for (const Error& known : kErrors) {
      if (std::strncmp(known.text, error.c_str(), error.size()) == 0) fault.error = &known;
    }
  }
  if (fault.name.empty() || fault.error == nullptr || fault.ahead == 0) {
    fail({nullptr, 0}, "%s is no failure: NAME:ERROR or NAME:ERROR:N, with an error of kErrors",
         text);
  }
  return fault;
}

// As the seed: the environment's is the whole program's, one that was set its thread's.
thread_local bool fault_is_set;
thread_local Fault set_fault;
std::mutex fault_lock;

Fault& current_fault() {
  static Fault of_environment = [] {
    const char* text = std::getenv("VLMQ_EMULATOR_FAIL");
    return text == nullptr || *text == '\0' ? Fault() : fault_of(text);
  }();
  return fault_is_set ? set_fault : of_environment;
}

// Whether a kernel as VLMQ_LAUNCH has it, perhaps in parentheses and with template arguments, is
// the one named.
bool is_named(const char* kernel, const std::string& name) {
  kernel += *kernel == '(';
  const char next =
      std::strncmp(kernel, name.c_str(), name.size()) == 0 ? kernel[name.size()] : 'x';
  return next == '\0' || next == '<';
}

// Adds to the file that VLMQ_EMULATOR_LOG names, once a process: the program, the call of the C
// API, and the kernel or the runtime's function. Whole lines, so that processes may share a file.
void log_once(const char* call, const char* operation) {
  static const char* const file = std::getenv("VLMQ_EMULATOR_LOG");
  if (file == nullptr || *file == '\0') return;
  static std::set<std::string> seen;
  static const std::string program =
      std::filesystem::read_symlink("/proc/self/exe").filename().string();
  const std::string line = program + " " + call + " " + operation + "\n";
  if (!seen.insert(line).second) return;
  std::FILE* log = std::fopen(file, "a");
  if (log == nullptr || std::fputs(line.c_str(), log) < 0 || std::fclose(log) != 0) {
    fail({nullptr, 0}, "%s: cannot be written", file);
  }
}

}  // namespace

const Error* enqueue(const char* call, const char* operation) {
  const std::lock_guard<std::mutex> held(fault_lock);
  log_once(call, operation);
  Fault& fault = current_fault();
  if (fault.error == nullptr || fault.is_raised) return fault.error;
  if (fault.ahead == 0 || (call != fault.name && !is_named(operation, fault.name))) return nullptr;
  if (--fault.ahead > 0) return nullptr;
  fault.is_raised = fault.error->is_late;
  return fault.is_raised ? nullptr : fault.error;
}

size_t shared_bytes_of_a_block() {
  static const uint64_t default_kib =
      checked_shared_kib(from_environment("VLMQ_EMULATOR_SHARED_KIB", 163));
  return (set_shared_kib != 0 ? set_shared_kib : default_kib) << 10;
}

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            void (*entry)(const void*), const void* arguments) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const Site nowhere{nullptr, 0};
  if (current != nullptr) fail(nowhere, "kernel %s is launched from a kernel", kernel);
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    fail(nowhere, "kernel %s: block of %u x %u x %u threads", kernel, block.x, block.y, block.z);
  }
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail(nowhere, "kernel %s: grid of %u x %u x %u blocks", kernel, grid.x, grid.y, grid.z);
  }
  if (shared_bytes > shared_bytes_of_a_block()) {
    fail(nowhere, "kernel %s: %zu bytes of shared memory, the GPU gives a block %zu", kernel,
         shared_bytes, shared_bytes_of_a_block());
  }

  static const uint64_t default_seed = from_environment("VLMQ_EMULATOR_SEED", 0);
  // ThreadSanitizer finds races between threads that never ran at once; a second worker would
  // double its fibers.
  static const uint64_t max_workers = from_environment(
      "VLMQ_EMULATOR_THREADS", kFindRaces ? 1 : std::max(1u, std::thread::hardware_concurrency()));
  const Launch what{
      kernel, grid, block, shared_bytes, entry, arguments, seed_is_set ? set_seed : default_seed};
  // An OS thread takes some 20 us to start: not worth it below this many CUDA threads.
  const uint64_t count =
      blocks * threads < 4096 ? 1 : std::max<uint64_t>(1, std::min(max_workers, blocks));
  Random random{what.seed * 2 + 1};
  const uint64_t first_block =
      random.below(static_cast<uint32_t>(std::min<uint64_t>(blocks, 0xffffffffu)));
  const bool backwards = random.next() & 1;
  std::atomic<uint64_t> next{0};
  const auto work = [&](Worker* with) {
    for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      const uint64_t at = (i + first_block) % blocks;
      with->run_block(what, backwards ? blocks - 1 - at : at);
    }
  };
  // All are taken before any starts: the pool's lock would order one worker's blocks before
  // another's for ThreadSanitizer.
  std::vector<Worker*> workers(count);
  for (Worker*& each : workers) each = take_worker();
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < count; ++i) helpers.emplace_back(work, workers[i]);
  work(workers[0]);
  for (std::thread& helper : helpers) helper.join();
  acquire(&what.ended);
  for (Worker* each : workers) give_back(each);
}

}  // namespace vlmq::emulator

// The schedule of the launches that follow on the calling OS thread.
extern "C" __attribute__((visibility("default"))) void vlmq_emulator_set_seed(uint64_t seed) {
  vlmq::emulator::seed_is_set = true;
  vlmq::emulator::set_seed = seed;
}

// What fails on the calling OS thread, in place of what VLMQ_EMULATOR_FAIL says and in its form;
// "": nothing.
extern "C" __attribute__((visibility("default"))) void vlmq_emulator_fail(const char* what) {
  using namespace vlmq::emulator;
  fault_is_set = true;
  set_fault = *what == '\0' ? Fault() : fault_of(what);
}

// What a synchronization would return: the error that a kernel has raised, in words, or NULL.
extern "C" __attribute__((visibility("default"))) const char* vlmq_emulator_synchronize() {
  using namespace vlmq::emulator;
  const std::lock_guard<std::mutex> held(fault_lock);
  const Fault& fault = current_fault();
  return fault.is_raised ? fault.error->text : nullptr;
}

// What the device of the launches that follow on the calling OS thread gives a block.
extern "C" __attribute__((visibility("default"))) void vlmq_emulator_set_shared_kib(uint64_t kib) {
  vlmq::emulator::set_shared_kib = vlmq::emulator::checked_shared_kib(kib);
}
