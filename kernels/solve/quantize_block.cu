// One block of columns, quantized column by column (method section 3, steps 6 and 7).
//
// Rows are independent. kLanes neighbouring lanes share a row and hold its columns in registers,
// four neighbours of every panel of 4 kLanes columns each; all of them round a column, and each
// updates what it holds of the later ones. The block's triangles stand in shared memory, a row of
// the triangle read by all rows at once. Panels are walked by one loop: after each, the registers
// move down by one, so the loop's body, and with it the range search, is there once and registers
// still have fixed names.
//
// Where a block has 99 KiB of shared memory instead of 163, eight lanes share a row however many
// rows there are, and with GPTAQ the two triangles that only the panels' loop reads come panel by
// panel.
//
// Per element of a row the order of operations is that of the CPU device and does not depend on
// kLanes.
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "solve/grid.cuh"
#include "solve/loss.cuh"
#include "solve/tile.cuh"
#include "solve/triangle.cuh"

namespace vlmq {
namespace {

constexpr int kThreads = kBlockThreads;
constexpr unsigned kWarp = 0xffffffffu;

/// What GPTAQ's later blocks are given.
enum class Cross { kNone, kCarried, kShift };

/// From this many rows on, half the lanes a row do: the rows alone fill the GPU, and the work that
/// a row's lanes all do (rounding) is a smaller share.
constexpr long long kManyRows = 8192;

/// The weights of a row from a column on, in the tile.
struct TileWeights {
  const float* row;
  __device__ float operator()(int i) const { return row[i]; }
};

/// Blocks that should fit a multiprocessor's registers: without GPTAQ two fit Hopper's shared
/// memory.
template <int kLanes, Cross kCross, bool kLoss>
constexpr int kBlocks = kLanes == 8 && kCross == Cross::kNone && !kLoss ? 2 : 1;

/// kSmall: of `root` and `products` one panel at a time stands in shared memory. kLoss: groups take
/// the grid of least loss.
template <int kLanes, Cross kCross, bool kSmall, bool kLoss>
__global__ void __launch_bounds__(kThreads, kBlocks<kLanes, kCross, kLoss>)
    quantize_block_kernel(vlmq_quantize_block_args args) {
  using S = Shape<kLanes>;
  constexpr int kPanel = S::kPanel, kPanels = S::kPanels;
  constexpr int kStaged = kSmall ? S::kFirstPanel : S::kTriangle;
  float* const inverse = reinterpret_cast<float*>(dynamic_shared());
  float* const root = inverse + S::kTriangle;
  float* const products = root + kStaged;
  float* const tile = kCross == Cross::kNone ? products : products + kStaged;

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  const int columns = static_cast<int>(args.columns);
  const long long local = args.first - args.span_first;
  const long long row = static_cast<long long>(blockIdx.x) * S::kRows + thread / kLanes;
  const bool is_row = row < args.rows;
  const long long at = (is_row ? row : 0) * args.features + args.first;
  const long long at_span = (is_row ? row : 0) * args.span + local;
  float* const tile_row = tile + thread / kLanes * S::kTileStride;
  // Columns of a panel that this lane may touch in memory, from its own first one on.
  const int valid = is_row ? columns - 4 * lane : 0;

  const auto stage = [&](int from, int to) {
    stage_panels<kLanes>(root, args.root + args.first * args.features + args.first, args.features,
                         columns, from, to);
    if (kCross != Cross::kNone) {
      stage_panels<kLanes>(products, args.products + args.first * VLMQ_BLOCK, VLMQ_BLOCK, columns,
                           from, to);
    }
    cp_async_commit();
  };
  stage_panels<kLanes>(inverse, args.inverses + args.first * VLMQ_BLOCK, VLMQ_BLOCK, columns, 0,
                       kPanels);
  cp_async_commit();
  stage(0, kSmall ? 1 : kPanels);

  // Registers are named by panel: here all of the block's, later from the current one on.
  float4 w[kPanels], d[kPanels], sum[kPanels], shift[kPanels];
  const float4 zeros = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int j = 0; j < kPanels; ++j) {
    const int c = j * kPanel + 4 * lane;
    w[j] = load4(args.residual + at + c, valid - j * kPanel);
    float4 acc = load4(args.error + at_span + c, valid - j * kPanel);
    if (args.cross != nullptr) {
      acc = add(acc, load4(args.cross + at_span + c, valid - j * kPanel));
    }
    store_vector(tile_row + c, acc);
    d[j] = sum[j] = shift[j] = zeros;
  }
  cp_async_wait<1>();
  __syncthreads();

