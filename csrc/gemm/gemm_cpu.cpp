// The float32 matrix product of gemm.h.
//
// A tile is kRows rows by one panel (kVectors vectors of columns) of accumulators in registers: one
// load of the panel's vectors and one broadcast a row give kRows * kVectors multiply-adds. The
// weights are cut along k into slices that fit in the first-level cache and are used by all tiles
// of a row block; between slices the accumulators rest in y as float32, which loses nothing.
#include "common/simd.h"
#include "gemm/gemm.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectors = 4;  // 6 x 4 accumulators, 4 weights, 1 broadcast of 32 registers
#elif defined(__aarch64__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;  // 6 x 2 accumulators, 2 weights, 1 broadcast of 16 registers
#endif
constexpr int kRows = 6;
constexpr int kColumns = kVectors * kWidth;

// Inputs a slice (AVX-512: 32 KiB of weights). 256 measured 2 % faster, with 1.4 times the error.
constexpr int64_t kSlice = 128;
constexpr int64_t kBlockRows = 16 * kRows;
// Weights that are not prepacked are copied into panels for each block of rows anew.
constexpr int64_t kCopyBlockRows = 32 * kRows;
constexpr int64_t kGroupPanels = 512 / kColumns;
// Below this many multiply-adds a task would be dominated by being handed to a thread.
constexpr int64_t kTaskWork = 1 << 16;

inline VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Where an x tile lies: rows as the caller has them, or packed [k][kRows] by pack_rows.
struct RowMajor {
  int64_t row_stride;
  const float* row(const float* x, int r) const { return x + r * row_stride; }
  static constexpr int64_t step = 1;
};
struct PackedRows {
  const float* row(const float* x, int r) const { return x + r; }
  static constexpr int64_t step = kRows;
};

// One tile of R rows by P panels, `panel_stride` floats apart, over k inputs.
template <int R, int P, class Layout>
inline void tile(Layout layout, const float* x, const float* w, int64_t panel_stride, int64_t k,
                 float* y, int64_t ldy, int64_t columns, const float* bias, bool from_y,
                 bool relu) {
  VecF acc[R][P * kVectors] = {};
  const float* rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) rows[r] = layout.row(x, r);
