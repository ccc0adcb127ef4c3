// The grid of one group that is wider than a block, from its weights as they are before its first
// column is quantized: W + acc root^-1, by substitution over the group's blocks.
//
// One launch a block of columns: with S = acc root^-1 of the blocks before it in the work space,
// S_B = (acc_B - S root[before, B]) inverse_B, tiles of rows on their own. Then one launch finds
// the grids, a warp a row.
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "solve/grid.cuh"
#include "solve/loss.cuh"
#include "solve/tile.cuh"
#include "solve/triangle.cuh"

namespace vlmq {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;        // of a row: each holds four columns of every 32
constexpr int kRowsPerLane = 2;  // the factor is read from shared memory once for two rows
constexpr int kQuads = VLMQ_BLOCK / (4 * kLanes);
constexpr int kHalf = kThreads / kLanes;
constexpr int kRows = kHalf * kRowsPerLane;
constexpr int kDepth = 32;               // rows of the factor that are staged together
constexpr int kLeftStride = kDepth + 4;  // rows of a warp four banks apart
constexpr int kTileStride = VLMQ_BLOCK + 4;
constexpr int kRight = kDepth * VLMQ_BLOCK;
constexpr int kLeft = kRows * kLeftStride;
constexpr size_t kShared = (2 * (kRight + kLeft) + kRows * kTileStride) * sizeof(float);
static_assert(kShared <= kLeastShared, "some GPUs have less");

/// Row stride of the work space: rows start at multiples of 16 bytes.
__host__ __device__ constexpr long long solved_stride(long long columns) {
  return (columns + 3) / 4 * 4;
}

/// Sums of a lane: rows thread / kLanes and kHalf further, columns 32 j + 4 lane.
using Sums = float4[kRowsPerLane][kQuads];

/// sums += left right for kDepth values of the inner dimension.
__device__ __forceinline__ void multiply_slice(Sums& sums, const float* left, int left_stride,
                                               const float* right) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  for (int k = 0; k < kDepth; k += 4) {
    float4 a[kRowsPerLane];
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      a[r] = load_vector<float4>(left + (thread / kLanes + r * kHalf) * left_stride + k);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const float4 b =
            load_vector<float4>(right + (k + e) * VLMQ_BLOCK + j * 4 * kLanes + 4 * lane);
#pragma unroll
        for (int r = 0; r < kRowsPerLane; ++r) {
          add_product(sums[r][j], e == 0 ? a[r].x : e == 1 ? a[r].y : e == 2 ? a[r].z : a[r].w, b);
        }
      }
    }
  }
}

/// Starts copying kDepth rows of VLMQ_BLOCK columns, zeros outside `rows` x `columns`.
__device__ __forceinline__ void stage_right(float* target, const float* source, long long stride,
                                            long long rows, int columns) {
  const bool vectors = has_aligned_rows(source, stride);
  for (int i = static_cast<int>(threadIdx.x); i < kRight / 4; i += kThreads) {
    const int k = i / (VLMQ_BLOCK / 4), c = i % (VLMQ_BLOCK / 4) * 4;
    stage4(target + k * VLMQ_BLOCK + c, source + k * stride + c, k < rows ? columns - c : 0, source,
           vectors);
  }
}

/// Starts copying kDepth columns of a tile's rows, zeros outside `rows` x `columns`.
__device__ __forceinline__ void stage_left(float* target, const float* source, long long stride,
                                           long long rows, long long columns) {
  const bool vectors = has_aligned_rows(source, stride);
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kDepth / 4; i += kThreads) {
    const int r = i / (kDepth / 4), c = i % (kDepth / 4) * 4;
    const long long valid = r < rows ? columns - c : 0;
    stage4(target + r * kLeftStride + c, source + r * stride + c,
           static_cast<int>(valid < 4 ? valid : 4), source, vectors);
  }
}

