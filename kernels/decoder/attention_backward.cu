// Gradients of softmax attention, the probabilities computed again from the forward call's log sums
// (Dao, FlashAttention-2, 2023). With P the probabilities, dO the output's gradient, s the scale
// and D = rowsum(dO * O):
//
//   dV = P^T dO,  dS = P * (dO V^T - D),  dQ = s dS K,  dK = s dS^T Q.
//
// One kernel computes dQ with a tile of queries fixed, walking keys; the other dK and dV with a
// tile of keys fixed, walking the queries of all heads that read it. So each gradient is summed by
// one warp in one order, at the price of computing P and dS twice. Both are the same kernel: the
// fixed rows `x` against the walked rows `y`, P and dS with x along their rows.

#include "decoder/attention_tile.cuh"
#include "device/limits.cuh"
#include "device/reduce.cuh"

namespace vlmq {
namespace {

template <class T>
struct Backward {
  const T *q, *k, *v, *d_out;
  const float *log_sum, *delta;  // [q_rows, heads]
  T *d_q, *d_k, *d_v;
  const vlmq_span* spans;
  int tiles;  // of fixed rows, of the longest span
  int heads, kv_heads, head_dim;
  float scale;
  bool causal, wide;
};

/// float32 as in the forward kernel: fewer warps, shorter tiles. kSmall: still fewer, for the 99
/// KiB of some GPUs; a row's sums run over the same walked rows in the same order.
template <class T, int kDim, bool kOfKeys, bool kSmall = false>
struct BackwardTile {
  static constexpr int kWarps = !kSmall          ? (sizeof(T) == 4 ? 2 : 4)
                                : sizeof(T) == 2 ? 3
                                : kDim == 256    ? 1
                                                 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kWalked = kSmall || (sizeof(T) == 4 && kDim == 256) ? 16 : 32;
  /// Columns of the gradients that a block sums. Two gradients of 256 columns are more than a
  /// thread's registers hold: a block sums half of them, and another block the other half. Small
  /// blocks do so for dQ too, whose registers ran out on sm_120.
  static constexpr int kOut = kDim > 128 && (kOfKeys || (kSmall && sizeof(T) == 2)) ? 128 : kDim;
  static constexpr int kParts = kDim / kOut;
  /// Blocks that share a multiprocessor by their registers: what ptxas reaches without spilling.
  static constexpr int kBlocks =
      sizeof(T) == 4 || kDim == 256 ? 1 : (kDim <= 80 && !kOfKeys ? 3 : 2);
  static constexpr int kStride = kTileStride<T, kDim>;
  static constexpr size_t kScratch = Products<T, kDim>::scratch_bytes(kWalked);
  /// Both fixed tiles, two buffers of both walked tiles, two buffers of the walked queries' log
  /// sums and D, then each warp's scratch.
  static constexpr size_t kSharedBytes = (2 * kRows + 4 * kWalked) * kStride * sizeof(T) +
                                         4 * kWalked * sizeof(float) + kWarps * kScratch;
  static_assert(kThreads >= 2 * kWalked, "a thread copies one log sum or D at most");
};

/// D, a warp a query and head.
template <int W, class T>
__global__ void __launch_bounds__(256)
    attention_delta_kernel(const T* out, const T* d_out, float* delta, int64_t count,
                           int head_dim) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t step = int64_t{gridDim.x} * (blockDim.x / 32);
  for (int64_t i = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; i < count;
       i += step) {
    float sum = 0.0f;
    for (int col = lane * W; col < head_dim; col += 32 * W) {
      float values[W], gradients[W];
      load<W>(out + i * head_dim + col, values);
      load<W>(d_out + i * head_dim + col, gradients);
#pragma unroll
      for (int j = 0; j < W; ++j) sum = fmaf(values[j], gradients[j], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) delta[i] = sum;
  }
}

template <class T, int kDim, bool kOfKeys, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    attention_backward_kernel(Backward<T> problem) {
  using Product = Products<T, kDim>;
  constexpr int kWalked = Tile::kWalked, kTiles = kWalked / 8, kOut = Tile::kOut;

  const vlmq_span span = problem.spans[blockIdx.x / problem.tiles];
  const int queries = span.q_end - span.q_begin, keys = span.k_end - span.k_begin;
  const int x_rows = kOfKeys ? keys : queries, y_rows = kOfKeys ? queries : keys;
  const int first = static_cast<int>(blockIdx.x % problem.tiles) * Tile::kRows;
  if (first >= x_rows) return;
  const int dim = problem.head_dim, group = problem.heads / problem.kv_heads;
  const int first_col = static_cast<int>(blockIdx.z) * kOut;

  T* x_tiles = reinterpret_cast<T*>(dynamic_shared());
  T* y_tiles = x_tiles + 2 * Tile::kRows * Tile::kStride;
  float* statistics = reinterpret_cast<float*>(y_tiles + 4 * kWalked * Tile::kStride);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float* scratch = statistics + 4 * kWalked + warp * (Tile::kScratch / sizeof(float));

  const int64_t q_stride = int64_t{problem.heads} * dim;
  const int64_t kv_stride = int64_t{problem.kv_heads} * dim;
  // The fixed rows: keys and values of one head, or one head's queries and output gradients.
  const int x_head = static_cast<int>(blockIdx.y);
  const int kv_head = kOfKeys ? x_head : x_head / group;
  const int64_t x_stride = kOfKeys ? kv_stride : q_stride;
  const int64_t x_start =
      (int64_t{kOfKeys ? span.k_begin : span.q_begin} + first) * x_stride + x_head * dim;

  // What is walked: tiles begin ... end of it, where causal only those that see and are seen; for
  // keys all of them anew for each query head of the group.
  const int later = keys - queries;  // key j is seen from query j - later on
  const int last_x = min(first + Tile::kRows, x_rows) - 1;
  const int begin = kOfKeys && problem.causal ? max(0, first - later) / kWalked : 0;
  const int seen = !kOfKeys && problem.causal ? min(keys, later + last_x + 1) : y_rows;
  const int per_head = max(0, static_cast<int>(ceil_div(max(0, seen), kWalked)) - begin);
  const int steps = kOfKeys ? per_head * group : per_head;

  const auto fetch = [&](int step) {
    const int first_y = (begin + step % per_head) * kWalked;
    const int head = kOfKeys ? kv_head * group + step / per_head : x_head;
    const int64_t y_stride = kOfKeys ? q_stride : kv_stride;
    const int64_t start = (int64_t{kOfKeys ? span.q_begin : span.k_begin} + first_y) * y_stride +
                          (kOfKeys ? head : kv_head) * dim;
    T* tile = y_tiles + step % 2 * 2 * kWalked * Tile::kStride;
    load_tile<kWalked, kDim, Tile::kThreads>(tile, (kOfKeys ? problem.q : problem.k) + start,
                                             y_stride, y_rows - first_y, dim, problem.wide);
    load_tile<kWalked, kDim, Tile::kThreads>(tile + kWalked * Tile::kStride,
                                             (kOfKeys ? problem.d_out : problem.v) + start,
                                             y_stride, y_rows - first_y, dim, problem.wide);
    if (kOfKeys && threadIdx.x < 2 * kWalked) {
      const int which = static_cast<int>(threadIdx.x) / kWalked;
      const int row = static_cast<int>(threadIdx.x) % kWalked;
      const bool valid = first_y + row < queries;
      const float* from = which == 0 ? problem.log_sum : problem.delta;
      const int64_t place = (int64_t{span.q_begin} + first_y + row) * problem.heads + head;
      cp_async_4(statistics + (step % 2 * 2 + which) * kWalked + row, valid ? from + place : from,
                 valid ? 4 : 0);
    }
  };
  if (steps > 0) {
    load_tile<Tile::kRows, kDim, Tile::kThreads>(x_tiles,
                                                 (kOfKeys ? problem.k : problem.q) + x_start,
                                                 x_stride, x_rows - first, dim, problem.wide);
    load_tile<Tile::kRows, kDim, Tile::kThreads>(x_tiles + Tile::kRows * Tile::kStride,
                                                 (kOfKeys ? problem.v : problem.d_out) + x_start,
                                                 x_stride, x_rows - first, dim, problem.wide);
    fetch(0);
  }
  cp_async_commit();

  const int warp_first = first + warp * 16;
  const T* x_scored = x_tiles + warp * 16 * Tile::kStride;
  float x_log_sum[2] = {}, x_delta[2] = {};
  if (!kOfKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = warp_first + accumulator_row(lane, 2 * half);
      if (query >= queries) continue;
      const int64_t place = (int64_t{span.q_begin} + query) * problem.heads + x_head;
      x_log_sum[half] = problem.log_sum[place] * kLog2E;
      x_delta[half] = problem.delta[place];
    }
  }
  // dK and dV, or dQ alone.
  float d_first[kOut / 8][4] = {};
  float d_second[kOfKeys ? kOut / 8 : 1][4] = {};

