// The tile that packing and unpacking share: some runs by some codes, turned around in shared
// memory, since codes and words may be contiguous in different directions (a layer's codes along
// its inputs, GPTQ's words along its outputs).
#pragma once

#include <cstdint>

#include "device/arguments.cuh"
#include "device/launch.cuh"
#include "device/types.cuh"
#include "format/bits.cuh"

namespace vlmq {

constexpr int kThreads = 256;
constexpr int kTileRuns = 32;
constexpr int kTileUnits = 4;
constexpr int kTileCodes = kTileUnits * kUnit;
/// Runs start one bank after the last: neighbours along the runs never meet in a bank.
constexpr int kCodeStride = kTileCodes + 4;
constexpr int kWordStride = kTileUnits * 8 + 1;

/// Element `i` of run `r` where `width` elements of a run are walked by the tile's threads: along
/// the run where its elements are neighbours in memory, else along the runs.
struct Walk {
  bool along_run;
  int width;
  __device__ int run(int step) const { return along_run ? step / width : step % kTileRuns; }
  __device__ int element(int step) const { return along_run ? step % width : step / kTileRuns; }
};

/// Where a tile lies.
struct TilePlace {
  long long run, code;
};

/// Tiles of neighbouring runs follow each other: words of GPTQ are neighbours along the runs.
__device__ __forceinline__ TilePlace tile_place(long long runs) {
  const long long across = (runs + kTileRuns - 1) / kTileRuns;
  const long long index = blockIdx.x;
  return {index % across * kTileRuns, index / across * kTileCodes};
}

inline long long tile_count(long long runs, long long count) {
  return ceil_div(runs, kTileRuns) * ceil_div(count, kTileCodes);
}

/// Whether no two elements of `runs` x `count` share a place: either runs lie one behind the other,
/// or they interleave.
inline bool valid_strides(int64_t runs, int64_t count, int64_t stride, int64_t run_stride) {
  if (stride <= 0 || run_stride <= 0) return false;
  return count - 1 <= (run_stride - 1) / stride || runs - 1 <= (stride - 1) / run_stride;
}

/// For the arguments of packing and of unpacking.
template <class Args>
bool valid_packing(const Args& a) {
  if (a.runs < 0 || a.count < 0 || !valid_bits(a.bits)) return false;
  if (a.runs == 0 || a.count == 0) return true;
  return a.codes && a.words && valid_strides(a.runs, a.count, a.code_stride, a.code_run_stride) &&
         valid_strides(a.runs, packed_words(a.count, a.bits), a.word_stride, a.word_run_stride) &&
         tile_count(a.runs, a.count) <= INT32_MAX;
}

}  // namespace vlmq
