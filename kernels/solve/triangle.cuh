// A block's triangles in shared memory, and its rows in registers: kLanes neighbouring lanes share
// a row and hold four neighbours of every panel of 4 kLanes columns each.
#pragma once

#include "device/ptx.cuh"
#include "solve/tile.cuh"
#include "vlmq.h"

namespace vlmq {

constexpr int kBlockThreads = 256;

template <int kLanes>
struct Shape {
  static constexpr int kPanel = 4 * kLanes;  // columns that a row's lanes hold side by side
  static constexpr int kPanels = VLMQ_BLOCK / kPanel;  // float4 registers of a lane
  static constexpr int kRows = kBlockThreads / kLanes;
  /// A row of the tile starts four banks after the last: rows of a warp never meet in a bank.
  static constexpr int kTileStride = VLMQ_BLOCK + 4;
  /// Rows of a triangle without the panels left of the diagonal.
  static constexpr int kTriangle = kPanel * kPanel * kPanels * (kPanels + 1) / 2;
  static constexpr int kFirstPanel = kPanel * VLMQ_BLOCK;  // of a triangle, and its largest
  static_assert(VLMQ_BLOCK % kPanel == 0, "a block is cut into whole panels");
  static_assert(32 % kPanel == 0, "panels make up the 32 columns by which row errors are summed");

  /// Where the rows of a panel start in a triangle.
  __device__ static int start(int panel) {
    return kPanel * (panel * VLMQ_BLOCK - kPanel * panel * (panel - 1) / 2);
  }

  /// Where row k of a triangle would start, had it all its columns: element (k, c) is at
  /// row(k / kPanel, k) + c.
  __device__ static int row(int panel, int k) {
    const int width = VLMQ_BLOCK - panel * kPanel;
    return start(panel) + (k - panel * kPanel) * width - panel * kPanel;
  }
};

/// Starts copying the panels `from` to `to` of a block's triangle, the first of them to `target`,
/// zeros where the block is narrower than VLMQ_BLOCK.
template <int kLanes>
__device__ __forceinline__ void stage_panels(float* target, const float* source, long long stride,
                                             int columns, int from, int to) {
  using S = Shape<kLanes>;
  const bool vectors = has_aligned_rows(source, stride);
  constexpr int kQuads = VLMQ_BLOCK / 4;
  const int before = S::start(from), end = to * S::kPanel * kQuads;
  for (int i = from * S::kPanel * kQuads + static_cast<int>(threadIdx.x); i < end;
       i += kBlockThreads) {
    const int k = i / kQuads, c = i % kQuads * 4, panel = k / S::kPanel;
    if (c < panel * S::kPanel) continue;
    const int valid = k < columns ? columns - c : 0;
    stage4(target + S::row(panel, k) - before + c, source + k * stride + c, valid, source, vectors);
  }
}

__device__ __forceinline__ float element(const float4& v, int e) {
  return e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w;
}

__device__ __forceinline__ void set_element(float4& v, int e, float value) {
  (e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w) = value;
}

/// d -= e u, product and sum rounded apart.
__device__ __forceinline__ void subtract(float4& d, float e, float4 u) {
  d.x = __fsub_rn(d.x, __fmul_rn(e, u.x));
  d.y = __fsub_rn(d.y, __fmul_rn(e, u.y));
  d.z = __fsub_rn(d.z, __fmul_rn(e, u.z));
  d.w = __fsub_rn(d.w, __fmul_rn(e, u.w));
}

}  // namespace vlmq
