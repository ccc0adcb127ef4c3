/* Quantizes one linear layer with GPTQ, weighted by token importance, through the C API and nothing else: what a program that
 * has its own weights and activations does. It writes codes, scales, zeros and packed words to the file it is given.
 *
 * On a GPU, with the libraries that `cargo build --release` leaves in target/release/vlmq:
 *
 *     cc -std=c99 quantize_layer.c -I target/release/vlmq -I $CUDA_HOME/include \
 *        target/release/vlmq/libvlmq_kernels.a $CUDA_HOME/lib64/libcudart_static.a -lpthread -ldl -lrt -o quantize_layer
 *
 * The tests define EMULATED and link the kernels that the emulator runs; device memory is then host memory. */
#define _POSIX_C_SOURCE 200112L
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vlmq.h"

/* ---- Device memory, in five lines of the CUDA runtime. ------------------------------------------------------------- */

#ifdef EMULATED
static int new_memory(void** p, size_t bytes) { return posix_memalign(p, 256, bytes); }
static int to_device(void* to, const void* from, size_t bytes) { return memcpy(to, from, bytes) != to; }
static int to_host(void* to, const void* from, size_t bytes) { return memcpy(to, from, bytes) != to; }
static int set_zero(void* p, size_t bytes) { return memset(p, 0, bytes) != p; }
static void free_memory(void* p) { free(p); }
#else
#include <cuda_runtime_api.h>
static int new_memory(void** p, size_t bytes) { return cudaMalloc(p, bytes); }
static int to_device(void* to, const void* from, size_t bytes) { return cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice); }
static int to_host(void* to, const void* from, size_t bytes) { return cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost); }
static int set_zero(void* p, size_t bytes) { return cudaMemset(p, 0, bytes); }
static void free_memory(void* p) { cudaFree(p); }
#endif

/* Says where and leaves. */
static void check(int failed, const char* what) {
  if (failed) {
    fprintf(stderr, "%s: failed with status %d\n", what, failed);
    exit(1);
  }
}

/* The same of a call of the C API, which says why itself. */
static void enqueued(vlmq_status status) {
  if (status != VLMQ_OK) {
    fprintf(stderr, "%s\n", vlmq_last_error());
    exit(1);
  }
}

static void* device(size_t bytes) {
  void* p = NULL;
  check(new_memory(&p, bytes ? bytes : 1), "device memory");
  return p;
}

static void* device_copy(const void* from, size_t bytes) {
  void* p = device(bytes);
  check(to_device(p, from, bytes), "copy to the device");
  return p;
}

static void* device_zeros(size_t bytes) {
  void* p = device(bytes);
  check(set_zero(p, bytes), "clear");
  return p;
}

static void* host(size_t bytes) {
  void* p = malloc(bytes);
  check(p == NULL, "host memory");
  return p;
}

/* ---- The layer. ---------------------------------------------------------------------------------------------------- */

enum { ROWS = 48, FEATURES = 320, TOKENS = 700, GROUP = 64, BITS = 3 };
enum { GROUPS = FEATURES / GROUP, WORDS = FEATURES * BITS / 32 };
#define DAMP 0.01

/* Whole numbers from -128 to 127, spread evenly. */
static int next(uint32_t* state) {
  *state = *state * 1664525u + 1013904223u;
  return (int)(*state >> 24) - 128;
}

/* The upper half of a float is the bfloat16 with the same leading bits; here they are all. */
static uint16_t bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)(bits >> 16);
}

/* H = sum over tokens of g^2 u u^T, upper triangle. */
static float* statistics(const uint16_t* u, const float* g) {
  vlmq_weighted_hessian_args args;
  memset(&args, 0, sizeof args);
  args.u = device_copy(u, sizeof(uint16_t) * TOKENS * FEATURES);
  args.g = device_copy(g, sizeof(float) * TOKENS);
  args.hessian = device_zeros(sizeof(float) * FEATURES * FEATURES);
  args.tokens = TOKENS;
  args.features = FEATURES;
  args.u_stride = FEATURES;
  args.dtype = VLMQ_BF16;
  args.workspace_bytes = vlmq_weighted_hessian_workspace_bytes(&args);
  args.workspace = device(args.workspace_bytes);
  enqueued(vlmq_weighted_hessian(&args, NULL));
  /* Freeing waits for the work before it, as cudaFree does; the emulator's calls are done when they return. */
  free_memory(args.workspace);
  free_memory((void*)args.u);
  free_memory((void*)args.g);
  return args.hessian;
}

