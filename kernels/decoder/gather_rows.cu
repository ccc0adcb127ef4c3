// Rows by index, from a table or into one: a block a row, the widest accesses that the row allows.

#include "decoder/vectors.cuh"

namespace vlmq {
namespace {

template <class V>
__global__ void __launch_bounds__(256)
    gather_rows_kernel(const unsigned char* table, const uint32_t* indices, unsigned char* out,
                       int64_t rows, int64_t row_bytes, bool scatter) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t index = indices[row];
    const unsigned char* from = table + (scatter ? row : index) * row_bytes;
    unsigned char* to = out + (scatter ? index : row) * row_bytes;
    const int64_t step = int64_t{blockDim.x} * static_cast<int64_t>(sizeof(V));
    for (int64_t i = int64_t{threadIdx.x} * static_cast<int64_t>(sizeof(V)); i < row_bytes;
         i += step) {
      store_vector(to + i, load_vector<V>(from + i));
    }
  }
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_gather_rows, args, stream) {
  using namespace vlmq;
  if (args == nullptr || args->rows < 0 || args->row_bytes < 0 || args->row_bytes % 2 != 0)
    return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->row_bytes == 0) return VLMQ_OK;
  if (args->table == nullptr || args->indices == nullptr || args->out == nullptr ||
      !is_aligned(args->table, 2) || !is_aligned(args->out, 2))
    return VLMQ_BAD_ARGUMENT;
  const auto fits = [&](size_t bytes) {
    return args->row_bytes % static_cast<int64_t>(bytes) == 0 && is_aligned(args->table, bytes) &&
           is_aligned(args->out, bytes);
  };
  const auto run = [&](auto* kernel, int bytes) {
    return VLMQ_LAUNCH(kernel, blocks_of(args->rows, 1), threads_of_row(args->row_bytes / bytes), 0,
                       stream, static_cast<const unsigned char*>(args->table), args->indices,
                       static_cast<unsigned char*>(args->out), args->rows, args->row_bytes,
                       args->scatter != 0);
  };
  if (fits(16)) return run(gather_rows_kernel<uint4>, 16);
  if (fits(4)) return run(gather_rows_kernel<uint32_t>, 4);
  return run(gather_rows_kernel<uint16_t>, 2);
}
