// Softmax attention over packed sequences, forward, in one pass over the keys (Dao,
// FlashAttention-2, 2023): a block holds a tile of queries of one head and walks the keys its
// queries see, with a running maximum and a running sum for each query.

#include "decoder/attention_tile.cuh"
#include "device/limits.cuh"

namespace vlmq {
namespace {

template <class T>
struct Forward {
  const T *q, *k, *v;
  T* out;
  float* log_sum;
  const vlmq_span* spans;
  int tiles;  // of the longest span
  int heads, kv_heads, head_dim;
  float scale;  // of the products, in units of log 2
  bool causal, wide;
};

/// float32 elements are twice as long: fewer warps and shorter tiles keep within the 163 KiB of
/// sm_80. Tiles of 16-bit types let two blocks or more share a multiprocessor, but at 256. kSmall:
/// one warp, for the 99 KiB of other GPUs, where two need more; what a warp sums is the same.
template <class T, int kDim, bool kSmall = false>
struct ForwardTile {
  static constexpr int kWarps = kSmall ? 1 : sizeof(T) == 4 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kKeys = sizeof(T) == 4 ? (kDim == 256 ? 16 : 32) : (kDim <= 80 ? 64 : 32);
  /// Blocks that share a multiprocessor by their registers: what ptxas reaches without spilling.
  static constexpr int kBlocks = sizeof(T) == 4 || kDim == 256 ? 1 : (kDim <= 80 ? 3 : 2);
  static constexpr int kStride = kTileStride<T, kDim>;
  static constexpr size_t kScratch = Products<T, kDim>::scratch_bytes(kKeys);
  /// Queries, then two buffers each of keys and of values, then each warp's scratch.
  static constexpr size_t kSharedBytes =
      (kRows + 4 * kKeys) * kStride * sizeof(T) + kWarps * kScratch;
};

template <class T, int kDim, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    attention_kernel(Forward<T> problem) {
  using Product = Products<T, kDim>;
  constexpr int kKeys = Tile::kKeys, kTiles = kKeys / 8;

  const vlmq_span span = problem.spans[blockIdx.x / problem.tiles];
  const int queries = span.q_end - span.q_begin, keys = span.k_end - span.k_begin;
  // The last queries of a causal span see the most keys: they start first.
  const int first =
      (problem.tiles - 1 - static_cast<int>(blockIdx.x % problem.tiles)) * Tile::kRows;
  if (first >= queries) return;
  const int head = static_cast<int>(blockIdx.y);
  const int kv_head = head / (problem.heads / problem.kv_heads);
  const int dim = problem.head_dim;

  T* q_tile = reinterpret_cast<T*>(dynamic_shared());
  T* kv_tiles = q_tile + Tile::kRows * Tile::kStride;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float* scratch = reinterpret_cast<float*>(kv_tiles + 4 * kKeys * Tile::kStride) +
                   warp * (Tile::kScratch / sizeof(float));

  const int64_t q_stride = int64_t{problem.heads} * dim;
  const int64_t kv_stride = int64_t{problem.kv_heads} * dim;
  const int64_t q_start = (span.q_begin + first) * q_stride + head * dim;
  const int64_t kv_start = span.k_begin * kv_stride + kv_head * dim;

  // Keys that query i sees: the last query stands at the last key.
  const auto seen_by = [&](int query) {
    return problem.causal ? min(keys, keys - queries + query + 1) : keys;
  };
  const int key_tiles =
      static_cast<int>(ceil_div(max(0, seen_by(min(first + Tile::kRows, queries) - 1)), kKeys));

  const auto fetch = [&](int tile) {
    T* k_tile = kv_tiles + tile % 2 * 2 * kKeys * Tile::kStride;
    const int64_t start = kv_start + int64_t{tile} * kKeys * kv_stride;
    load_tile<kKeys, kDim, Tile::kThreads>(k_tile, problem.k + start, kv_stride,
                                           keys - tile * kKeys, dim, problem.wide);
    load_tile<kKeys, kDim, Tile::kThreads>(k_tile + kKeys * Tile::kStride, problem.v + start,
                                           kv_stride, keys - tile * kKeys, dim, problem.wide);
  };
  if (key_tiles > 0) {
    load_tile<Tile::kRows, kDim, Tile::kThreads>(q_tile, problem.q + q_start, q_stride,
                                                 queries - first, dim, problem.wide);
    fetch(0);
  }
  cp_async_commit();

  // Of the warp's 16 queries, the first and the one behind the last.
  const int warp_first = first + warp * 16, warp_end = min(warp_first + 16, queries);
  float out[kDim / 8][4] = {};
  // The largest scores so far in units of log 2, as rounded: what is subtracted now must be what a
  // later tile takes back.
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};