/* H with its columns in the order in which they are quantized (here: as they come) and a damped diagonal. */
static float* damped(const float* hessian) {
  static float copy[FEATURES][FEATURES];
  float diagonal[FEATURES];
  int32_t order[FEATURES];
  double mean = 0;
  vlmq_permute_args args;
  int i;
  check(to_host(copy, hessian, sizeof copy), "copy of H");
  for (i = 0; i < FEATURES; ++i) mean += copy[i][i] / (double)FEATURES;
  for (i = 0; i < FEATURES; ++i) {
    order[i] = i;
    diagonal[i] = (float)(copy[i][i] + DAMP * mean);
  }
  memset(&args, 0, sizeof args);
  args.x = hessian;
  args.order = device_copy(order, sizeof order);
  args.diagonal = device_copy(diagonal, sizeof diagonal);
  args.out = device(sizeof copy);
  args.n = FEATURES;
  args.symmetric = 1;
  enqueued(vlmq_permute(&args, NULL));
  free_memory((void*)args.order);
  free_memory((void*)args.diagonal);
  return args.out;
}

/* H = R R^T, in place; the columns are quantized in blocks that end at `blocks`. */
static vlmq_factor_args factor(float* h, const int32_t* blocks, int64_t block_count) {
  vlmq_factor_args args;
  int32_t status = -1;
  memset(&args, 0, sizeof args);
  args.h = h;
  args.inverses = device(sizeof(float) * FEATURES * VLMQ_BLOCK);
  args.diagonal = device(sizeof(float) * FEATURES);
  args.blocks = blocks;
  args.block_count = block_count;
  args.n = FEATURES;
  args.status = device_copy(&status, sizeof status);
  args.workspace_bytes = vlmq_factor_workspace_bytes(&args);
  args.workspace = device(args.workspace_bytes);
  enqueued(vlmq_factor(&args, NULL));
  /* The copy waits. Not positive definite: raise the damping and start again from H. */
  check(to_host(&status, args.status, sizeof status), "status");
  check(status != -1, "vlmq_factor: a pivot that is not positive");
  free_memory(args.workspace);
  return args;
}