/// Solves one block: `start` its first column in the group, `width` its columns.
__global__ void __launch_bounds__(kThreads)
    solve_block_kernel(vlmq_group_grid_args args, float* solved, long long start, int width) {
  float* const right = reinterpret_cast<float*>(dynamic_shared());
  float* const left = right + 2 * kRight;
  float* const tile = left + 2 * kLeft;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  const long long top = static_cast<long long>(blockIdx.x) * kRows, rows = args.rows - top;
  const long long stride = solved_stride(args.columns);
  float* const solved_rows = solved + top * stride;
  const float* const root = args.root + args.first * args.features + args.first + start;
  const long long row = thread / kLanes;
  const float4 zeros = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  Sums sums;
#pragma unroll
  for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) sums[r][j] = zeros;
  }
  // Two buffers: the next slice is on its way while one is multiplied.
  const int slices = static_cast<int>((start + kDepth - 1) / kDepth);
  const auto stage = [&](int slice) {
    const long long k = static_cast<long long>(slice) * kDepth;
    stage_right(right + slice % 2 * kRight, root + k * args.features, args.features, start - k,
                width);
    stage_left(left + slice % 2 * kLeft, solved_rows + k, stride, rows, start - k);
    cp_async_commit();
  };
  if (slices > 0) stage(0);
  for (int slice = 0; slice < slices; ++slice) {
    if (slice + 1 < slices) {
      stage(slice + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    multiply_slice(sums, left + slice % 2 * kLeft, kLeftStride, right + slice % 2 * kRight);
    __syncthreads();  // the buffer is free again
  }

  const auto stage_inverse = [&](int slice) {
    const long long k = static_cast<long long>(slice) * kDepth;
    stage_right(right + slice % 2 * kRight, args.inverses + (args.first + start + k) * VLMQ_BLOCK,
                VLMQ_BLOCK, width - k, width);
    cp_async_commit();
  };
  stage_inverse(0);
#pragma unroll
  for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const int c = j * 4 * kLanes + 4 * lane, valid = row + r * kHalf < rows ? width - c : 0;
      const long long at = (valid > 0 ? top + row + r * kHalf : 0) * args.columns + start + c;
      float4 acc = load4(args.error + at, valid);
      if (args.cross != nullptr) acc = add(acc, load4(args.cross + at, valid));
      add_product(acc, -1.0f, sums[r][j]);
      store_vector(tile + (row + r * kHalf) * kTileStride + c, acc);
      sums[r][j] = zeros;
    }
  }
  const int inverse_slices = (width + kDepth - 1) / kDepth;
  for (int slice = 0; slice < inverse_slices; ++slice) {
    if (slice + 1 < inverse_slices) {
      stage_inverse(slice + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    multiply_slice(sums, tile + slice * kDepth, kTileStride, right + slice % 2 * kRight);
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const int c = j * 4 * kLanes + 4 * lane;
      if (row + r * kHalf < rows) {
        store4(solved_rows + (row + r * kHalf) * stride + start + c, sums[r][j], width - c);
      }
    }
  }
}

/// A row's weights with their corrections, if any.
struct CorrectedWeights {
  const float* residual;
  const float* solved;
  __device__ float operator()(int i) const {
    return solved != nullptr ? __fadd_rn(residual[i], solved[i]) : residual[i];
  }
};

__device__ __forceinline__ CorrectedWeights corrected_row(const vlmq_group_grid_args& args,
                                                          const float* solved, long long row) {
  return {args.residual + row * args.features + args.first,
          solved != nullptr ? solved + row * solved_stride(args.columns) : nullptr};
}

__global__ void __launch_bounds__(kThreads)
    group_grid_kernel(vlmq_group_grid_args args, const float* solved) {
  const long long row =
      static_cast<long long>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= args.rows) return;  // a whole warp, and no barrier follows
  const CorrectedWeights weights = corrected_row(args, solved, row);
  const int columns = static_cast<int>(args.columns);
  const Grid grid = args.rule.grid == VLMQ_LOSS
                        ? grid_of_least_squares<32>(weights, columns, args.rule)
                        : grid_of_group<32>(weights, columns, args.rule);
  if (threadIdx.x % 32 == 0) {
    args.scales[row] = grid.scale;
    args.zeros[row] = byte_of(grid.zero);
    check_scale(grid.scale, row, args.status);
  }
}

/// What the search for the least loss keeps of a row between launches.
struct Search {
  Range range;
  Grid from;  // best of the candidates that shrink the range
  float losses[kShrinks + kShifts];
};