  for (int step = 0; step < steps; ++step) {
    cp_async_wait<0>();
    __syncthreads();  // the tiles have come, and those before them have been read
    if (step + 1 < steps) fetch(step + 1);
    cp_async_commit();
    if (warp_first >= x_rows) continue;

    const int first_y = (begin + step % per_head) * kWalked;
    const T* y_first = y_tiles + step % 2 * 2 * kWalked * Tile::kStride;
    const T* y_second = y_first + kWalked * Tile::kStride;
    float p[kTiles][4] = {}, d_s[kTiles][4] = {};
    Product::multiply_transposed(p, x_scored, y_first);
    Product::multiply_transposed(d_s, x_scored + Tile::kRows * Tile::kStride, y_second);

    const float* y_statistics = statistics + step % 2 * 2 * kWalked;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int y = n * 8 + accumulator_col(lane, i);
        const int x_place = warp_first + accumulator_row(lane, i), y_place = first_y + y;
        const int query = kOfKeys ? y_place : x_place, key = kOfKeys ? x_place : y_place;
        const float log_sum = kOfKeys ? y_statistics[y] * kLog2E : x_log_sum[i / 2];
        const float delta = kOfKeys ? y_statistics[kWalked + y] : x_delta[i / 2];
        const bool visible =
            query < queries && key < keys && (!problem.causal || key <= query + later);
        p[n][i] = visible ? exp2f(fmaf(p[n][i], problem.scale * kLog2E, -log_sum)) : 0.0f;
        d_s[n][i] = p[n][i] * (d_s[n][i] - delta);
      }
    }
    Product::template accumulate<kTiles, kOut>(d_first, d_s, y_first + first_col, scratch);
    if constexpr (kOfKeys)
      Product::template accumulate<kTiles, kOut>(d_second, p, y_second + first_col, scratch);
  }