  for (int tile = 0; tile < key_tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // the tile has come, and the one before it has been read
    if (tile + 1 < key_tiles) fetch(tile + 1);
    cp_async_commit();

    const int first_key = tile * kKeys;
    if (warp_first >= warp_end || first_key >= seen_by(warp_end - 1)) continue;
    const T* k_tile = kv_tiles + tile % 2 * 2 * kKeys * Tile::kStride;
    float scores[kTiles][4] = {};
    Product::multiply_transposed(scores, q_tile + warp * 16 * Tile::kStride, k_tile);

    if (first_key + kKeys > seen_by(warp_first)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int seen = seen_by(warp_first + accumulator_row(lane, i)) - first_key;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (n * 8 + accumulator_col(lane, i) >= seen) scores[n][i] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      // The four lanes of a row.
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float before = largest[half];
      largest[half] = fmaxf(before, __fmul_rn(most, problem.scale));
      // A query that has seen no key yet: -inf - -inf would be NaN.
      const float base = largest[half] == -INFINITY ? 0.0f : largest[half];
      const float keep = exp2f(before - base);
      sum[half] *= keep;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = exp2f(fmaf(scores[n][i], problem.scale, -base));
          sum[half] += scores[n][i];
        }
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        out[n][2 * half] *= keep;
        out[n][2 * half + 1] *= keep;
      }
    }
    Product::template accumulate<kTiles, kDim>(out, scores, k_tile + kKeys * Tile::kStride,
                                               scratch);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 1);
    sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 2);
    const float inverse = sum[half] > 0.0f ? 1.0f / sum[half] : 0.0f;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      out[n][2 * half] *= inverse;
      out[n][2 * half + 1] *= inverse;
    }
    const int query = warp_first + accumulator_row(lane, 2 * half);
    if (problem.log_sum != nullptr && lane % 4 == 0 && query < queries) {
      problem.log_sum[(int64_t{span.q_begin} + query) * problem.heads + head] =
          (largest[half] + log2f(sum[half])) * kLn2;
    }
  }
  store_rows<kDim>(problem.out + q_start + warp * 16 * q_stride, q_stride, queries - warp_first, 0,
                   dim, problem.wide, out);
}

template <class T, int kDim, class Tile>
vlmq_status run(const vlmq_attention_args& args, vlmq_stream stream) {
  const bool has_spans = args.span_count > 0 && args.longest_q > 0;
  const unsigned blocks = has_spans ? span_tiles(args.longest_q, Tile::kRows, args.span_count) : 0;
  if (has_spans && blocks == 0) return VLMQ_BAD_ARGUMENT;
  const auto rows = static_cast<size_t>(args.q_rows);
  const auto heads = static_cast<size_t>(args.heads);
  const auto width = static_cast<size_t>(args.head_dim) * sizeof(T);
  vlmq_status status = fill_async(args.out, 0, rows * heads * width, stream);
  if (status == VLMQ_OK && args.log_sum != nullptr)
    status = fill_async(args.log_sum, 0, rows * heads * sizeof(float), stream);
  if (status != VLMQ_OK || !has_spans) return status;

  Forward<T> problem{};
  problem.q = static_cast<const T*>(args.q);
  problem.k = static_cast<const T*>(args.k);
  problem.v = static_cast<const T*>(args.v);
  problem.out = static_cast<T*>(args.out);
  problem.log_sum = args.log_sum;
  problem.spans = args.spans;
  problem.tiles = static_cast<int>(ceil_div(args.longest_q, Tile::kRows));
  problem.heads = static_cast<int>(args.heads);
  problem.kv_heads = static_cast<int>(args.kv_heads);
  problem.head_dim = static_cast<int>(args.head_dim);
  problem.scale = kLog2E / sqrtf(static_cast<float>(args.head_dim));
  problem.causal = args.causal != 0;
  problem.wide = width % 16 == 0 && is_aligned(args.q, 16) && is_aligned(args.k, 16) &&
                 is_aligned(args.v, 16) && is_aligned(args.out, 16);
  return VLMQ_LAUNCH((attention_kernel<T, kDim, Tile>),
                     dim3(blocks, static_cast<unsigned>(args.heads)), Tile::kThreads,
                     Tile::kSharedBytes, stream, problem);
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_attention, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->longest_q < 0 || !is_dtype(args->dtype) ||
      !is_attention_shape(args->q_rows, args->k_rows, args->span_count, args->heads, args->kv_heads,
                          args->head_dim))
    return VLMQ_BAD_ARGUMENT;
  if (args->q_rows == 0) return VLMQ_OK;
  const bool has_spans = args->span_count > 0 && args->longest_q > 0;
  if (args->q == nullptr || args->out == nullptr ||
      (args->k_rows > 0 && (args->k == nullptr || args->v == nullptr)) ||
      (has_spans && args->spans == nullptr))
    return VLMQ_BAD_ARGUMENT;
  return with_dtype(args->dtype, [&](auto tag) {
    return with_head_dim(args->head_dim, [&](auto dim) {
      using T = decltype(tag);
      constexpr int kDim = decltype(dim)::kValue;
      return with_layout<ForwardTile<T, kDim>, ForwardTile<T, kDim, true>>(
          [&](auto tile) { return run<T, kDim, decltype(tile)>(*args, stream); });
    });
  });
}