constexpr int kSearchLanes = 8;  // of a row
using SearchShape = Shape<kSearchLanes>;
constexpr size_t kSearchShared = SearchShape::kTriangle * sizeof(float);
static_assert(kSearchShared <= kLeastShared && kThreads == kBlockThreads, "a block's triangle");

__global__ void __launch_bounds__(kThreads)
    begin_search_kernel(vlmq_group_grid_args args, const float* solved, Search* searches) {
  const long long row =
      static_cast<long long>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= args.rows) return;  // a whole warp, and no barrier follows
  const CorrectedWeights weights = corrected_row(args, solved, row);
  const Range range = range_of_group<32>(weights, static_cast<int>(args.columns));
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < kShrinks + kShifts) searches[row].losses[lane] = 0.0f;
  if (lane == 0) {
    searches[row].range = range;
    searches[row].from = least_before(range, args.rule).grid;
  }
}

/// Adds the losses of one block's columns to those of the candidates `begin` to `end`: `start` the
/// block's first column in the group, `width` its columns.
template <bool kCross>
__global__ void __launch_bounds__(kThreads)
    add_losses_kernel(vlmq_group_grid_args args, const float* solved, Search* searches, int begin,
                      int end, long long start, int width) {
  using S = SearchShape;
  float* const inverse = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kSearchLanes;
  const long long row = static_cast<long long>(blockIdx.x) * S::kRows + thread / kSearchLanes;
  const bool is_row = row < args.rows;
  const long long first = args.first + start;
  stage_panels<kSearchLanes>(inverse, args.inverses + first * VLMQ_BLOCK, VLMQ_BLOCK, width, 0,
                             S::kPanels);
  cp_async_commit();
  const CorrectedWeights weights = corrected_row(args, solved, is_row ? row : 0);
  Search& search = searches[is_row ? row : 0];
  const Range range = search.range;
  const Grid from = search.from;
  cp_async_wait<0>();
  __syncthreads();
  for (int k = begin; k < end; k += kTogether) {
    Grid grids[kTogether];
    float losses[kTogether];
#pragma unroll
    for (int c = 0; c < kTogether; ++c) {
      grids[c] = loss_candidate(k + c, range, from, args.rule);
      losses[c] = is_row ? search.losses[k + c] : 0.0f;
    }
    add_losses<kSearchLanes, kCross>(
        [&](int c) {
          const auto at = [&](int i) {
            return c + i < width ? weights(static_cast<int>(start) + c + i) : 0.0f;
          };
          return make_float4(at(0), at(1), at(2), at(3));
        },
        [&](int panel, int i, int c) {
          return load_vector<float4>(inverse + S::row(panel, i) + c);
        },
        [&](int, int i, int c) {
          return load4(args.products + (first + i) * VLMQ_BLOCK + c, width - c);
        },
        args.diagonal + first, 0, width, range.unit(), largest_code(args.rule.bits), grids, losses);
    __syncwarp();  // all lanes have read what the first one changes
    if (lane == 0 && is_row) {
#pragma unroll
      for (int c = 0; c < kTogether; ++c) search.losses[k + c] = losses[c];
    }
  }
}

/// Takes the best of the first `end` candidates: as the grid that others are made from, and as the
/// group's.
__global__ void __launch_bounds__(kThreads)
    choose_kernel(vlmq_group_grid_args args, Search* searches, int end) {
  const long long row =
      static_cast<long long>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (row >= args.rows) return;
  Search& search = searches[row];
  Least least = least_before(search.range, args.rule);
  for (int k = 0; k < end; ++k) {
    least.take(search.losses[k], loss_candidate(k, search.range, search.from, args.rule));
  }
  search.from = least.grid;
  args.scales[row] = least.grid.scale;
  args.zeros[row] = byte_of(least.grid.zero);
  check_scale(least.grid.scale, row, args.status);
}