#pragma unroll
  for (int n = 0; n < kOut / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d_first[n][i] *= problem.scale;
  }
  const int64_t start = x_start + warp * 16 * x_stride;
  store_rows<kOut>((kOfKeys ? problem.d_k : problem.d_q) + start, x_stride, x_rows - warp_first,
                   first_col, dim, problem.wide, d_first);
  if constexpr (kOfKeys)
    store_rows<kOut>(problem.d_v + start, x_stride, x_rows - warp_first, first_col, dim,
                     problem.wide, d_second);
}

bool is_backward(const vlmq_attention_backward_args* args) {
  return args != nullptr && args->longest_q >= 0 && args->longest_k >= 0 && is_dtype(args->dtype) &&
         is_attention_shape(args->q_rows, args->k_rows, args->span_count, args->heads,
                            args->kv_heads, args->head_dim);
}

/// dK and dV, or dQ.
template <class T, int kDim, bool kOfKeys>
vlmq_status run(Backward<T> problem, int64_t longest, int64_t span_count, vlmq_stream stream) {
  using Ample = BackwardTile<T, kDim, kOfKeys>;
  using Small = BackwardTile<T, kDim, kOfKeys, true>;
  const auto heads = static_cast<unsigned>(kOfKeys ? problem.kv_heads : problem.heads);
  return with_layout<Ample, Small>([&](auto tile) -> vlmq_status {
    using Tile = decltype(tile);
    const unsigned blocks = span_tiles(longest, Tile::kRows, span_count);
    if (blocks == 0) return VLMQ_BAD_ARGUMENT;
    problem.tiles = static_cast<int>(ceil_div(longest, Tile::kRows));
    return VLMQ_LAUNCH((attention_backward_kernel<T, kDim, kOfKeys, Tile>),
                       dim3(blocks, heads, Tile::kParts), Tile::kThreads, Tile::kSharedBytes,
                       stream, problem);
  });
}

