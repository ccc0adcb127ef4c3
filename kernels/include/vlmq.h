/* C API of the vlmq kernels: importance-weighted second-order quantization (VLMQ, arXiv 2508.03351) on an NVIDIA GPU.
 *
 * Every call takes one argument struct and a stream, checks the arguments on the host, enqueues its work on the stream
 * and returns. Nothing is allocated, nothing waits, no state is kept. Failures that only the GPU can see (a pivot that
 * is not positive, a scale that does not fit) are written to a `status` word in device memory.
 *
 * Unless a field says otherwise: pointers are device memory, aligned to their element type's size; matrices are dense,
 * row-major, [rows, cols] with element (r, c) at r * cols + c; a field called `..._stride` counts elements from row to
 * row; sizes may be zero, and then nothing is enqueued. Work space comes from the caller: the call's
 * `..._workspace_bytes` says how much for the same arguments, aligned to 256 bytes, contents irrelevant.
 *
 * Results are the same bits for the same arguments on the same GPU. The shared memory that a GPU gives a block decides
 * which variant of a kernel runs there, not in which order it sums. */
#ifndef VLMQ_H
#define VLMQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a call returns. Any value that is not VLMQ_OK means that nothing, or not all of it, was enqueued. */
typedef enum vlmq_status {
  VLMQ_OK = 0,
  VLMQ_BAD_ARGUMENT = 1,    /* an argument is outside what the call documents */
  VLMQ_NO_KERNEL_IMAGE = 2, /* the library holds no code for this GPU */
  VLMQ_CUDA_ERROR = 3       /* the CUDA runtime refused; cudaGetLastError's value is lost with this call */
} vlmq_status;

/* What this thread's last call that did not return VLMQ_OK says of it: the call, the CUDA runtime's function and the
 * kernel that it was of, CUDA's error by name and in words. "" where there was none. Stays valid and the same until the
 * thread's next such call. An error that a kernel raises while it runs, such as cudaErrorIllegalAddress, is told by a
 * later call or by the stream's synchronization; the message says so. */
const char* vlmq_last_error(void);

/* A cudaStream_t or CUstream, named without a CUDA header. */
typedef struct CUstream_st* vlmq_stream;

/* Element types. */
typedef enum vlmq_dtype { VLMQ_F32 = 0, VLMQ_BF16 = 1, VLMQ_F16 = 2 } vlmq_dtype;

/* Widest block of columns that is quantized one column at a time, and row stride of the stored diagonal blocks. */
#define VLMQ_BLOCK 128

/* ---- statistics: weighted_hessian.cu (paper eq. for H, method section 2) ---- */

/* hessian += U^T diag(g^2) U on the triangle row <= column, and cross += (F - U)^T diag(g^2) U in full.
 * Columns are scaled to float16 by powers of two; one operand is exact there, the weighted one a high and a low part:
 * relative error against the exact sum <= 1e-6, of each entry (i, j) against the norms of its columns i and j. At most
 * 128 tokens are summed inside tensor cores before a float32 addition. g^2 u and g^2 (f - u) must fit float32. */
typedef struct vlmq_weighted_hessian_args {
  const void* u;  /* [tokens, features], quantized-path inputs; rows aligned to 16 bytes for full speed */
  const void* f;  /* [tokens, features], float-path inputs, or NULL: no cross term */
  const float* g; /* [tokens] importance, or NULL: all 1; a token with g = 0 is not read into a sum */
  float* hessian; /* [features, features] */
  float* cross;   /* [features, features], NULL exactly where f is */
  int64_t tokens;
  int64_t features;
  int64_t u_stride; /* >= features */
  int64_t f_stride; /* >= features where f is given */
  vlmq_dtype dtype; /* of u and f; VLMQ_F32 splits both operands */
  int32_t fast;     /* not 0: one product without the low part, relative error about 1e-4 */
  void* workspace;
  size_t workspace_bytes;
} vlmq_weighted_hessian_args;

size_t vlmq_weighted_hessian_workspace_bytes(const vlmq_weighted_hessian_args* args);
vlmq_status vlmq_weighted_hessian(const vlmq_weighted_hessian_args* args, vlmq_stream stream);

/* ---- factor: permute.cu, product.cu, factor.cu, cross_factor.cu, cholesky_inverse.cu, norms.cu ---- */

