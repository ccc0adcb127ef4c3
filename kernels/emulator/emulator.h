// Stands in for the CUDA compiler's built-ins: g++ -x c++ -DVLMQ_EMULATED -include
// emulator/emulator.h kernel.cu
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "emulator/float16.h"
#include "emulator/runtime.h"
#include "emulator/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

#define threadIdx (::vlmq::emulator::current->index)
#define blockIdx (::vlmq::emulator::current->block->index)
#define blockDim (::vlmq::emulator::current->block->size)
#define gridDim (::vlmq::emulator::current->block->grid)
constexpr int warpSize = 32;

// The trailing parameter by which a wrapper learns its caller's line.
#define VLMQ_SITE_ALONE ::vlmq::emulator::Site site = ::vlmq::emulator::Site::here()
#define VLMQ_SITE , VLMQ_SITE_ALONE

#include "emulator/async_copy.h"
#include "emulator/collectives.h"
#include "emulator/intrinsics.h"