#pragma GCC unroll 2
  for (int64_t i = 0; i < k; ++i) {
    VecF weights[P * kVectors];
#pragma GCC unroll 32
    for (int v = 0; v < P * kVectors; ++v) {
      weights[v] = load(w + (v / kVectors) * panel_stride + (v % kVectors) * kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const VecF value = broadcast(rows[r][i * Layout::step]);
#pragma GCC unroll 32
      for (int v = 0; v < P * kVectors; ++v) {
        acc[r][v] = multiply_add(value, weights[v], acc[r][v]);
      }
    }
    w += kColumns;
  }
  const bool full = columns >= P * kColumns;
#pragma GCC unroll 32
  for (int v = 0; v < P * kVectors; ++v) {
    const int64_t left = full ? kWidth : columns - v * kWidth;
    const int64_t lanes = left < 0 ? 0 : left < kWidth ? left : kWidth;
    VecF start = zero();
    if (bias != nullptr) {
      start = full ? load(bias + v * kWidth) : load_partial(bias + v * kWidth, lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* const p = y + r * ldy + v * kWidth;
      VecF out = acc[r][v] + start;
      if (from_y) out += full ? load(p) : load_partial(p, lanes);
      // Written so that a NaN stays one.
      if (relu) out = select(out < 0.0f, zero(), out);
      if (full) {
        store(p, out);
      } else {
        store_partial(p, out, lanes);
      }
    }
  }
}

template <int P, class Layout>
inline void tile_of(int rows, Layout layout, const float* x, const float* w, int64_t panel_stride,
                    int64_t k, float* y, int64_t ldy, int64_t columns, const float* bias,
                    bool from_y, bool relu) {
  static_assert(kRows == 6);
  switch (rows) {
    case 1:
      return tile<1, P>(layout, x, w, panel_stride, k, y, ldy, columns, bias, from_y, relu);
    case 2:
      return tile<2, P>(layout, x, w, panel_stride, k, y, ldy, columns, bias, from_y, relu);
    case 3:
      return tile<3, P>(layout, x, w, panel_stride, k, y, ldy, columns, bias, from_y, relu);
    default:
      break;
  }
  if constexpr (P == 1) {
    switch (rows) {
      case 4:
        return tile<4, P>(layout, x, w, panel_stride, k, y, ldy, columns, bias, from_y, relu);
      case 5:
        return tile<5, P>(layout, x, w, panel_stride, k, y, ldy, columns, bias, from_y, relu);
      default:
        return tile<6, P>(layout, x, w, panel_stride, k, y, ldy, columns, bias, from_y, relu);
    }
  }
}

// One panel [k][kColumns]; columns at and past `columns` are zero.
void pack_panel(const float* w, int64_t columns, int64_t k, int64_t n_stride, int64_t k_stride,
                float* out) {
  columns = columns < kColumns ? columns : kColumns;
  if (columns < kColumns) std::memset(out, 0, static_cast<size_t>(k * kColumns) * sizeof(float));
  if (n_stride == 1) {
    for (int64_t i = 0; i < k; ++i, w += k_stride, out += kColumns) {
      if (columns == kColumns) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(out + v * kWidth, load(w + v * kWidth));
      } else {
        std::memcpy(out, w, static_cast<size_t>(columns) * sizeof(float));
      }
    }
    return;
  }
  // 16 inputs at a time: one cache line of each column, and the lines written stay near.
  for (int64_t begin = 0; begin < k; begin += 16) {
    const int64_t end = begin + 16 < k ? begin + 16 : k;
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = begin; i < end; ++i) {
        out[i * kColumns + c] = w[c * n_stride + i * k_stride];
      }
    }
  }
}

void pack(const float* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride, float* out,
          Parallel& parallel) {
  parallel.for_each((n + kColumns - 1) / kColumns, [&](int64_t panel) {
    pack_panel(w + panel * kColumns * n_stride, n - panel * kColumns, k, n_stride, k_stride,
               out + panel * k * kColumns);
  });
}

// x[rows, k] as tiles [k][kRows].
void pack_rows(const float* x, int64_t rows, int64_t row_stride, int64_t k, int64_t k_stride,
               float* out) {
  for (int64_t begin = 0; begin < rows; begin += kRows, out += k * kRows) {
    const float* const from = x + begin * row_stride;
    if (row_stride == 1 && begin + kRows <= rows) {
      for (int64_t i = 0; i < k; ++i) {
        std::memcpy(out + i * kRows, from + i * k_stride, kRows * sizeof(float));
      }
      continue;
    }
    const int64_t count = rows - begin < kRows ? rows - begin : kRows;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < k; ++i) out[i * kRows + r] = from[r * row_stride + i * k_stride];
    }
  }
}

struct Slice {
  int64_t begin;
  int64_t depth;
  const float* bias;  // of the first column of the call, null unless this is the first slice
  bool from_y;
  bool relu;
};

