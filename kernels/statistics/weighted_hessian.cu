// vlmq_weighted_hessian: the layer's statistics, over all tokens.
//
// Tokens are taken in passes, each of up to three launches:
// - column_maxima: the largest magnitude of each operand's columns, for their scales;
// - weighted_hessian_tiles: a block per tile (of H on and above the diagonal, then all of C) and
//   split of the tokens;
// - add_partials: the splits' sums into H and C, in order. One split alone writes there itself.
//
// H and C are tiles of one launch and not sums of one block: both at once would need twice the 128
// registers that a thread's products and sums take. The blocks that run at the same time share
// rows and columns, so that u comes from L2.
#include "statistics/weighted_hessian.cuh"

namespace vlmq::statistics {
namespace {

// The roundings of n float32 additions of like size come to about sqrt(n / 3) times 2^-25 of the
// sum (root mean square): 1.4e-7 for the 64 promotions of 8192 tokens, beside the 3e-7 and more
// that tensor cores cut off. Sums of 65536 tokens came to 1.2e-6 at the worst entry of 18944 x
// 18944 on an H200, of 8192 tokens to 6e-7; each sum more is one addition more.
constexpr int64_t kSumTokens = 8192;
constexpr int64_t kPassTokens = 65536;

// Splits are made until there are 8 blocks for each of 132 multiprocessors, so that the last wave
// of blocks is short against the others: of the shape alone, for the order of sums hangs on it. A
// split's tile costs two trips of 64 KiB through memory, paid for by 1024 tokens' products.
constexpr int64_t kEnoughBlocks = 1056;
constexpr int64_t kLeastSplitTokens = 1024;
constexpr int64_t kSplitStep = 128;  // whole promotions, but for the last split

constexpr int64_t kMostFeatures = int64_t{1} << 20;
constexpr int kTileFloats = kTile * kTile;

// Tile rows that are walked together, column by column: 132 blocks in flight then read 8 + 17
// strips of 128 columns and not 1 + 132.
constexpr int kGroup = 8;

struct TilePlace {
  int row, col;
};

/// Tile `index` of those on and above the diagonal of a matrix of `side` x `side` tiles.
__device__ __forceinline__ TilePlace upper_tile(int index, int side) {
  for (int row = 0;; row += kGroup) {
    const int rows = min(kGroup, side - row);
    const int corner = rows * (rows + 1) / 2, count = corner + (side - row - rows) * rows;
    if (index >= count) {
      index -= count;
    } else if (index >= corner) {
      index -= corner;
      return {row + index % rows, row + rows + index / rows};
    } else {
      int col = 0;
      while ((col + 1) * (col + 2) / 2 <= index) ++col;
      return {row + index - col * (col + 1) / 2, row + col};
    }
  }
}

/// Tile `index` of all.
__device__ __forceinline__ TilePlace any_tile(int index, int side) {
  const int row = index / (kGroup * side) * kGroup, rows = min(kGroup, side - row);
  index -= row * side;
  return {row + index % rows, index / rows};
}

__device__ __forceinline__ TilePlace tile_place(const Problem& p, int tile) {
  const int side = static_cast<int>(ceil_div(p.features, kTile));
  return tile < p.hessian_tiles ? upper_tile(tile, side) : any_tile(tile - p.hessian_tiles, side);
}

constexpr int kMaximaRows = 8;       // tokens of a block at a time
constexpr int kMaximaTokens = 1024;  // tokens of a block

/// maxima[kRight] = max |u|, [kLeftHessian] = max |g^2 u|, [kLeftCross] = max |g^2 (f - u)| of each
/// column, as bits: of numbers that are not negative they rise as the numbers do, NaN on top.
template <class T>
__global__ void __launch_bounds__(kThreads) column_maxima(const Problem p, uint32_t* maxima) {
  constexpr int kElements = statistics::kElements<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32;
  const int col = (static_cast<int>(blockIdx.x) * 32 + lane) * kElements;
  const int begin = static_cast<int>(blockIdx.y) * kMaximaTokens;
  const int end = min(begin + kMaximaTokens, p.tokens);
  const int valid = max(0, min(kElements, p.features - col));
  uint32_t found[3][kElements] = {};

  const auto read = [&](const void* matrix, int64_t stride, int token, float(&values)[kElements]) {
    const T* source = static_cast<const T*>(matrix) + token * stride + col;
    if (p.aligned && valid == kElements) return widen_chunk<T>(source, values);
#pragma unroll
    for (int e = 0; e < kElements; ++e) values[e] = e < valid ? to_float(source[e]) : 0.0f;
  };
#pragma unroll 2
  for (int token = begin + row; token < end; token += kMaximaRows) {
    const float g = p.g == nullptr ? 1.0f : p.g[token];
    if (g == 0.0f || valid == 0) continue;
    float u[kElements], f[kElements];
    read(p.u, p.u_stride, token, u);
    if (p.f != nullptr) read(p.f, p.f_stride, token, f);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const auto raise = [&](Maximum of, float value) {
        found[of][e] = max(found[of][e], __float_as_uint(fabsf(value)));
      };
      raise(kRight, u[e]);
      raise(kLeftHessian, u[e] * (g * g));
      if (p.f != nullptr) raise(kLeftCross, (f[e] - u[e]) * (g * g));
    }
  }

