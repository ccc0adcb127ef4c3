/* C API of the vlmq kernels. */
#ifndef VLMQ_H
#define VLMQ_H

#ifdef __cplusplus
extern "C" {
#endif

/* What a call returns. Any value that is not VLMQ_OK means that nothing was enqueued. */
typedef enum vlmq_status {
  VLMQ_OK = 0,
  VLMQ_BAD_ARGUMENT = 1,    /* an argument is outside what the call documents */
  VLMQ_NO_KERNEL_IMAGE = 2, /* the library holds no code for this GPU */
  VLMQ_CUDA_ERROR =
      3 /* the CUDA runtime refused; cudaGetLastError's value is lost with this call */
} vlmq_status;

/* A cudaStream_t or CUstream, named without a CUDA header. */
typedef struct CUstream_st* vlmq_stream;

#ifdef __cplusplus
}
#endif

#endif