template <class T>
vlmq_status run_delta(const vlmq_attention_backward_args& args, bool wide, vlmq_stream stream) {
  const int64_t count = args.q_rows * args.heads;
  const auto launch = [&](auto* kernel) {
    return VLMQ_LAUNCH(kernel, blocks_of(count, 8), 256, 0, stream, static_cast<const T*>(args.out),
                       static_cast<const T*>(args.d_out), static_cast<float*>(args.workspace),
                       count, static_cast<int>(args.head_dim));
  };
  return wide ? launch(attention_delta_kernel<kWide, T>) : launch(attention_delta_kernel<1, T>);
}

}  // namespace
}  // namespace vlmq

extern "C" size_t vlmq_attention_backward_workspace_bytes(
    const vlmq_attention_backward_args* args) {
  if (!vlmq::is_backward(args)) return 0;
  return static_cast<size_t>(args->q_rows) * static_cast<size_t>(args->heads) * sizeof(float);
}

VLMQ_CALL(vlmq_attention_backward, args, stream) {
  using namespace vlmq;
  if (!is_backward(args)) return VLMQ_BAD_ARGUMENT;
  if (args->q_rows == 0 && args->k_rows == 0) return VLMQ_OK;
  const bool has_spans = args->span_count > 0 && args->longest_q > 0 && args->longest_k > 0;
  if ((args->q_rows > 0 &&
       (args->q == nullptr || args->out == nullptr || args->log_sum == nullptr ||
        args->d_out == nullptr || args->d_q == nullptr || args->workspace == nullptr)) ||
      (args->k_rows > 0 && (args->k == nullptr || args->v == nullptr || args->d_k == nullptr ||
                            args->d_v == nullptr)) ||
      (has_spans && args->spans == nullptr) || !is_aligned(args->workspace, 256) ||
      args->workspace_bytes < vlmq_attention_backward_workspace_bytes(args))
    return VLMQ_BAD_ARGUMENT;
  return with_dtype(args->dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto width = static_cast<size_t>(args->head_dim) * sizeof(T);
    const size_t q_bytes =
        static_cast<size_t>(args->q_rows) * static_cast<size_t>(args->heads) * width;
    const size_t k_bytes =
        static_cast<size_t>(args->k_rows) * static_cast<size_t>(args->kv_heads) * width;
    vlmq_status status = fill_async(args->d_q, 0, q_bytes, stream);
    if (status == VLMQ_OK) status = fill_async(args->d_k, 0, k_bytes, stream);
    if (status == VLMQ_OK) status = fill_async(args->d_v, 0, k_bytes, stream);
    if (status != VLMQ_OK || !has_spans || args->q_rows == 0 || args->k_rows == 0) return status;

    Backward<T> problem{};
    problem.q = static_cast<const T*>(args->q);
    problem.k = static_cast<const T*>(args->k);
    problem.v = static_cast<const T*>(args->v);
    problem.d_out = static_cast<const T*>(args->d_out);
    problem.log_sum = args->log_sum;
    problem.delta = static_cast<const float*>(args->workspace);
    problem.d_q = static_cast<T*>(args->d_q);
    problem.d_k = static_cast<T*>(args->d_k);
    problem.d_v = static_cast<T*>(args->d_v);
    problem.spans = args->spans;
    problem.heads = static_cast<int>(args->heads);
    problem.kv_heads = static_cast<int>(args->kv_heads);
    problem.head_dim = static_cast<int>(args->head_dim);
    problem.scale = 1.0f / sqrtf(static_cast<float>(args->head_dim));
    problem.causal = args->causal != 0;
    problem.wide = width % 16 == 0;
    const void* const pointers[] = {args->q,   args->k,   args->v,  args->d_out,
                                    args->d_q, args->d_k, args->d_v};
    for (const void* pointer : pointers) problem.wide = problem.wide && is_aligned(pointer, 16);

    const bool wide = problem.wide && args->head_dim % kWide == 0 && is_aligned(args->out, 16);
    status = run_delta<T>(*args, wide, stream);
    if (status != VLMQ_OK) return status;
    return with_head_dim(args->head_dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::kValue;
      const vlmq_status of_keys =
          run<T, kDim, true>(problem, args->longest_k, args->span_count, stream);
      if (of_keys != VLMQ_OK) return of_keys;
      return run<T, kDim, false>(problem, args->longest_q, args->span_count, stream);
    });
  });
}