/* out[i, j] = x[order[i], order[j]] for i <= j, from the upper triangle of a symmetric x where `symmetric`, else from x
 * itself; out[i, i] = diagonal[order[i]] where given; entries below the diagonal are zero. */
typedef struct vlmq_permute_args {
  const float* x;        /* [n, n] */
  const int32_t* order;  /* [n], place -> original index */
  const float* diagonal; /* [n] in original order, or NULL */
  float* out;            /* [n, n], not x */
  int64_t n;
  int32_t symmetric;
} vlmq_permute_args;

vlmq_status vlmq_permute(const vlmq_permute_args* args, vlmq_stream stream);

/* c = beta * c + alpha * a * op(b), float32 in and out, float32-accurate: three TF32 products a pair of operands, their
 * sums promoted outside the tensor cores. With beta 0 the old content of c is not read; with inner 0 neither a nor b
 * is. */
typedef struct vlmq_product_args {
  const float* a; /* [rows, inner], a_stride */
  const float* b; /* [inner, cols], b_stride; [cols, inner] where transposed */
  float* c;       /* [rows, cols], c_stride; overlaps neither operand */
  int64_t rows;
  int64_t cols;
  int64_t inner;
  int64_t a_stride;
  int64_t b_stride;
  int64_t c_stride;
  float alpha;
  float beta;
  int32_t transposed; /* op(b) = b^T */
} vlmq_product_args;

vlmq_status vlmq_product(const vlmq_product_args* args, vlmq_stream stream);

/* H = R R^T with R upper triangular, from the last index backwards; what the solver reads of it: root = R diag(R)^-1,
 * the inverses of its diagonal blocks, and diag(R). Blocks are consecutive and cover 0..n. */
typedef struct vlmq_factor_args {
  float* h;        /* [n, n]: damped H by its upper triangle in, root (zeros below the diagonal) out */
  float* inverses; /* [n, VLMQ_BLOCK] out: rows of a block hold root_BB^-1 in their first columns, zeros elsewhere */
  float* diagonal; /* [n] out */
  const int32_t* blocks; /* HOST memory: [block_count] ends of blocks, rising, the last n; <= VLMQ_BLOCK wide */
  int64_t block_count;
  int64_t n;
  int32_t* status; /* [1] out: -1, or the index of a pivot that is not positive; then the other outputs are undefined */
  void* workspace;
  size_t workspace_bytes;
} vlmq_factor_args;

size_t vlmq_factor_workspace_bytes(const vlmq_factor_args* args);
vlmq_status vlmq_factor(const vlmq_factor_args* args, vlmq_stream stream);

/* The GPTAQ term in the factor's coordinates: M = alpha * triu(C R^-T, 1) diag(R)^-1, and the blocks of
 * P = M root^-1. */
typedef struct vlmq_cross_factor_args {
  float* c; /* [n, n]: C in processing order by its upper triangle in, M (zeros on and below the diagonal) out */
  const float* root; /* of vlmq_factor */
  const float* inverses;
  const float* diagonal;
  float* products;       /* [n, VLMQ_BLOCK] out: rows of a block hold P_BB in their first columns, zeros elsewhere */
  const int32_t* blocks; /* HOST memory, as vlmq_factor's */
  int64_t block_count;
  int64_t n;
  float alpha;
  void* workspace;
  size_t workspace_bytes;
} vlmq_cross_factor_args;

size_t vlmq_cross_factor_workspace_bytes(const vlmq_cross_factor_args* args);
vlmq_status vlmq_cross_factor(const vlmq_cross_factor_args* args, vlmq_stream stream);

/* The upper factor U of the inverse, H^-1 = U^T U, which solvers of the GPTQ family read: damps the diagonal, factors
 * backwards and inverts the triangle, in place. */
typedef struct vlmq_cholesky_inverse_args {
  float* h;   /* [n, n]: symmetric by its upper triangle in, U (zeros below the diagonal) out */
  float damp; /* added to the diagonal as damp * mean(diagonal); >= 0 */
  int64_t n;
  int32_t* status; /* [1] out, as vlmq_factor's */
  void* workspace;
  size_t workspace_bytes;
} vlmq_cholesky_inverse_args;

size_t vlmq_cholesky_inverse_workspace_bytes(const vlmq_cholesky_inverse_args* args);
vlmq_status vlmq_cholesky_inverse(const vlmq_cholesky_inverse_args* args, vlmq_stream stream);

