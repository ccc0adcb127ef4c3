// One wrapper per PTX instruction (sm_80 and newer), its twin for the emulator beside it.
#pragma once

#include <cstdint>

#ifdef VLMQ_EMULATED
#define VLMQ_CALLER VLMQ_SITE
#else
#include <cuda_runtime.h>
#define VLMQ_CALLER
#endif

namespace vlmq {

#ifndef VLMQ_EMULATED
/// The address in shared memory's own window that these instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

/// Starts copying 16 bytes from global to shared memory, past L1: the first `valid_bytes` (0 to 16)
/// are read, the rest become zero. Both addresses are multiples of 16, also where nothing is read.
__device__ __forceinline__ void cp_async_16(void* target, const void* source,
                                            int valid_bytes VLMQ_CALLER) {
#ifdef VLMQ_EMULATED
  emulator::copy_async(target, source, 16, valid_bytes, site);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(__cvta_generic_to_global(source)), "r"(valid_bytes)
               : "memory");
#endif
}

/// The same for 4 bytes, for rows whose stride is not a multiple of 16 bytes.
__device__ __forceinline__ void cp_async_4(void* target, const void* source,
                                           int valid_bytes VLMQ_CALLER) {
#ifdef VLMQ_EMULATED
  emulator::copy_async(target, source, 4, valid_bytes, site);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(target)),
               "l"(__cvta_generic_to_global(source)), "r"(valid_bytes)
               : "memory");
#endif
}

/// Closes a group: the calling thread's copies since the last commit. Empty groups count too.
__device__ __forceinline__ void cp_async_commit() {
#ifdef VLMQ_EMULATED
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until at most the N latest groups of the calling thread are under way. Other threads'
/// copies need a barrier after it.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  static_assert(N >= 0, "a number of groups");
#ifdef VLMQ_EMULATED
  emulator::wait_copies(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

/// Four 8x8 matrices of 16-bit elements. Lane l names row l % 8 of matrix l / 8: 16 bytes of shared
/// memory at a multiple of 16. Lane l receives of matrix i, in r[i], the elements (l / 4, l % 4 *
/// 2) and (l / 4, l % 4 * 2 + 1).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row VLMQ_CALLER) {
#ifdef VLMQ_EMULATED
  emulator::check_aligned(row, 16, "row of ldmatrix", site);
  emulator::load_matrix("ldmatrix.x4", 4, false, static_cast<const uint4*>(row), r, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

/// The same of the transposed matrices: lane l receives the elements (l % 4 * 2, l / 4) and (l % 4
/// * 2 + 1, l / 4).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row VLMQ_CALLER) {
#ifdef VLMQ_EMULATED
  emulator::check_aligned(row, 16, "row of ldmatrix", site);
  emulator::load_matrix("ldmatrix.x4.trans", 4, true, static_cast<const uint4*>(row), r, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

/// Two matrices, of rows named by lanes 0 to 15. The other lanes' addresses are not used, but be
/// they good ones.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row VLMQ_CALLER) {
#ifdef VLMQ_EMULATED
  emulator::check_aligned(row, 16, "row of ldmatrix", site);
  emulator::load_matrix("ldmatrix.x2", 2, false, static_cast<const uint4*>(row), r, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row VLMQ_CALLER) {
#ifdef VLMQ_EMULATED
  emulator::check_aligned(row, 16, "row of ldmatrix", site);
  emulator::load_matrix("ldmatrix.x2.trans", 2, true, static_cast<const uint4*>(row), r, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

/// d += a b for 16x16 a and 16x8 b of bf16, float32 sums; the layouts are drawn in mma.cuh.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2] VLMQ_CALLER) {
#ifdef VLMQ_EMULATED
  emulator::multiply(emulator::Operand::kBfloat16, d, a, b, site);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/// The same for f16.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2] VLMQ_CALLER) {
#ifdef VLMQ_EMULATED
  emulator::multiply(emulator::Operand::kHalf, d, a, b, site);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/// d += a b for 16x8 a and 8x8 b of tf32 (cvt_tf32 makes them; the lowest 13 bits are ignored).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2] VLMQ_CALLER) {
#ifdef VLMQ_EMULATED
  emulator::multiply(emulator::Operand::kTf32, d, a, b, site);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/// Rounds to tf32's 11 significant bits, ties away from zero (the only rounding that sm_80 has for
/// it).
__device__ __forceinline__ uint32_t cvt_tf32(float value) {
#ifdef VLMQ_EMULATED
  const uint32_t bits = emulator::bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffffffu;
  if (magnitude == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
#else
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
#endif
}

/// A barrier of `threads` threads of the block (whole warps), one of 15: id 1 to 15, 0 being
/// __syncthreads.
__device__ __forceinline__ void bar_sync(int id, int threads VLMQ_CALLER) {
#ifdef VLMQ_EMULATED
  emulator::named_barrier(id, threads, site);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace vlmq

#undef VLMQ_CALLER