  // Corrections acc * inverse, kept apart from the weights until a column's turn comes: they are
  // smaller, and so is their rounding.
  const int panels = (columns + kPanel - 1) / kPanel;
  for (int panel = 0; panel < panels; ++panel) {
    for (int k = panel * kPanel; k < (panel + 1) * kPanel; k += 4) {
      const float4 acc = load_vector<float4>(tile_row + k);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* const from = inverse + S::row(panel, k + e) + 4 * lane;
#pragma unroll
        for (int j = 0; j < kPanels; ++j) {
          if (j >= panel) {
            add_product(d[j], element(acc, e), load_vector<float4>(from + j * kPanel));
          }
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  const int group = args.given_grid ? columns : static_cast<int>(args.group);
  const int groups = columns / group;
  const float largest = largest_code(args.rule.bits);
  Grid grid{1.0f, 0.0f};
  if (args.given_grid && is_row) {
    grid = {args.scales[row], static_cast<float>(args.zeros[row])};
  }
  int panel = 0;
  uint32_t codes = 0;
  float4 carried = zeros;
  // On their way while the panel is quantized.
  float4 error_before = load4(args.error + at_span + 4 * lane, valid);
  float4 diagonal = load4(args.diagonal + args.first + 4 * lane, valid);
  double row_error = 0.0, pending = 0.0;
  for (int index = 0; index < groups; ++index) {
    const int begin = index * group, end = begin + group;
    if (!args.given_grid) {
#pragma unroll
      for (int j = 0; j < kPanels; ++j) {
        if (j < panels - panel) {
          store_vector(tile_row + (panel + j) * kPanel + 4 * lane, add(w[j], d[j]));
        }
      }
      __syncwarp();
      if constexpr (kLoss) {
        const auto row_of = [&](int in, int i, int c) { return S::row(in, i) + c; };
        grid = grid_of_least_loss<kLanes, kCross != Cross::kNone>(
            range_of_group<kLanes>(TileWeights{tile_row + begin}, group),
            [&](int c) { return load_vector<float4>(tile_row + c); },
            [&](int in, int i, int c) { return load_vector<float4>(inverse + row_of(in, i, c)); },
            [&](int in, int i, int c) {
              if constexpr (!kSmall) return load_vector<float4>(products + row_of(in, i, c));
              return load4(args.products + (args.first + i) * VLMQ_BLOCK + c, columns - c);
            },
            args.diagonal + args.first, begin, end, args.rule);
      } else {
        grid = grid_of_group<kLanes>(TileWeights{tile_row + begin}, group, args.rule);
      }
      __syncwarp();  // the next group's weights take the place of these
      if (lane == 0 && is_row) {
        args.scales[row * groups + index] = grid.scale;
        args.zeros[row * groups + index] = byte_of(grid.zero);
        check_scale(grid.scale, row, args.status);
      }
    }
    for (int quad = begin / 4 * 4; quad < end; quad += 4) {
      const int owner = quad / 4 % kLanes, here = panel * kPanel + 4 * lane;
      const int left = panels - panel;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = quad + e;
        if (i < begin || i >= end) continue;  // of a neighbouring group
        const float mine = element(w[0], e);
        const float original = __shfl_sync(kWarp, mine, owner, kLanes);
        const float column = __shfl_sync(kWarp, __fadd_rn(mine, element(d[0], e)), owner, kLanes);
        const Rounded rounded = round_to_grid(column, grid, largest);
        const float error = __fsub_rn(column, rounded.value);
        const float residual = __fsub_rn(original, rounded.value);
        if (lane == owner) {
          set_element(w[0], e, residual);
          set_element(carried, e, kCross == Cross::kShift ? rounded.value : column);
          codes |= uint32_t{code_of(rounded, grid)} << 8 * e;
        }
        const int from = S::row(panel, i) + here;
        const int staged = kSmall ? from - S::start(panel) : from;
#pragma unroll
        for (int j = 0; j < kPanels; ++j) {
          if (j < left) {
            // In the column's own panel this spoils corrections of columns that are done.
            subtract(d[j], error, load_vector<float4>(inverse + from + j * kPanel));
            add_product(sum[j], residual, load_vector<float4>(root + staged + j * kPanel));
            if (kCross != Cross::kNone) {
              const float4 p = load_vector<float4>(products + staged + j * kPanel);
              subtract(d[j], -column, p);
              if (kCross == Cross::kShift) add_product(shift[j], error, p);
            }
          }
        }
      }
      const int done = quad + 4 < end ? quad + 4 : end;
      if (done % kPanel != 0 && done != columns) continue;

      // The panel's last column has its code.
      const int in_panel = valid - panel * kPanel;
      const long long place = at + here;
      store4(args.residual + place, w[0], in_panel);
      store4(args.codes + (is_row ? row : 0) * columns + here, codes, in_panel);
      if (kCross != Cross::kNone) store4(args.carried + place, carried, in_panel);
      if (kCross == Cross::kShift) store4(args.shift + place, shift[0], in_panel);
      const float4 error = add(error_before, sum[0]);
      store4(args.error + at_span + here, error, in_panel);
      double panel_error = 0.0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const double x = __dmul_rn(element(error, e), element(diagonal, e));
        panel_error = __dadd_rn(panel_error, __dmul_rn(x, x));
      }
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2) {
        panel_error = __dadd_rn(panel_error, __shfl_xor_sync(kWarp, panel_error, distance));
      }
      // Panels of 16 columns are summed in pairs first, so the sum's order is that of 32 lanes'.
      pending = __dadd_rn(pending, panel_error);
      if (done % 32 == 0 || done == columns) {
        row_error = __dadd_rn(row_error, pending);
        pending = 0.0;
      }

      ++panel;
      if (kSmall && panel < panels) {
        __syncthreads();  // all have done with the panel before
        stage(panel, panel + 1);
      }
      codes = 0;
      error_before = load4(args.error + at_span + here + kPanel, in_panel - kPanel);
      diagonal = load4(args.diagonal + args.first + here + kPanel, in_panel - kPanel);
#pragma unroll
      for (int j = 0; j + 1 < kPanels; ++j) {
        w[j] = w[j + 1];
        d[j] = d[j + 1];
        sum[j] = sum[j + 1];
        shift[j] = shift[j + 1];
      }
      if (kSmall && panel < panels) {
        cp_async_wait<0>();
        __syncthreads();
      }
    }
  }
  if (lane == 0 && is_row) args.row_errors[row] = row_error;
}

/// Weights of a row in memory.
struct RowWeights {
  const float* row;
  __device__ float operator()(int i) const { return row[i]; }
};

/// Round to nearest: a warp a row, groups of any width. kLoss: groups take the grid of least
/// squares.
template <bool kLoss>
__global__ void __launch_bounds__(kThreads) round_block_kernel(vlmq_quantize_block_args args) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const long long row =
      static_cast<long long>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= args.rows) return;  // a whole warp, and no barrier follows
  const int columns = static_cast<int>(args.columns);
  const int group = args.given_grid ? columns : static_cast<int>(args.group);
  const int groups = columns / group;
  const float largest = largest_code(args.rule.bits);
  float* const residual = args.residual + row * args.features + args.first;
  uint8_t* const codes = args.codes + row * columns;
  double error = 0.0;
  for (int index = 0; index < groups; ++index) {
    Grid grid;
    if (args.given_grid) {
      grid = {args.scales[row], static_cast<float>(args.zeros[row])};
    } else {
      const RowWeights weights{residual + index * group};
      grid = kLoss ? grid_of_least_squares<32>(weights, group, args.rule)
                   : grid_of_group<32>(weights, group, args.rule);
      __syncwarp();  // all lanes have read what each now changes
      if (lane == 0) {
        args.scales[row * groups + index] = grid.scale;
        args.zeros[row * groups + index] = byte_of(grid.zero);
        check_scale(grid.scale, row, args.status);
      }
    }
    for (int i = index * group + lane; i < (index + 1) * group; i += 32) {
      const Rounded rounded = round_to_grid(residual[i], grid, largest);
      const float difference = __fsub_rn(residual[i], rounded.value);
      codes[i] = code_of(rounded, grid);
      residual[i] = difference;
      error = __dadd_rn(error, __dmul_rn(difference, difference));
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    error = __dadd_rn(error, __shfl_xor_sync(kWarp, error, distance));
  }
  if (lane == 0) args.row_errors[row] = error;
}