  auto* rows = reinterpret_cast<uint32_t*>(dynamic_shared());  // [kMaximaRows, 32 * kElements]
#pragma unroll
  for (int of = 0; of < 3; ++of) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) rows[(row * kElements + e) * 32 + lane] = found[of][e];
    __syncthreads();
    // The warp `row` takes the elements `row`, so that lanes stay in their own banks.
    for (int e = row; e < valid; e += kMaximaRows) {
      uint32_t largest = 0;
      for (int i = 0; i < kMaximaRows; ++i)
        largest = max(largest, rows[(i * kElements + e) * 32 + lane]);
      if (largest != 0) atomicMax(&maxima[int64_t{of} * p.features + col + e], largest);
    }
    __syncthreads();
  }
}

template <class T, class S, bool kCross, bool kLow>
__device__ __forceinline__ void sum_tile(const Problem& p, TilePlace place, int tile) {
  const int first = static_cast<int>(blockIdx.y) * p.split_tokens;
  TileSum<T, S, kCross, kLow> sum(p, place.row, place.col, first,
                                  min(first + p.split_tokens, p.tokens));
  sum.run();
  if (p.partials != nullptr) {
    float* partial = p.partials + (int64_t{blockIdx.y} * gridDim.x + tile) * kTileFloats;
    sum.each([](int, int) { return 0.0f; },
             [&](int row, int col, float value) { partial[row * kTile + col] = value; });
    return;
  }
  float* out = kCross ? p.cross : p.hessian;
  const auto at = [&](int row, int col) -> float* {
    row += place.row * kTile, col += place.col * kTile;
    const bool counts = row < p.features && col < p.features && (kCross || row <= col);
    return counts ? out + int64_t{row} * p.features + col : nullptr;
  };
  sum.each(
      [&](int row, int col) {
        const float* entry = at(row, col);
        return entry == nullptr ? 0.0f : *entry;
      },
      [&](int row, int col, float value) {
        if (float* entry = at(row, col)) *entry = value;
      });
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 1) weighted_hessian_tiles(const Problem p) {
  const int tile = static_cast<int>(blockIdx.x);
  const TilePlace place = tile_place(p, tile);
  if (tile >= p.hessian_tiles) {
    if (p.fast)
      sum_tile<T, S, true, false>(p, place, tile);
    else
      sum_tile<T, S, true, true>(p, place, tile);
  } else if (p.fast || (sizeof(T) == 2 && p.g == nullptr)) {
    // Without g, 16-bit inputs have no low part.
    sum_tile<T, S, false, false>(p, place, tile);
  } else {
    sum_tile<T, S, false, true>(p, place, tile);
  }
}

constexpr int kSlices = 16;  // blocks that add one tile