/* *norm = sum x^2, or tr(x H x^T) where h is given, summed in float64 in a fixed order; 0 where x is empty. */
typedef struct vlmq_squared_norm_args {
  const float* x; /* [rows, cols] */
  const float* h; /* [cols, cols] by its upper triangle, or NULL */
  double* norm;   /* [1] out */
  int64_t rows;
  int64_t cols;
  void* workspace;
  size_t workspace_bytes;
} vlmq_squared_norm_args;

size_t vlmq_squared_norm_workspace_bytes(const vlmq_squared_norm_args* args);
vlmq_status vlmq_squared_norm(const vlmq_squared_norm_args* args, vlmq_stream stream);

/* ---- solve: permute_columns.cu, quantize_block.cu, group_grid.cu (method section 3) ---- */

/* out[r, j] = x[r, order[j]], 0 where order[j] < 0: the columns of a weight in processing order, dead inputs zero. */
typedef struct vlmq_permute_columns_args {
  const void* x;        /* [rows, cols] */
  const int32_t* order; /* [cols], place -> original column, below cols: the caller's to know */
  float* out;           /* [rows, cols], not x */
  int64_t rows;
  int64_t cols;
  vlmq_dtype dtype; /* of x */
} vlmq_permute_columns_args;

vlmq_status vlmq_permute_columns(const vlmq_permute_columns_args* args, vlmq_stream stream);

typedef enum vlmq_grid {
  VLMQ_MINMAX = 0, /* the full range of the group's weights */
  VLMQ_MSE = 1,    /* the shrunken range p * [lo, hi], p = 1 - k/100, k = 0..79, with the least sum |w - q|^2.4 */
  VLMQ_LOSS = 2 /* the candidate that the group's own solve has the least loss with: sum (e_j R_jj)^2, e_j the error of
                 * column j, carried on inside the group (in one wider than a block, inside its blocks); without a
                 * factor sum (w - q)^2. Candidates: the range p * [lo, hi], p = 1 - 3k/64, k = 0..15; then,
                 * unless symmetric, the best of these with its zero one step down or up and its scale times 7/8, 1,
                 * 9/8 and 5/4. The first of equals */
} vlmq_grid;

/* How the range of a group becomes a scale, a zero and codes: with lo = min(0, min w), hi = max(0, max w), m = 2^bits -
 * 1, asymmetric scale (hi - lo)/m, zero round(-lo/scale) clamped to [smallest_zero, m]; symmetric scale 2 max(-lo,
 * hi)/m, zero 2^(bits-1), each operation in float32. The scale is rounded to its storage type first. A group of zeros
 * has scale 1, zero 2^(bits-1). The code of w is clamp(round(w/scale) + zero, 0, m), ties to even. */
typedef struct vlmq_grid_rule {
  int32_t bits; /* 2, 3, 4 or 8 */
  int32_t symmetric;
  vlmq_grid grid;
  vlmq_dtype scale_type;
  int32_t smallest_zero;
} vlmq_grid_rule;

/* Quantizes the columns of one block of a layer, one after the other, with error propagation inside the block; columns
 * are in processing order. acc = error + cross are the corrections in the factor's coordinates (root, inverses). */
typedef struct vlmq_quantize_block_args {
  float* residual;    /* [rows, features] in/out: W where a column has no code yet, W - W_hat where it has */
  float* carried;     /* [rows, features] out on the block, or NULL: weight before rounding, after it with shift */
  float* shift;       /* [rows, features] out on the block, or NULL: (weight before rounding - after) P_BB */
  float* error;       /* [rows, span] in/out: (W - W_hat) root of the span's columns */
  const float* cross; /* [rows, span] in, or NULL: the same of the GPTAQ term */
  const float* root;  /* [features, features], or NULL: round to nearest, then carried..cross and below are NULL too */
  const float* inverses; /* [features, VLMQ_BLOCK] */
  const float* diagonal; /* [features] */
  const float* products; /* [features, VLMQ_BLOCK] of vlmq_cross_factor, or NULL: GPTQ */
  uint8_t* codes;        /* [rows, columns] out */
  float* scales;         /* [rows, columns / group] out; in, [rows, 1], where given_grid */
  uint8_t* zeros;        /* as scales */
  double* row_errors;    /* [rows] out: ||(W - W_hat) R||^2 of the block's columns, without a factor ||W - W_hat||^2 */
  int32_t* status;       /* [1] in/out: smallest row whose scale does not fit its type; the caller sets INT32_MAX */
  int64_t rows;
  int64_t features;
  int64_t first;      /* first column of the block */
  int64_t columns;    /* of the block; <= VLMQ_BLOCK, more without a factor */
  int64_t span_first; /* first column of the span, <= first */
  int64_t span;       /* columns of the span */
  int64_t group;      /* columns of a group; divides `columns` unless given_grid */
  int32_t given_grid; /* the block lies in one group whose grid is given */
  vlmq_grid_rule rule;
} vlmq_quantize_block_args;