/// Bytes of shared memory.
template <int kLanes, Cross kCross, bool kSmall = false>
constexpr size_t kShared = (Shape<kLanes>::kTriangle +
                            (kCross == Cross::kNone ? 1 : 2) *
                                (kSmall ? Shape<kLanes>::kFirstPanel : Shape<kLanes>::kTriangle) +
                            Shape<kLanes>::kRows * Shape<kLanes>::kTileStride) *
                           sizeof(float);

template <int kLanes, Cross kCross, bool kSmall, bool kLoss>
vlmq_status launch_block(const vlmq_quantize_block_args& args, vlmq_stream stream) {
  constexpr size_t kBytes = kShared<kLanes, kCross, kSmall>;
  static_assert(kBytes <= (kSmall ? kLeastShared : kAmpleShared), "a block's shared memory");
  const dim3 grid(static_cast<unsigned>(ceil_div(args.rows, Shape<kLanes>::kRows)));
  return VLMQ_LAUNCH((quantize_block_kernel<kLanes, kCross, kSmall, kLoss>), grid, kThreads, kBytes,
                     stream, args);
}

template <Cross kCross, bool kLoss>
vlmq_status launch_by_rows(const vlmq_quantize_block_args& args, vlmq_stream stream) {
  const size_t offered = shared_bytes_of_a_block();
  // With four lanes a row, the sums for a shift no longer fit the registers, nor does a search.
  if constexpr (kCross != Cross::kShift && !kLoss) {
    if (args.rows >= kManyRows && offered >= kShared<4, kCross>) {
      return launch_block<4, kCross, false, kLoss>(args, stream);
    }
  }
  // What fits everywhere needs no small variant.
  if constexpr (kShared<8, kCross> > kLeastShared) {
    if (offered < kShared<8, kCross>) return launch_block<8, kCross, true, kLoss>(args, stream);
  }
  return launch_block<8, kCross, false, kLoss>(args, stream);
}