__global__ void __launch_bounds__(kThreads) add_partials(const Problem p, int splits) {
  const int tile = static_cast<int>(blockIdx.x);
  const bool cross = tile >= p.hessian_tiles;
  const TilePlace place = tile_place(p, tile);
  constexpr int kSlice = kTileFloats / kSlices;
  for (int i = static_cast<int>(threadIdx.x); i < kSlice; i += kThreads) {
    const int at = static_cast<int>(blockIdx.y) * kSlice + i;
    const int row = place.row * kTile + at / kTile, col = place.col * kTile + at % kTile;
    if (row >= p.features || col >= p.features || (!cross && row > col)) continue;
    const float* partial = p.partials + int64_t{tile} * kTileFloats + at;
    float sum = 0.0f;
#pragma unroll 4
    for (int split = 0; split < splits; ++split)
      sum += partial[int64_t{split} * gridDim.x * kTileFloats];
    float* out = cross ? p.cross : p.hessian;
    out[int64_t{row} * p.features + col] += sum;
  }
}

/// How a pass over tokens is laid out.
struct Plan {
  int64_t tokens, hessian_tiles, tiles, splits, split_tokens;
};

/// The pass at the beginning of so many tokens: as many as its splits may sum.
Plan plan(const vlmq_weighted_hessian_args& args, int64_t tokens) {
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t side = ceil_div(args.features, kTile);
  const int64_t hessian_tiles = side * (side + 1) / 2;
  const int64_t tiles = hessian_tiles + (args.f == nullptr ? 0 : side * side);
  const int64_t wanted = ceil_div(kEnoughBlocks, tiles);
  tokens = least(tokens, least(wanted * kSumTokens, kPassTokens));
  const int64_t most = tokens < kLeastSplitTokens ? 1 : tokens / kLeastSplitTokens;
  const int64_t splits = least(wanted, most);
  const int64_t split_tokens = ceil_div(ceil_div(tokens, splits), kSplitStep) * kSplitStep;
  return {tokens, hessian_tiles, tiles, ceil_div(tokens, split_tokens), split_tokens};
}

int64_t maxima_bytes(const vlmq_weighted_hessian_args& args) {
  return ceil_div(3 * args.features * static_cast<int64_t>(sizeof(uint32_t)), 256) * 256;
}

bool sizes_are_good(const vlmq_weighted_hessian_args& args) {
  if (!is_dtype(args.dtype)) return false;
  if (args.tokens < 0 || args.features < 0 || args.features > kMostFeatures) return false;
  if ((args.f == nullptr) != (args.cross == nullptr)) return false;
  return args.u_stride >= args.features && (args.f == nullptr || args.f_stride >= args.features);
}

template <class T>
bool pointers_are_good(const vlmq_weighted_hessian_args& args) {
  if (args.u == nullptr || args.hessian == nullptr || args.workspace == nullptr) return false;
  return is_aligned(args.u, sizeof(T)) && is_aligned(args.f, sizeof(T)) && is_aligned(args.g, 4) &&
         is_aligned(args.hessian, 4) && is_aligned(args.cross, 4) &&
         is_aligned(args.workspace, 256);
}

template <class T>
vlmq_status enqueue_pass(const Problem& problem, const Plan& layout, uint32_t* maxima,
                         vlmq_stream stream) {
  const dim3 maxima_grid(static_cast<unsigned>(ceil_div(problem.features, 32 * kElements<T>)),
                         static_cast<unsigned>(ceil_div(problem.tokens, kMaximaTokens)));
  constexpr size_t kMaximaShared = kMaximaRows * 32 * kElements<T> * sizeof(uint32_t);
  vlmq_status status = VLMQ_LAUNCH(column_maxima<T>, maxima_grid, dim3(kThreads), kMaximaShared,
                                   stream, problem, maxima);
  if (status != VLMQ_OK) return status;

  const auto tiles = static_cast<unsigned>(layout.tiles);
  const dim3 grid(tiles, static_cast<unsigned>(layout.splits));
  status = with_layout<Stage<T, false>, Stage<T, true>>([&](auto layout) {
    using S = decltype(layout);
    return VLMQ_LAUNCH((weighted_hessian_tiles<T, S>), grid, dim3(kThreads), S::kSharedBytes,
                       stream, problem);
  });
  if (status != VLMQ_OK || problem.partials == nullptr) return status;
  return VLMQ_LAUNCH(add_partials, dim3(tiles, kSlices), dim3(kThreads), 0, stream, problem,
                     static_cast<int>(layout.splits));
}

