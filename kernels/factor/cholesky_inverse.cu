// U with H^-1 = U^T U: damping, H = R R^T (factor.cu), and U = R^-1 = diag(R)^-1 L^-1 in place.
//
// With X = L^-1, X L = I gives column block J of X, above its diagonal block, as
// -(sum over K < J of X[:, K] L[K, J]) X_JJ. The sums are kept where L was: from the first block
// forwards, a block that is done is multiplied into all columns after it, and its own rows there,
// no longer needed, take their first sum. Spans of 512 columns as in factor.cu.
#include <cstdint>

#include "factor/factor.cuh"
#include "factor/product.cuh"
#include "factor/sum.cuh"
#include "factor/upper.cuh"

namespace vlmq::factor {
namespace {

/// One block: the mean of the diagonal in float64, then H + damp * mean on it.
__global__ void __launch_bounds__(kSumThreads) damp_kernel(float* h, int64_t n, float damp) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += h[i * n + i];
  const double mean = block_sum(sum, reinterpret_cast<double*>(dynamic_shared())) / double(n);
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) {
    h[i * n + i] = static_cast<float>(h[i * n + i] + damp * mean);
  }
}

/// x_BB = inverses of B, on and above the diagonal, blocks VLMQ_BLOCK wide: a block of threads per
/// row.
__global__ void __launch_bounds__(VLMQ_BLOCK)
    place_blocks_kernel(float* x, const float* inverses, int64_t n, const int32_t* status) {
  if (*status >= 0) return;
  const int64_t row = blockIdx.x, col = row / VLMQ_BLOCK * VLMQ_BLOCK + threadIdx.x;
  if (col >= row && col < n) x[row * n + col] = inverses[row * VLMQ_BLOCK + threadIdx.x];
}

struct Inversion {
  float* x;
  int64_t n;
  const int32_t* status;
};

struct Range {
  int64_t first, end;
};

/// x[rows, cols] = beta x[rows, cols] + alpha x[rows, inner] x[inner, cols].
vlmq_status multiply(const Inversion& of, Range rows, Range cols, Range inner, float alpha,
                     float beta, vlmq_stream stream) {
  ProductJob product = {};
  product.of = {of.x + rows.first * of.n + inner.first,
                of.x + inner.first * of.n + cols.first,
                of.n,
                of.n,
                rows.end - rows.first,
                cols.end - cols.first,
                inner.end - inner.first};
  product.c = of.x + rows.first * of.n + cols.first;
  product.c_stride = of.n;
  product.alpha = alpha;
  product.beta = beta;
  product.status = of.status;
  return enqueue_product(product, stream);
}

/// One span of blocks, first..last.
vlmq_status invert_span(const Inversion& of, const Blocks& blocks, int64_t first, int64_t last,
                        vlmq_stream stream) {
  const Range before = {0, blocks.start(first)}, span = {before.end, blocks.end(last)};
  const Range after = {span.end, of.n};
  vlmq_status status = VLMQ_OK;
  const auto then = [&](Range rows, Range cols, Range inner, float alpha, float beta) {
    if (status == VLMQ_OK) status = multiply(of, rows, cols, inner, alpha, beta, stream);
  };
  for (int64_t i = first; i <= last; ++i) {
    const Range block = {blocks.start(i), blocks.end(i)}, above = {0, block.first};
    const Range rest = {block.end, span.end};
    then(above, block, block, -1.0f, 0.0f);  // in place: one tile of columns
    then(above, rest, block, 1.0f, 1.0f);
    then(block, rest, block, 1.0f, 0.0f);  // in place: one tile of rows
  }
  then(before, after, span, 1.0f, 1.0f);
  for (int64_t i = first; i <= last; ++i) {
    // In place: row block i needs itself and the rows after it, which are still as they were.
    const Range block = {blocks.start(i), blocks.end(i)};
    then(block, after, {block.first, span.end}, 1.0f, 0.0f);
  }
  return status;
}

vlmq_status enqueue_inverse(const Inversion& of, const Blocks& blocks, const float* inverses,
                            vlmq_stream stream) {
  vlmq_status status = VLMQ_LAUNCH(place_blocks_kernel, dim3(static_cast<unsigned>(of.n)),
                                   dim3(VLMQ_BLOCK), 0, stream, of.x, inverses, of.n, of.status);
  constexpr int64_t kBlocksOfSpan = Blocks::kSpan / VLMQ_BLOCK;
  for (int64_t first = 0; first < blocks.count && status == VLMQ_OK; first += kBlocksOfSpan) {
    const int64_t next = first + kBlocksOfSpan;
    const int64_t last = (next < blocks.count ? next : blocks.count) - 1;
    status = invert_span(of, blocks, first, last, stream);
  }
  return status;
}

/// Floats of the work space: what finishes a block, the blocks' inverses, the diagonal.
size_t workspace_floats(int64_t n) {
  return kFinishBytes / sizeof(float) + static_cast<size_t>(n) * (VLMQ_BLOCK + 1);
}

}  // namespace
}  // namespace vlmq::factor

extern "C" size_t vlmq_cholesky_inverse_workspace_bytes(const vlmq_cholesky_inverse_args* args) {
  if (args == nullptr || args->n < 0 || args->n > INT32_MAX) return 0;
  return vlmq::factor::workspace_floats(args->n) * sizeof(float);
}

VLMQ_CALL(vlmq_cholesky_inverse, args, stream) {
  using namespace vlmq::factor;
  if (args == nullptr || args->n < 0 || args->n > INT32_MAX || args->status == nullptr ||
      !(args->damp >= 0.0f)) {
    return VLMQ_BAD_ARGUMENT;
  }
  const int64_t n = args->n;
  if (n == 0) return vlmq::fill_async(args->status, 0xff, sizeof(int32_t), stream);
  if (args->h == nullptr || args->workspace == nullptr ||
      args->workspace_bytes < workspace_floats(n) * sizeof(float)) {
    return VLMQ_BAD_ARGUMENT;
  }
  float* finish = static_cast<float*>(args->workspace);
  float* inverses = finish + kFinishBytes / sizeof(float);
  float* diagonal = inverses + n * VLMQ_BLOCK;
  const Blocks blocks = uniform_blocks(n);
  vlmq_status status = VLMQ_LAUNCH(damp_kernel, dim3(1), dim3(kSumThreads), kSumSharedBytes, stream,
                                   args->h, n, args->damp);
  if (status != VLMQ_OK) return status;
  status = enqueue_factor({args->h, inverses, diagonal, finish, args->status, blocks}, stream);
  if (status != VLMQ_OK) return status;
  status = enqueue_inverse({args->h, n, args->status}, blocks, inverses, stream);
  if (status != VLMQ_OK) return status;
  return enqueue_scaling({args->h, diagonal, n, Scaling::kInverse, 1.0f, args->status}, stream);
}