vlmq_status vlmq_quantize_block(const vlmq_quantize_block_args* args, vlmq_stream stream);

/* Scales and zeros of the one group first..first + columns from its weights as they are before its first column is
 * quantized: W + (error + cross) root^-1 on the group, without corrections W itself. */
typedef struct vlmq_group_grid_args {
  const float* residual;
  const float* error; /* [rows, columns], or NULL: W is as it is */
  const float* cross; /* [rows, columns], or NULL */
  const float*
      root; /* as vlmq_quantize_block's, up to `products`; NULL where neither error nor VLMQ_LOSS asks for it */
  const float* inverses;
  const float* diagonal; /* read for VLMQ_LOSS */
  const float* products; /* read for VLMQ_LOSS, or NULL: GPTQ */
  const int32_t* blocks; /* HOST memory: [block_count] ends of the group's blocks, in columns of the layer */
  int64_t block_count;
  float* scales;   /* [rows] out */
  uint8_t* zeros;  /* [rows] out */
  int32_t* status; /* as vlmq_quantize_block's */
  int64_t rows;
  int64_t features;
  int64_t first;
  int64_t columns;
  vlmq_grid_rule rule;
  void* workspace;
  size_t workspace_bytes;
} vlmq_group_grid_args;

size_t vlmq_group_grid_workspace_bytes(const vlmq_group_grid_args* args);
vlmq_status vlmq_group_grid(const vlmq_group_grid_args* args, vlmq_stream stream);

/* ---- pack: pack.cu, unpack.cu ---- */

/* Code i of a run occupies bits i*bits..(i+1)*bits-1 of a little-endian bit stream that is cut into 32-bit words; a
 * code may straddle two. compressed-tensors: a run per row (`weight_packed` [rows, words]). GPTQ: a run per column
 * (`qweight` [words, cols] of the transposed layer), the zeros' runs along the outputs with `subtract` 1. Strides are
 * positive, and no two codes and no two words share a place. */
typedef struct vlmq_pack_args {
  const uint8_t* codes; /* vlmq_pack in; [runs, count] where code_stride is 1 */
  uint32_t* words;      /* vlmq_pack out, ceil(count * bits / 32) words a run, the last padded with zero bits */
  int64_t runs;
  int64_t count;           /* codes of a run */
  int64_t code_stride;     /* elements from code to code of a run */
  int64_t code_run_stride; /* elements from run to run */
  int64_t word_stride;
  int64_t word_run_stride;
  int32_t bits;     /* 2, 3, 4 or 8 */
  int32_t subtract; /* taken off each code before it is packed, modulo 2^bits */
} vlmq_pack_args;

vlmq_status vlmq_pack(const vlmq_pack_args* args, vlmq_stream stream);

/* The inverse of vlmq_pack: `add` is added to each code modulo 2^bits. */
typedef struct vlmq_unpack_args {
  const uint32_t* words;
  uint8_t* codes;
  int64_t runs;
  int64_t count;
  int64_t code_stride;
  int64_t code_run_stride;
  int64_t word_stride;
  int64_t word_run_stride;
  int32_t bits;
  int32_t add;
} vlmq_unpack_args;

vlmq_status vlmq_unpack(const vlmq_unpack_args* args, vlmq_stream stream);

/* out[r, c] = scales[r, group of c] * (codes[r, c] - zeros[r, group of c]). */
typedef struct vlmq_dequantize_args {
  const uint8_t* codes;       /* [rows, cols] */
  const float* scales;        /* [rows, groups] */
  const uint8_t* zeros;       /* [rows, groups] */
  const int32_t* group_index; /* [cols] group of a column, or NULL: c / (cols / groups) */
  void* out;                  /* [rows, cols] */
  int64_t rows;
  int64_t cols;
  int64_t groups;
  vlmq_dtype dtype; /* of out, rounded to nearest */
} vlmq_dequantize_args;