template <class T>
vlmq_status enqueue(const vlmq_weighted_hessian_args& args, vlmq_stream stream) {
  const auto rows_aligned = [](const void* matrix, int64_t stride) {
    return has_aligned_rows(static_cast<const T*>(matrix), stride);
  };
  const bool aligned = rows_aligned(args.u, args.u_stride) &&
                       (args.f == nullptr || rows_aligned(args.f, args.f_stride));
  auto* maxima = static_cast<uint32_t*>(args.workspace);
  auto* partials =
      reinterpret_cast<float*>(static_cast<char*>(args.workspace) + maxima_bytes(args));
  int64_t tokens;
  for (int64_t first = 0; first < args.tokens; first += tokens) {
    const Plan layout = plan(args, args.tokens - first);
    tokens = layout.tokens;
    const auto rows_from = [&](const void* matrix, int64_t stride) -> const void* {
      return matrix == nullptr ? nullptr : static_cast<const T*>(matrix) + first * stride;
    };
    Problem problem{};
    problem.u = rows_from(args.u, args.u_stride);
    problem.f = rows_from(args.f, args.f_stride);
    problem.g = args.g == nullptr ? nullptr : args.g + first;
    problem.hessian = args.hessian;
    problem.cross = args.cross;
    problem.maxima = maxima;
    problem.partials = layout.splits > 1 ? partials : nullptr;
    problem.u_stride = args.u_stride;
    problem.f_stride = args.f_stride;
    problem.tokens = static_cast<int>(tokens);
    problem.features = static_cast<int>(args.features);
    problem.split_tokens = static_cast<int>(layout.split_tokens);
    problem.hessian_tiles = static_cast<int>(layout.hessian_tiles);
    problem.aligned = aligned;
    problem.fast = args.fast != 0;

    vlmq_status status = fill_async(maxima, 0, static_cast<size_t>(maxima_bytes(args)), stream);
    if (status != VLMQ_OK) return status;
    status = enqueue_pass<T>(problem, layout, maxima, stream);
    if (status != VLMQ_OK) return status;
  }
  return VLMQ_OK;
}

}  // namespace
}  // namespace vlmq::statistics

extern "C" size_t vlmq_weighted_hessian_workspace_bytes(const vlmq_weighted_hessian_args* args) {
  using namespace vlmq::statistics;
  if (args == nullptr || !sizes_are_good(*args) || args->tokens == 0 || args->features == 0)
    return 0;
  const Plan layout = plan(*args, args->tokens);
  const int64_t partial_tiles = layout.splits > 1 ? layout.splits * layout.tiles : 0;
  return static_cast<size_t>(maxima_bytes(*args)) +
         static_cast<size_t>(partial_tiles) * kTileFloats * sizeof(float);
}

VLMQ_CALL(vlmq_weighted_hessian, args, stream) {
  using namespace vlmq::statistics;
  if (args == nullptr || !sizes_are_good(*args)) return VLMQ_BAD_ARGUMENT;
  if (args->tokens == 0 || args->features == 0) return VLMQ_OK;
  if (args->workspace_bytes < vlmq_weighted_hessian_workspace_bytes(args)) {
    return VLMQ_BAD_ARGUMENT;
  }
  return vlmq::with_dtype(args->dtype, [&](auto tag) {
    using T = decltype(tag);
    return pointers_are_good<T>(*args) ? enqueue<T>(*args, stream) : VLMQ_BAD_ARGUMENT;
  });
}
