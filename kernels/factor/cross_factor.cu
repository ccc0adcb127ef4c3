// The GPTAQ term in the factor's coordinates: M = alpha triu(C R^-T, 1) diag(R)^-1, and the
// diagonal blocks of P = M L^-1 with L = R diag(R)^-1.
//
// With Y L^T = C, C R^-T = Y diag(R)^-1. Y is found from the last block of columns backwards, in
// the order of factor.cu. Y[i, j] for i <= j needs C and Y on and above the diagonal only.
#include "factor/factor.cuh"
#include "factor/product.cuh"
#include "factor/upper.cuh"

namespace vlmq::factor {
namespace {

struct CrossJob {
  float* c;
  const float* root;
  const float* inverses;
  Blocks blocks;
};

/// C[i, j] -= sum over the columns k = inner_first..inner_end of Y[i, k] L[j, k], for the columns
/// first..end.
vlmq_status subtract(const CrossJob& job, int64_t first, int64_t end, int64_t inner_first,
                     int64_t inner_end, vlmq_stream stream) {
  const int64_t n = job.blocks.n;
  ProductJob product = {};
  product.of = {job.c + inner_first,    job.root + first * n + inner_first, n, n, end, end - first,
                inner_end - inner_first};
  product.c = job.c + first;
  product.c_stride = n;
  product.alpha = -1.0f;
  product.beta = 1.0f;
  product.transposed = true;
  product.diagonal = first;
  return enqueue_product(product, stream);
}

/// Y[i, B] = C[i, B] L_BB^-T, in place: one tile of columns. Zeros stand below the diagonal of
/// C_BB.
vlmq_status finish(const CrossJob& job, int64_t start, int64_t end, vlmq_stream stream) {
  const int64_t n = job.blocks.n;
  ProductJob product = {};
  product.of = {job.c + start, job.inverses + start * VLMQ_BLOCK, n, VLMQ_BLOCK, end, end - start,
                end - start};
  product.c = job.c + start;
  product.c_stride = n;
  product.alpha = 1.0f;
  product.transposed = true;
  product.diagonal = start;
  return enqueue_product(product, stream);
}

vlmq_status enqueue_solve(const CrossJob& job, vlmq_stream stream) {
  const Blocks& blocks = job.blocks;
  vlmq_status status = enqueue_clear_below(job.c, blocks.n, stream);
  for (int64_t last = blocks.count - 1; last >= 0 && status == VLMQ_OK;) {
    const int64_t first = blocks.span_first(last), span_start = blocks.start(first);
    for (int64_t i = last; i >= first && status == VLMQ_OK; --i) {
      const int64_t start = blocks.start(i), end = blocks.end(i);
      status = finish(job, start, end, stream);
      if (status == VLMQ_OK) status = subtract(job, span_start, start, start, end, stream);
    }
    if (status == VLMQ_OK) {
      status = subtract(job, 0, span_start, span_start, blocks.end(last), stream);
    }
    last = first - 1;
  }
  return status;
}

/// P_BB = M_BB L_BB^-1 of each block, whose stored zeros make the zeros beyond its columns.
vlmq_status enqueue_products(const CrossJob& job, float* products, vlmq_stream stream) {
  const int64_t n = job.blocks.n;
  for (int64_t i = 0; i < job.blocks.count; ++i) {
    const int64_t start = job.blocks.start(i), width = job.blocks.width(i);
    ProductJob product = {};
    product.of = {job.c + start * n + start,
                  job.inverses + start * VLMQ_BLOCK,
                  n,
                  VLMQ_BLOCK,
                  width,
                  VLMQ_BLOCK,
                  width};
    product.c = products + start * VLMQ_BLOCK;
    product.c_stride = VLMQ_BLOCK;
    product.alpha = 1.0f;
    const vlmq_status status = enqueue_product(product, stream);
    if (status != VLMQ_OK) return status;
  }
  return VLMQ_OK;
}

}  // namespace
}  // namespace vlmq::factor

extern "C" size_t vlmq_cross_factor_workspace_bytes(const vlmq_cross_factor_args*) { return 0; }

VLMQ_CALL(vlmq_cross_factor, args, stream) {
  using namespace vlmq::factor;
  if (args == nullptr || args->n < 0 || args->n > INT32_MAX) return VLMQ_BAD_ARGUMENT;
  if (args->n == 0) return VLMQ_OK;
  const Blocks blocks = {args->blocks, args->block_count, args->n};
  if (args->c == nullptr || args->root == nullptr || args->inverses == nullptr ||
      args->diagonal == nullptr || args->products == nullptr || !are_valid(blocks)) {
    return VLMQ_BAD_ARGUMENT;
  }
  const CrossJob job = {args->c, args->root, args->inverses, blocks};
  vlmq_status status = enqueue_solve(job, stream);
  if (status != VLMQ_OK) return status;
  status = enqueue_scaling(
      {args->c, args->diagonal, args->n, Scaling::kCross, args->alpha, nullptr}, stream);
  return status == VLMQ_OK ? enqueue_products(job, args->products, stream) : status;
}