template <bool kCross>
vlmq_status search(const vlmq_group_grid_args& args, const float* solved, Search* searches,
                   vlmq_stream stream) {
  const dim3 warps(static_cast<unsigned>(ceil_div(args.rows, kThreads / 32)));
  const dim3 tiles(static_cast<unsigned>(ceil_div(args.rows, SearchShape::kRows)));
  const dim3 threads(static_cast<unsigned>(ceil_div(args.rows, kThreads)));
  vlmq_status status =
      VLMQ_LAUNCH(begin_search_kernel, warps, kThreads, 0, stream, args, solved, searches);
  const int candidates = loss_candidates(args.rule);
  for (int begin = 0; begin < candidates && status == VLMQ_OK; begin += kShrinks) {
    const int end = begin + kShrinks < candidates ? begin + kShrinks : candidates;
    int64_t start = args.first;
    for (int64_t b = 0; b < args.block_count && status == VLMQ_OK; start = args.blocks[b++]) {
      status = VLMQ_LAUNCH(add_losses_kernel<kCross>, tiles, kThreads, kSearchShared, stream, args,
                           solved, searches, begin, end, static_cast<long long>(start - args.first),
                           static_cast<int>(args.blocks[b] - start));
    }
    if (status == VLMQ_OK) {
      status = VLMQ_LAUNCH(choose_kernel, threads, kThreads, 0, stream, args, searches, end);
    }
  }
  return status;
}

/// Bytes of the corrected weights in the work space.
size_t solved_bytes(const vlmq_group_grid_args& args) {
  if (!args.error) return 0;
  return static_cast<size_t>(args.rows) * solved_stride(args.columns) * sizeof(float);
}

bool has_search(const vlmq_group_grid_args& args) {
  return args.rule.grid == VLMQ_LOSS && args.root;
}

bool valid(const vlmq_group_grid_args& a) {
  if (a.rows < 0 || a.features < 0 || a.first < 0 || a.columns < 0) return false;
  if (a.rows > INT32_MAX || a.features > INT32_MAX || a.columns > a.features - a.first)
    return false;
  if (!valid_rule(a.rule)) return false;
  if (a.rows == 0 || a.columns == 0) return true;
  if (!a.residual || !a.scales || !a.zeros || !a.status) return false;
  if (!a.error && a.cross) return false;
  if (!a.error && !a.root) return !a.products;
  if (!a.root || !a.inverses || !a.blocks || a.block_count <= 0) return false;
  if (a.rule.grid == VLMQ_LOSS && !a.diagonal) return false;
  int64_t start = a.first;
  for (int64_t b = 0; b < a.block_count; start = a.blocks[b++]) {
    if (a.blocks[b] <= start || a.blocks[b] - start > VLMQ_BLOCK) return false;
  }
  const size_t bytes = vlmq_group_grid_workspace_bytes(&a);
  return start == a.first + a.columns && a.workspace_bytes >= bytes &&
         (bytes == 0 || (a.workspace && is_aligned(a.workspace, 256)));
}

}  // namespace
}  // namespace vlmq

extern "C" size_t vlmq_group_grid_workspace_bytes(const vlmq_group_grid_args* args) {
  if (!args || args->rows <= 0 || args->columns <= 0 || !vlmq::valid_rule(args->rule)) return 0;
  const size_t searches = vlmq::has_search(*args) ? sizeof(vlmq::Search) : 0;
  return vlmq::solved_bytes(*args) + static_cast<size_t>(args->rows) * searches;
}

VLMQ_CALL(vlmq_group_grid, args, stream) {
  using namespace vlmq;
  if (!args || !valid(*args)) return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->columns == 0) return VLMQ_OK;
  float* const solved = args->error ? static_cast<float*>(args->workspace) : nullptr;
  if (solved) {
    const dim3 grid(static_cast<unsigned>(ceil_div(args->rows, kRows)));
    int64_t start = args->first;
    for (int64_t b = 0; b < args->block_count; start = args->blocks[b++]) {
      const vlmq_status status = VLMQ_LAUNCH(
          solve_block_kernel, grid, kThreads, kShared, stream, *args, solved,
          static_cast<long long>(start - args->first), static_cast<int>(args->blocks[b] - start));
      if (status != VLMQ_OK) return status;
    }
  }
  if (has_search(*args)) {
    auto* const searches =
        reinterpret_cast<Search*>(static_cast<char*>(args->workspace) + solved_bytes(*args));
    return args->products ? search<true>(*args, solved, searches, stream)
                          : search<false>(*args, solved, searches, stream);
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(args->rows, kThreads / 32)));
  return VLMQ_LAUNCH(group_grid_kernel, grid, kThreads, 0, stream, *args, solved);
}