void gemm(const GemmArguments& a, Parallel& parallel) {
  const int64_t m = a.m, n = a.weight.n, k = a.weight.k;
  if (m <= 0 || n <= 0) return;
  const int64_t panels = (n + kColumns - 1) / kColumns;
  const bool prepacked = a.weight.data != nullptr;
  const bool pack_x = a.x_k_stride != 1;
  // With so few rows every weight is used by one tile: all slices of two panels at a time, because
  // the accumulators of one panel are too few to hide the latency of the multiply-adds.
  const bool few_rows = m <= 3 && prepacked && !pack_x;

  const int64_t most_rows = prepacked ? kBlockRows : kCopyBlockRows;
  const int64_t row_blocks = (m + most_rows - 1) / most_rows;
  const int64_t row_tiles = (m + kRows - 1) / kRows;
  const int64_t block_rows = (row_tiles + row_blocks - 1) / row_blocks * kRows;

  const int64_t panel_work = (block_rows < m ? block_rows : m) * (k > 0 ? k : 1) * kColumns;
  int64_t group = kTaskWork / panel_work;
  group = group < 2 ? 2 : group;
  group = row_blocks > 1 || group > kGroupPanels ? kGroupPanels : group;
  const int64_t groups = (panels + group - 1) / group;

  const auto slice_at = [&](int64_t begin) {
    return Slice{begin, k - begin < kSlice ? k - begin : kSlice, begin == 0 ? a.bias : nullptr,
                 begin > 0 || a.epilogue.accumulate,
                 begin + kSlice >= k && a.epilogue.activation == GemmActivation::relu};
  };

  parallel.for_each(row_blocks * groups, [&](int64_t task) {
    const int64_t first_row = task % row_blocks * block_rows;
    const int64_t rows = m - first_row < block_rows ? m - first_row : block_rows;
    const int64_t first_panel = task / row_blocks * group;
    const int64_t end_panel = first_panel + group < panels ? first_panel + group : panels;
    const float* const x = a.x + first_row * a.x_row_stride;
    float* const y = a.y + first_row * a.ldy;
    const auto bias_at = [](const Slice& slice, int64_t column) {
      return slice.bias == nullptr ? nullptr : slice.bias + column;
    };

    if (few_rows) {
      for (int64_t panel = first_panel; panel < end_panel; panel += 2) {
        const int64_t column = panel * kColumns;
        const bool pair = panel + 1 < end_panel;
        int64_t begin = 0;
        do {
          const Slice slice = slice_at(begin);
          const float* const w = a.weight.data + (panel * k + begin) * kColumns;
          const auto run = [&](auto panels_at_once) {
            tile_of<decltype(panels_at_once)::value>(
                static_cast<int>(rows), RowMajor{a.x_row_stride}, x + begin, w, k * kColumns,
                slice.depth, y + column, a.ldy, n - column, bias_at(slice, column), slice.from_y,
                slice.relu);
          };
          if (pair) {
            run(Count<2>{});
          } else {
            run(Count<1>{});
          }
          begin += kSlice;
        } while (begin < k);
      }
      return;
    }

    float* const x_scratch = pack_x ? static_cast<float*>(thread_scratch(
                                          static_cast<size_t>(block_rows * kSlice) * sizeof(float)))
                                    : nullptr;
    float* const w_scratch =
        prepacked ? nullptr
                  : static_cast<float*>(thread_scratch(kSlice * kColumns * sizeof(float), 1));
    int64_t begin = 0;
    do {
      const Slice slice = slice_at(begin);
      if (pack_x) {
        pack_rows(x + begin * a.x_k_stride, rows, a.x_row_stride, slice.depth, a.x_k_stride,
                  x_scratch);
      }
      for (int64_t panel = first_panel; panel < end_panel; ++panel) {
        const int64_t column = panel * kColumns;
        const float* w = a.weight.data + (panel * k + begin) * kColumns;
        if (!prepacked) {
          pack_panel(a.rows + begin * a.rows_stride + column, n - column, slice.depth, 1,
                     a.rows_stride, w_scratch);
          w = w_scratch;
        }
        for (int64_t r = 0; r < rows; r += kRows) {
          const int count = static_cast<int>(rows - r < kRows ? rows - r : kRows);
          float* const to = y + r * a.ldy + column;
          const auto run = [&](auto layout, const float* from) {
            tile_of<1>(count, layout, from, w, 0, slice.depth, to, a.ldy, n - column,
                       bias_at(slice, column), slice.from_y, slice.relu);
          };
          if (pack_x) {
            run(PackedRows{}, x_scratch + r * slice.depth);
          } else {
            run(RowMajor{a.x_row_stride}, x + r * a.x_row_stride + begin);
          }
        }
      }
      begin += kSlice;
    } while (begin < k);
  });
}

}  // namespace

extern const GemmKernels gemm_kernels = {kColumns, &pack, &gemm};

}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