template <Cross kCross>
vlmq_status launch_by_grid(const vlmq_quantize_block_args& args, vlmq_stream stream) {
  return args.rule.grid == VLMQ_LOSS && !args.given_grid
             ? launch_by_rows<kCross, true>(args, stream)
             : launch_by_rows<kCross, false>(args, stream);
}

bool valid(const vlmq_quantize_block_args& a) {
  if (a.rows < 0 || a.features < 0 || a.first < 0 || a.columns < 0) return false;
  if (a.rows > INT32_MAX || a.features > INT32_MAX || a.columns > a.features - a.first)
    return false;
  if (!valid_rule(a.rule)) return false;
  if (!a.given_grid && (a.group <= 0 || a.columns % a.group != 0)) return false;
  if (a.rows == 0 || a.columns == 0) return true;
  if (!a.residual || !a.codes || !a.scales || !a.zeros || !a.row_errors || !a.status) return false;
  if (!a.root) {
    return !a.carried && !a.shift && !a.error && !a.cross && !a.inverses && !a.diagonal &&
           !a.products;
  }
  if (!a.inverses || !a.diagonal || !a.error || a.columns > VLMQ_BLOCK) return false;
  // GPTAQ: what it is made of and what it hands on come together.
  if (a.products ? !a.carried : (a.carried || a.shift || a.cross)) return false;
  const int64_t local = a.first - a.span_first;
  return a.span_first >= 0 && local >= 0 && local <= a.span && a.columns <= a.span - local &&
         a.span <= a.features - a.span_first;
}

}  // namespace
}  // namespace vlmq

VLMQ_CALL(vlmq_quantize_block, args, stream) {
  using namespace vlmq;
  if (!args || !valid(*args)) return VLMQ_BAD_ARGUMENT;
  if (args->rows == 0 || args->columns == 0) return VLMQ_OK;
  if (!args->root) {
    const dim3 grid(static_cast<unsigned>(ceil_div(args->rows, kThreads / 32)));
    return args->rule.grid == VLMQ_LOSS
               ? VLMQ_LAUNCH(round_block_kernel<true>, grid, kThreads, 0, stream, *args)
               : VLMQ_LAUNCH(round_block_kernel<false>, grid, kThreads, 0, stream, *args);
  }
  if (!args->products) return launch_by_grid<Cross::kNone>(*args, stream);
  return args->shift ? launch_by_grid<Cross::kShift>(*args, stream)
                     : launch_by_grid<Cross::kCarried>(*args, stream);
}
