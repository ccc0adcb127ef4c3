// c = beta * c + alpha * a * op(b), float32-accurate: product_tile.cuh says how.
#include "factor/product.cuh"

#include <cmath>

#include "device/arguments.cuh"
#include "device/types.cuh"

namespace vlmq::factor {
namespace {

/// Rows of tiles that are taken together, column by column, so that the blocks that run at a time
/// read about as many rows of a as columns of b: what they share comes from L2.
constexpr int64_t kGroupRows = 8;

struct TileIndex {
  int64_t row, col;
};

/// Tile `index` of a rectangle.
__device__ __forceinline__ TileIndex tile_of_rectangle(int64_t index, int64_t tile_rows,
                                                       int64_t tile_cols) {
  const int64_t group = index / (kGroupRows * tile_cols), first = group * kGroupRows;
  const int64_t rows = min(kGroupRows, tile_rows - first);
  const int64_t within = index - first * tile_cols;
  return {first + within % rows, within / rows};
}

/// Tiles of column `col` and all before it where column c has base + 1 + c.
__host__ __device__ __forceinline__ int64_t tiles_until(int64_t col, int64_t base) {
  return (col + 1) * base + (col + 1) * (col + 2) / 2;
}

/// Tile `index` of the part on and above a diagonal, column by column.
__device__ __forceinline__ TileIndex tile_of_trapezoid(int64_t index, int64_t base) {
  // The root of (col)(col - 1) / 2 + col * (base + 1) = index, corrected where float rounds.
  const float half = static_cast<float>(base) + 0.5f;
  int64_t col = static_cast<int64_t>(sqrtf(half * half + 2.0f * static_cast<float>(index)) - half);
  while (col > 0 && tiles_until(col - 1, base) > index) --col;
  while (tiles_until(col, base) <= index) ++col;
  return {index - (col > 0 ? tiles_until(col - 1, base) : 0), col};
}

/// Column c of tiles of a trapezoid has trapezoid_base + 1 + c rows of tiles, or one fewer at the
/// end, which then does nothing.
__host__ __device__ __forceinline__ int64_t trapezoid_base(const ProductJob& job) {
  return ceil_div(job.diagonal, kTile);
}

__host__ __device__ __forceinline__ bool is_trapezoid(const ProductJob& job) {
  return job.diagonal < job.of.rows;
}

/// The epilogue. All of c is read before any is written, so that the reads wait for memory once.
/// kWhole: all entries of the tile count, and pairs of them are aligned.
template <bool kWhole>
__device__ __forceinline__ void write_tile(const ProductJob& job, const TileSums& sums,
                                           int64_t row0, int64_t col0, int64_t edge) {
  const auto at = [&](int64_t row, int64_t col) { return job.c + row * job.c_stride + col; };
  const auto counts = [&](int64_t row, int64_t col) {
    return row < job.of.rows && col < job.of.cols && row - col <= edge;
  };
  TileSums old = {};
  if (job.beta != 0.0f) {
    for_each_pair(row0, col0, [&](int64_t row, int64_t col, int m, int n, int i) {
      const float* c = at(row, col);
      if (kWhole) {
        const float2 both = load_vector<float2>(c);
        old[m][n][i] = both.x;
        old[m][n][i + 1] = both.y;
      } else {
        if (counts(row, col)) old[m][n][i] = c[0];
        if (counts(row, col + 1)) old[m][n][i + 1] = c[1];
      }
    });
  }
  for_each_pair(row0, col0, [&](int64_t row, int64_t col, int m, int n, int i) {
    const auto updated = [&](int k) {
      return __fmaf_rn(job.beta, old[m][n][k], __fmul_rn(job.alpha, sums[m][n][k]));
    };
    float* c = at(row, col);
    if (kWhole) {
      store_vector(c, make_float2(updated(i), updated(i + 1)));
    } else {
      if (counts(row, col)) c[0] = updated(i);
      if (counts(row, col + 1)) c[1] = updated(i + 1);
    }
  });
}

template <bool kTransposed, bool kVector>
__global__ void __launch_bounds__(kThreads, 1) product_kernel(ProductJob job) {
  if (job.status != nullptr && *job.status >= 0) return;
  const Operands& of = job.of;
  const int64_t index = blockIdx.x;
  const TileIndex tile = is_trapezoid(job) ? tile_of_trapezoid(index, trapezoid_base(job))
                                           : tile_of_rectangle(index, ceil_div(of.rows, kTile),
                                                               ceil_div(of.cols, kTile));
  const int64_t row0 = tile.row * kTile, col0 = tile.col * kTile;
  if (row0 >= of.rows || (is_trapezoid(job) && row0 > col0 + kTile - 1 + job.diagonal)) return;
  TileSums sums;
  multiply_tile<kTransposed, kVector>(sums, of, row0, col0);
  const int64_t edge = is_trapezoid(job) ? job.diagonal : of.rows;
  const bool vector = is_aligned(job.c, 8) && job.c_stride % 2 == 0;
  if (vector && row0 + kTile <= of.rows && col0 + kTile <= of.cols &&
      row0 + kTile - 1 - col0 <= edge) {
    write_tile<true>(job, sums, row0, col0, edge);
  } else {
    write_tile<false>(job, sums, row0, col0, edge);
  }
}

}  // namespace

vlmq_status enqueue_product(const ProductJob& job, vlmq_stream stream) {
  const Operands& of = job.of;
  if (of.rows == 0 || of.cols == 0) return VLMQ_OK;
  const int64_t tile_rows = ceil_div(of.rows, kTile), tile_cols = ceil_div(of.cols, kTile);
  if (tile_rows > INT32_MAX / tile_cols) return VLMQ_BAD_ARGUMENT;
  const int64_t tiles =
      is_trapezoid(job) ? tiles_until(tile_cols - 1, trapezoid_base(job)) : tile_rows * tile_cols;
  const bool vector = has_aligned_rows(of.a, of.a_stride) && has_aligned_rows(of.b, of.b_stride);
  const auto launch = [&](auto* kernel) {
    return VLMQ_LAUNCH(kernel, dim3(static_cast<unsigned>(tiles)), dim3(kThreads), kTileSharedBytes,
                       stream, job);
  };
  if (job.transposed) {
    return vector ? launch(product_kernel<true, true>) : launch(product_kernel<true, false>);
  }
  return vector ? launch(product_kernel<false, true>) : launch(product_kernel<false, false>);
}

}  // namespace vlmq::factor

VLMQ_CALL(vlmq_product, args, stream) {
  if (args == nullptr || args->rows < 0 || args->cols < 0 || args->inner < 0) {
    return VLMQ_BAD_ARGUMENT;
  }
  if (args->rows == 0 || args->cols == 0) return VLMQ_OK;
  const int64_t b_width = args->transposed ? args->inner : args->cols;
  const bool reads = args->inner > 0;
  if (args->c == nullptr || (reads && (args->a == nullptr || args->b == nullptr)) ||
      args->a_stride < args->inner || args->b_stride < b_width || args->c_stride < args->cols) {
    return VLMQ_BAD_ARGUMENT;
  }
  vlmq::factor::ProductJob job = {};
  job.of = {args->a, args->b, args->a_stride, args->b_stride, args->rows, args->cols, args->inner};
  job.c = args->c;
  job.c_stride = args->c_stride;
  job.alpha = args->alpha;
  job.beta = args->beta;
  job.transposed = args->transposed != 0;
  return enqueue_product(job, stream);
}
