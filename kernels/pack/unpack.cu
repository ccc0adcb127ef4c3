// Dense words to codes, a byte each: pack.cu the other way round.
#include "pack/tile.cuh"

namespace vlmq {
namespace {

constexpr size_t kShared = kTileRuns * kWordStride * sizeof(uint32_t);

struct TileWords {
  const uint32_t* words;
  __device__ uint32_t operator()(int j) const { return words[j]; }
};

template <int kBits>
__global__ void __launch_bounds__(kThreads) unpack_kernel(vlmq_unpack_args args) {
  uint32_t* const tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  const TilePlace place = tile_place(args.runs);
  const long long runs = args.runs - place.run, count = args.count - place.code;
  const int thread = static_cast<int>(threadIdx.x);

  const long long words = packed_words(args.count, kBits);
  const long long first_word = place.code / kUnit * kBits;
  const uint32_t* const source =
      args.words + place.run * args.word_run_stride + first_word * args.word_stride;
  const Walk read{args.word_stride == 1, kTileUnits * kBits};
  for (int step = thread; step < kTileRuns * kTileUnits * kBits; step += kThreads) {
    const int run = read.run(step), word = read.element(step);
    const bool is_there = run < runs && first_word + word < words;
    tile[run * kWordStride + word] =
        is_there ? source[run * args.word_run_stride + word * args.word_stride] : 0u;
  }
  __syncthreads();

  uint8_t* const codes =
      args.codes + place.run * args.code_run_stride + place.code * args.code_stride;
  const uint32_t mask = code_mask(kBits), add = static_cast<uint32_t>(args.add);
  const Walk write{args.code_stride == 1, kTileCodes / 4};
  for (int step = thread; step < kTileRuns * kTileCodes / 4; step += kThreads) {
    const int run = write.run(step), code = 4 * write.element(step);
    if (run >= runs || code >= count) continue;
    const TileWords unit{tile + run * kWordStride + code / kUnit * kBits};
    uint32_t four = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      four |= ((code_of_unit(unit, code % kUnit + i, kBits) + add) & mask) << 8 * i;
    }
    uint8_t* const target = codes + run * args.code_run_stride + code * args.code_stride;
    const bool whole = code + 4 <= count;
    if (write.along_run && whole && is_aligned(target, 4)) {
      store_vector(target, four);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (code + i < count) {
        target[i * args.code_stride] = static_cast<uint8_t>(four >> 8 * i & 0xff);
      }
    }
  }
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_unpack, args, stream) {
  using namespace vlmq;
  if (!args || !valid_packing(*args)) return VLMQ_BAD_ARGUMENT;
  if (args->runs == 0 || args->count == 0) return VLMQ_OK;
  const dim3 grid(static_cast<unsigned>(tile_count(args->runs, args->count)));
  return with_bits(args->bits, [&](auto width) {
    return VLMQ_LAUNCH(unpack_kernel<decltype(width)::kBits>, grid, kThreads, kShared, stream,
                       *args);
  });
}