vlmq_status vlmq_dequantize(const vlmq_dequantize_args* args, vlmq_stream stream);

/* ---- decoder: what calibration runs, forward and backward ---- */
/* Activations and weights are of one dtype, arithmetic and sums are float32, one rounding at the end of a call. */

/* y = x / sqrt(mean(x^2) + eps) * weight, or with a bias (x - mean) / sqrt(var + eps) * weight + bias, per row. */
typedef struct vlmq_norm_args {
  const void* x;      /* [rows, cols] */
  const void* weight; /* [cols] */
  const void* bias;   /* [cols], or NULL: RMS norm */
  void* y;            /* [rows, cols] */
  int64_t rows;
  int64_t cols;
  float eps;
  vlmq_dtype dtype;
} vlmq_norm_args;

vlmq_status vlmq_norm(const vlmq_norm_args* args, vlmq_stream stream);

/* Gradient of vlmq_norm without a bias, for its input: with r = 1 / sqrt(mean(x^2) + eps),
 * d_x = r * (weight * d_y - x * r^2 * mean(weight * d_y * x)), per row. */
typedef struct vlmq_norm_backward_args {
  const void* x;      /* [rows, cols] input of the forward call */
  const void* weight; /* [cols] */
  const void* d_y;    /* [rows, cols] */
  void* d_x;          /* [rows, cols] out */
  int64_t rows;
  int64_t cols;
  float eps;
  vlmq_dtype dtype;
} vlmq_norm_backward_args;

vlmq_status vlmq_norm_backward(const vlmq_norm_backward_args* args, vlmq_stream stream);

/* Rotary embedding in place, halves rotated: (a, b) -> (a cos - b sin, b cos + a sin) on each pair (j, j + head_dim /
 * 2). */
typedef struct vlmq_rotate_args {
  void* x;          /* [tokens, heads * head_dim] */
  const float* cos; /* [tokens, head_dim / 2] */
  const float* sin; /* [tokens, head_dim / 2] */
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;   /* even */
  int32_t transposed; /* the inverse rotation */
  vlmq_dtype dtype;
} vlmq_rotate_args;

vlmq_status vlmq_rotate(const vlmq_rotate_args* args, vlmq_stream stream);

/* One sequence among packed rows. The last query of a causal span stands at the span's last key. */
typedef struct vlmq_span {
  int32_t q_begin, q_end; /* rows of q */
  int32_t k_begin, k_end; /* rows of k and v */
} vlmq_span;

/* Softmax attention, scaled by head_dim^-0.5, each span on its own. Query head h reads key/value head
 * h / (heads / kv_heads). Rows outside all spans are zero. */
typedef struct vlmq_attention_args {
  const void* q;          /* [q_rows, heads * head_dim] */
  const void* k;          /* [k_rows, kv_heads * head_dim] */
  const void* v;          /* [k_rows, kv_heads * head_dim] */
  void* out;              /* [q_rows, heads * head_dim] */
  float* log_sum;         /* [q_rows, heads] out: log of the softmax's denominator, or NULL */
  const vlmq_span* spans; /* [span_count] */
  int64_t span_count;
  int64_t longest_q; /* most query rows of a span */
  int64_t q_rows;
  int64_t k_rows;
  int64_t heads;
  int64_t kv_heads; /* divides heads */
  int64_t head_dim; /* even, at most 256 */
  int32_t causal;
  vlmq_dtype dtype;
} vlmq_attention_args;

vlmq_status vlmq_attention(const vlmq_attention_args* args, vlmq_stream stream);

/* Gradients of vlmq_attention. */
typedef struct vlmq_attention_backward_args {
  const void* q;
  const void* k;
  const void* v;
  const void* out;        /* of the forward call */
  const float* log_sum;   /* of the forward call */
  const void* d_out;      /* [q_rows, heads * head_dim] */
  void* d_q;              /* [q_rows, heads * head_dim] out */
  void* d_k;              /* [k_rows, kv_heads * head_dim] out */
  void* d_v;              /* [k_rows, kv_heads * head_dim] out */
  const vlmq_span* spans; /* [span_count]; no two share a row */
  int64_t span_count;
  int64_t longest_q;
  int64_t longest_k;
  int64_t q_rows;
  int64_t k_rows;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int32_t causal;
  vlmq_dtype dtype;
  void* workspace;
  size_t workspace_bytes;
} vlmq_attention_backward_args;

