// H = R R^T with R upper triangular, from the last block of columns backwards.
//
// Right-looking: a block that is done is taken off everything before it at once. The left-looking
// order has one panel of n / 128 tiles to work on at a time, too few for a GPU's 132 processors
// until the very end; here all tiles of the triangle are there to be worked on. What it costs, a
// read and a write of the triangle each time, is divided by four by doing the blocks of a span of
// 512 columns first (Blocks::span_first). Four launches a block, 3.25 on average.
#include "factor/factor.cuh"

#include <cmath>

#include "factor/diagonal_block.cuh"
#include "factor/product.cuh"
#include "factor/upper.cuh"

namespace vlmq::factor {
namespace {

struct DiagonalJob {
  float* h;         // of the block's first entry, rows n apart: A in, R_BB out, upper triangle
  float* inverses;  // [width, kBlock]: L^-1, zeros elsewhere
  float* diagonal;  // [width]: of R
  float* finish;    // [width, kBlock]: R_BB^-1, which finishes the rows above: times its transpose
  int32_t* status;
  int64_t n;
  int64_t start;
  int width;
};

__global__ void __launch_bounds__(kBlockThreads) diagonal_kernel(DiagonalJob job) {
  if (*job.status >= 0) return;  // a barrier lies between this and the only write, below
  DiagonalShared& shared = *reinterpret_cast<DiagonalShared*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  for (int index = thread; index < kBlock * kBlock; index += kBlockThreads) {
    const int row = index / kBlock, col = index % kBlock;
    if (row > col) continue;
    double value = row == col ? 1.0 : 0.0;
    if (col < job.width) value = job.h[row * job.n + col];
    shared.packed[packed_index(row, col)] = value;
  }
  __syncthreads();
  const int failed = factor_diagonal(shared);
  if (failed >= 0) {
    if (thread == 0) *job.status = static_cast<int32_t>(job.start + failed);
    return;
  }
  if (thread < kBlock) shared.pivots[thread] = sqrt(shared.pivots[thread]);
  __syncthreads();
  for (int index = thread; index < job.width * kBlock; index += kBlockThreads) {
    const int row = index / kBlock, col = index % kBlock;
    if (row > col || col >= job.width) continue;
    const double root = shared.pivots[col];
    const double value = row == col ? root : shared.packed[packed_index(row, col)] * root;
    job.h[row * job.n + col] = static_cast<float>(value);
    if (row == col) job.diagonal[row] = static_cast<float>(root);
  }
  __syncthreads();
  invert_unit_triangle(shared.packed);
  for (int index = thread; index < job.width * kBlock; index += kBlockThreads) {
    const int row = index / kBlock, col = index % kBlock;
    const double value =
        row <= col && col < job.width ? shared.packed[packed_index(row, col)] : 0.0;
    job.inverses[index] = static_cast<float>(value);
    job.finish[index] = static_cast<float>(value / shared.pivots[row]);
  }
}

/// Takes the columns inner_first..inner_end of R off the columns first..end of H and all rows above
/// their diagonal: H[i, j] -= sum over k of R[i, k] R[j, k].
vlmq_status subtract_outer(const FactorJob& job, int64_t first, int64_t end, int64_t inner_first,
                           int64_t inner_end, vlmq_stream stream) {
  const int64_t n = job.blocks.n;
  ProductJob product = {};
  product.of = {job.h + inner_first, job.h + first * n + inner_first, n, n, end,
                end - first,         inner_end - inner_first};
  product.c = job.h + first;
  product.c_stride = n;
  product.alpha = -1.0f;
  product.beta = 1.0f;
  product.transposed = true;
  product.diagonal = first;
  product.status = job.status;
  return enqueue_product(product, stream);
}

/// One block, and its part of the span's earlier blocks, which begin at span_start.
vlmq_status enqueue_block(const FactorJob& job, int64_t index, int64_t span_start,
                          vlmq_stream stream) {
  const int64_t n = job.blocks.n, start = job.blocks.start(index), end = job.blocks.end(index);
  const DiagonalJob diagonal = {job.h + start * n + start,
                                job.inverses + start * kBlock,
                                job.diagonal + start,
                                job.finish,
                                job.status,
                                n,
                                start,
                                static_cast<int>(end - start)};
  vlmq_status status = VLMQ_LAUNCH(diagonal_kernel, dim3(1), dim3(kBlockThreads),
                                   sizeof(DiagonalShared), stream, diagonal);
  if (status != VLMQ_OK) return status;
  // R[i, B] = A[i, B] R_BB^-T for the rows above, in place: one tile of columns.
  ProductJob product = {};
  product.of = {job.h + start, job.finish, n, kBlock, start, end - start, end - start};
  product.c = job.h + start;
  product.c_stride = n;
  product.alpha = 1.0f;
  product.transposed = true;
  product.status = job.status;
  status = enqueue_product(product, stream);
  if (status != VLMQ_OK) return status;
  return subtract_outer(job, span_start, start, start, end, stream);
}

}  // namespace

bool are_valid(const Blocks& blocks) {
  if (blocks.ends == nullptr || blocks.count < 1) return false;
  for (int64_t i = 0; i < blocks.count; ++i) {
    if (blocks.width(i) < 1 || blocks.width(i) > kBlock) return false;
  }
  return blocks.end(blocks.count - 1) == blocks.n;
}

vlmq_status enqueue_factor(const FactorJob& job, vlmq_stream stream) {
  static_assert(kBlock <= kTile, "a block's columns are one tile, so that it is finished in place");
  vlmq_status status = fill_async(job.status, 0xff, sizeof(int32_t), stream);  // -1
  for (int64_t last = job.blocks.count - 1; last >= 0 && status == VLMQ_OK;) {
    const int64_t first = job.blocks.span_first(last);
    const int64_t start = job.blocks.start(first), end = job.blocks.end(last);
    for (int64_t i = last; i >= first && status == VLMQ_OK; --i) {
      status = enqueue_block(job, i, start, stream);
    }
    if (status == VLMQ_OK) status = subtract_outer(job, 0, start, start, end, stream);
    last = first - 1;
  }
  if (status != VLMQ_OK) return status;
  return enqueue_scaling({job.h, job.diagonal, job.blocks.n, Scaling::kRoot, 1.0f, job.status},
                         stream);
}

}  // namespace vlmq::factor

extern "C" size_t vlmq_factor_workspace_bytes(const vlmq_factor_args*) {
  return vlmq::factor::kFinishBytes;
}

VLMQ_CALL(vlmq_factor, args, stream) {
  using namespace vlmq::factor;
  if (args == nullptr || args->n < 0 || args->n > INT32_MAX || args->status == nullptr) {
    return VLMQ_BAD_ARGUMENT;
  }
  if (args->n == 0) return vlmq::fill_async(args->status, 0xff, sizeof(int32_t), stream);
  const Blocks blocks = {args->blocks, args->block_count, args->n};
  if (args->h == nullptr || args->inverses == nullptr || args->diagonal == nullptr ||
      !are_valid(blocks) || args->workspace == nullptr || args->workspace_bytes < kFinishBytes) {
    return VLMQ_BAD_ARGUMENT;
  }
  return enqueue_factor({args->h, args->inverses, args->diagonal,
                         static_cast<float*>(args->workspace), args->status, blocks},
                        stream);
}