int main(int count, char** arguments) {
  static uint16_t u[TOKENS * FEATURES];
  static float g[TOKENS], weight[ROWS * FEATURES];
  static uint8_t codes[ROWS * FEATURES], block_codes[ROWS * VLMQ_BLOCK], zeros[ROWS * GROUPS];
  static float scales[ROWS * GROUPS];
  int32_t blocks[(FEATURES + VLMQ_BLOCK - 1) / VLMQ_BLOCK];
  int block_count = 0, first, i, r;
  uint32_t state = 1;
  float* hessian;
  vlmq_factor_args made;
  vlmq_quantize_block_args quantize;
  vlmq_product_args carry;
  vlmq_pack_args pack;
  int32_t status = INT32_MAX;
  uint32_t* words = host(sizeof(uint32_t) * ROWS * WORDS);
  FILE* file;
  check(count != 2, "usage: quantize_layer FILE");

  /* Inputs: neighbours lean on each other, every seventh column is louder. */
  for (i = 0; i < TOKENS * FEATURES; ++i) {
    const int before = i % FEATURES ? (int)next(&state) / 4 : 0;
    u[i] = bfloat16((float)(before + next(&state) / 2) / (i % FEATURES % 7 ? 64.0f : 16.0f));
  }
  for (i = 0; i < TOKENS; ++i) g[i] = (float)(next(&state) + 160) / 128.0f;
  for (i = 0; i < ROWS * FEATURES; ++i) weight[i] = (float)(256 * next(&state) + next(&state)) / 65536.0f;

  for (first = 0; first < FEATURES; first += VLMQ_BLOCK)
    blocks[block_count++] = first + VLMQ_BLOCK < FEATURES ? first + VLMQ_BLOCK : FEATURES;
  hessian = statistics(u, g);
  made = factor(damped(hessian), blocks, block_count);
  free_memory(hessian);

  memset(&quantize, 0, sizeof quantize);
  quantize.residual = device_copy(weight, sizeof weight);
  quantize.error = device_zeros(sizeof weight);
  quantize.root = made.h;
  quantize.inverses = made.inverses;
  quantize.diagonal = made.diagonal;
  quantize.codes = device(sizeof block_codes);
  quantize.scales = device(sizeof scales);
  quantize.zeros = device(sizeof zeros);
  quantize.row_errors = device(sizeof(double) * ROWS);
  quantize.status = device_copy(&status, sizeof status);
  quantize.rows = ROWS;
  quantize.features = FEATURES;
  quantize.span_first = 0; /* one span over all columns; longer layers take several, so that `error` stays narrow */
  quantize.span = FEATURES;
  quantize.group = GROUP;
  quantize.rule.bits = BITS;
  quantize.rule.grid = VLMQ_LOSS;
  quantize.rule.scale_type = VLMQ_BF16;

  memset(&carry, 0, sizeof carry);
  carry.a = quantize.residual;
  carry.rows = ROWS;
  carry.a_stride = carry.b_stride = carry.c_stride = FEATURES;
  carry.alpha = carry.beta = 1;

  memset(&pack, 0, sizeof pack);
  pack.codes = quantize.codes;
  pack.runs = ROWS;
  pack.code_stride = pack.word_stride = 1;
  pack.word_run_stride = WORDS;
  pack.bits = BITS;
  pack.words = device(sizeof(uint32_t) * ROWS * WORDS);

  for (first = i = 0; i < block_count; first = blocks[i++]) {
    const int columns = blocks[i] - first, groups = columns / GROUP;
    uint32_t* const all_words = pack.words;
    static float block_scales[ROWS * VLMQ_BLOCK / GROUP];
    static uint8_t block_zeros[ROWS * VLMQ_BLOCK / GROUP];
    /* error[:, block] += (W - W_hat)[:, earlier] root[earlier, block] */
    carry.b = made.h + first;
    carry.c = quantize.error + first;
    carry.cols = columns;
    carry.inner = first;
    enqueued(vlmq_product(&carry, NULL));
    quantize.first = first;
    quantize.columns = columns;
    enqueued(vlmq_quantize_block(&quantize, NULL));
    /* Packed while they are there: a block of 128, and here the last one of 64, fills whole words. */
    pack.count = pack.code_run_stride = columns;
    pack.words = all_words + first * BITS / 32;
    enqueued(vlmq_pack(&pack, NULL));
    pack.words = all_words;

    check(to_host(block_codes, quantize.codes, (size_t)(ROWS * columns)), "codes");
    check(to_host(block_scales, quantize.scales, sizeof(float) * (size_t)(ROWS * groups)), "scales");
    check(to_host(block_zeros, quantize.zeros, (size_t)(ROWS * groups)), "zeros");
    for (r = 0; r < ROWS; ++r) {
      memcpy(codes + r * FEATURES + first, block_codes + r * columns, (size_t)columns);
      memcpy(scales + r * GROUPS + first / GROUP, block_scales + r * groups, sizeof(float) * (size_t)groups);
      memcpy(zeros + r * GROUPS + first / GROUP, block_zeros + r * groups, (size_t)groups);
    }
  }
  check(to_host(&status, quantize.status, sizeof status), "status");
  check(status != INT32_MAX, "vlmq_quantize_block: a scale that does not fit bfloat16");
  check(to_host(words, pack.words, sizeof(uint32_t) * ROWS * WORDS), "words");

  file = fopen(arguments[1], "wb");
  check(file == NULL, arguments[1]);
  check(fwrite(codes, sizeof codes, 1, file) != 1, arguments[1]);
  check(fwrite(scales, sizeof scales, 1, file) != 1, arguments[1]);
  check(fwrite(zeros, sizeof zeros, 1, file) != 1, arguments[1]);
  check(fwrite(words, sizeof(uint32_t) * ROWS * WORDS, 1, file) != 1, arguments[1]);
  check(fclose(file), arguments[1]);
  printf("wrote %d codes of %d bits to %s\n", ROWS * FEATURES, BITS, arguments[1]);
  return 0;
}