size_t vlmq_attention_backward_workspace_bytes(const vlmq_attention_backward_args* args);
vlmq_status vlmq_attention_backward(const vlmq_attention_backward_args* args, vlmq_stream stream);

typedef enum vlmq_activation {
  VLMQ_SILU = 0,
  VLMQ_GELU = 1, /* with the error function */
  VLMQ_GELU_TANH = 2,
  VLMQ_QUICK_GELU = 3 /* x sigmoid(1.702 x) */
} vlmq_activation;

/* y = activation(x), or activation(x) * up where given; y may be x. */
typedef struct vlmq_activate_args {
  const void* x;
  const void* up; /* or NULL */
  void* y;
  int64_t count; /* elements */
  vlmq_activation activation;
  vlmq_dtype dtype;
} vlmq_activate_args;

vlmq_status vlmq_activate(const vlmq_activate_args* args, vlmq_stream stream);

/* out = factor * (a + sign * b), elementwise; out may be a of the same type. b of one row is repeated (`b_rows` 1, rows
 * > 1). */
typedef struct vlmq_add_args {
  const void* a; /* [rows, cols] */
  const void* b; /* [b_rows, cols], b_rows = rows or 1 */
  void* out;     /* [rows, cols] */
  int64_t rows;
  int64_t b_rows;
  int64_t cols;
  float sign;
  float factor;
  vlmq_dtype dtype;
  int32_t float_a; /* a is float32, as sums are before they are rounded, whatever dtype says of b and out */
} vlmq_add_args;

vlmq_status vlmq_add(const vlmq_add_args* args, vlmq_stream stream);

/* Rows by index: out[i] = table[indices[i]], or with `scatter` out[indices[i]] = table[i] (distinct indices). Rows are
 * bytes: any dtype. */
typedef struct vlmq_gather_rows_args {
  const void* table;
  const uint32_t* indices; /* [rows]; within the table, resp. within out: the caller's to know */
  void* out;
  int64_t rows;
  int64_t row_bytes; /* a multiple of 2 */
  int32_t scatter;
} vlmq_gather_rows_args;

vlmq_status vlmq_gather_rows(const vlmq_gather_rows_args* args, vlmq_stream stream);

/* means[r] = mean over columns of |x[r]| (importance, paper section 4), summed in a fixed order. */
typedef struct vlmq_mean_abs_rows_args {
  const void* x; /* [rows, cols] */
  float* means;  /* [rows] out */
  int64_t rows;
  int64_t cols;
  vlmq_dtype dtype;
} vlmq_mean_abs_rows_args;

vlmq_status vlmq_mean_abs_rows(const vlmq_mean_abs_rows_args* args, vlmq_stream stream);

/* sums[r] = sum over columns of (x[r] * scales)^2, in a fixed order: what a token weighs where each channel has its own
 * unit. */
typedef struct vlmq_scaled_squares_rows_args {
  const void* x;       /* [rows, cols] */
  const float* scales; /* [cols] */
  float* sums;         /* [rows] out */
  int64_t rows;
  int64_t cols;
  vlmq_dtype dtype;
} vlmq_scaled_squares_rows_args;

vlmq_status vlmq_scaled_squares_rows(const vlmq_scaled_squares_rows_args* args, vlmq_stream stream);

/* *row = min(*row, first row that holds a NaN or an infinity); the caller sets INT32_MAX before. */
typedef struct vlmq_first_non_finite_row_args {
  const void* x; /* [rows, cols] */
  int32_t* row;  /* [1] in/out */
  int64_t rows;
  int64_t cols;
  vlmq_dtype dtype;
} vlmq_first_non_finite_row_args;

vlmq_status vlmq_first_non_finite_row(const vlmq_first_non_finite_row_args* args, vlmq_stream stream);

/* out = x in another type, rounded to nearest, ties to even. */
typedef struct vlmq_convert_args {
  const void* x;
  void* out;
  int64_t count;
  vlmq_dtype from;
  vlmq_dtype to;
} vlmq_convert_args;

vlmq_status vlmq_convert(const vlmq_convert_args* args, vlmq_stream stream);

#ifdef __cplusplus
}
#endif

#endif
