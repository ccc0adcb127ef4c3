// Codes, a byte each, to dense words: tiles of runs by codes. Neighbouring threads read neighbours
// in memory and write neighbours in memory, whatever direction each runs in.
#include "pack/tile.cuh"

namespace vlmq {
namespace {

constexpr size_t kShared = kTileRuns * kCodeStride;

struct TileCodes {
  const uint8_t* codes;
  __device__ uint32_t operator()(int i) const { return codes[i]; }
};

template <int kBits>
__global__ void __launch_bounds__(kThreads) pack_kernel(vlmq_pack_args args) {
  uint8_t* const tile = dynamic_shared();
  const TilePlace place = tile_place(args.runs);
  const long long runs = args.runs - place.run, count = args.count - place.code;
  const uint8_t* const codes =
      args.codes + place.run * args.code_run_stride + place.code * args.code_stride;
  const int thread = static_cast<int>(threadIdx.x);

  // Four neighbours of a run at a time where they are neighbours in memory.
  const uint32_t mask = code_mask(kBits), subtract = static_cast<uint32_t>(args.subtract);
  const Walk read{args.code_stride == 1, kTileCodes / 4};
  for (int step = thread; step < kTileRuns * kTileCodes / 4; step += kThreads) {
    const int run = read.run(step), code = 4 * read.element(step);
    const uint8_t* const source = codes + run * args.code_run_stride + code * args.code_stride;
    uint32_t four = 0;
    if (run < runs && code < count) {
      const bool whole = code + 4 <= count;
      if (read.along_run && whole && is_aligned(source, 4)) {
        four = load_vector<uint32_t>(source);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (code + i < count) four |= uint32_t{source[i * args.code_stride]} << 8 * i;
        }
      }
      uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // What pads the run stays zero.
        if (code + i < count) packed |= (((four >> 8 * i) - subtract) & mask) << 8 * i;
      }
      four = packed;
    }
    store_vector(tile + run * kCodeStride + code, four);
  }
  __syncthreads();

  const long long words = packed_words(args.count, kBits);
  const long long first_word = place.code / kUnit * kBits;
  uint32_t* const target =
      args.words + place.run * args.word_run_stride + first_word * args.word_stride;
  const Walk write{args.word_stride == 1, kTileUnits * kBits};
  for (int step = thread; step < kTileRuns * kTileUnits * kBits; step += kThreads) {
    const int run = write.run(step), word = write.element(step);
    if (run >= runs || first_word + word >= words) continue;
    const TileCodes unit{tile + run * kCodeStride + word / kBits * kUnit};
    target[run * args.word_run_stride + word * args.word_stride] =
        word_of_unit(unit, word % kBits, kBits);
  }
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_pack, args, stream) {
  using namespace vlmq;
  if (!args || !valid_packing(*args)) return VLMQ_BAD_ARGUMENT;
  if (args->runs == 0 || args->count == 0) return VLMQ_OK;
  const dim3 grid(static_cast<unsigned>(tile_count(args->runs, args->count)));
  return with_bits(args->bits, [&](auto width) {
    return VLMQ_LAUNCH(pack_kernel<decltype(width)::kBits>, grid, kThreads, kShared, stream, *args);
  });
}
