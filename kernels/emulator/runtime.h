// What kernels, compiled by the host compiler and perhaps instrumented, ask of the emulator's
// runtime, which never is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/vector_types.h"

namespace vlmq::emulator {

// Where a kernel calls: a default argument of each collective, so it names the kernel's line, not
// this folder's.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct BlockView {
  uint3 index;
  dim3 size, grid;
  unsigned char* shared;
};

struct ThreadView {
  uint3 index;
  unsigned linear;
  const BlockView* block;
};

// The CUDA thread that runs on this OS thread. initial-exec: one instruction instead of a call,
// also in a library that is opened at run time.
extern __thread const ThreadView* current __attribute__((tls_model("initial-exec")));

// Runs entry(arguments) once per CUDA thread and returns when all have finished.
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            void (*entry)(const void*), const void* arguments);

// An error of CUDA's.
struct Error {
  const char* text;  // cudaErrorIllegalAddress: an illegal memory access was encountered
  bool is_late;      // a kernel raises it while it runs; whatever comes next reports it
  bool lacks_image;
};

// Asked before anything is enqueued by `call` (of the C API), `operation` being the kernel's name
// or the runtime's function: the error that it must fail with, or null. See vlmq_emulator_fail.
const Error* enqueue(const char* call, const char* operation);

// Shared memory that the emulated device gives a block.
size_t shared_bytes_of_a_block();

// Stops the program with the kernel, the block, what went wrong and where each thread is.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

void barrier(Site site);
void named_barrier(int id, int threads, Site site);
void fence();

// Warp collectives. All lanes of `mask` meet before any goes on; only sync_warp orders memory.
void sync_warp(uint32_t mask, Site site);
uint32_t ballot(const char* operation, uint32_t mask, bool predicate, Site site);
uint64_t shuffle(const char* operation, uint32_t mask, uint64_t value, unsigned source, Site site);
// `row` is the lane's row, already read; the first 8 * matrices lanes contribute.
void load_matrix(const char* operation, int matrices, bool transposed, const uint4* row,
                 uint32_t* out, Site site);
enum class Operand { kBfloat16, kHalf, kTf32 };
void multiply(Operand operand, float* d, const uint32_t* a, const uint32_t* b, Site site);

// Asynchronous copies of the calling thread.
struct Copy {
  void* target;
  const void* source;
  unsigned size, valid;
};
bool defer_copy(const Copy& copy,
                Site site);  // false: the schedule wants it done at once, by the caller
void commit_copies();
bool next_copy_due(unsigned groups_in_flight, Copy* copy);

}  // namespace vlmq::emulator
