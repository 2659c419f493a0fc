// The matrix product of gemm.h, of any type: blocks of rows and panels, given out as tasks. Include
// it only from *_cpu.cpp.
#pragma once

#include <type_traits>

#include "gemm/packing.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

constexpr int64_t kBlockRows = 16 * kRows;
// Up to here, as in a step of the decoder, the weights are what comes from far.
constexpr int64_t kFewRows = 512;
// Blocks are made smaller, down to a quarter, where there would be fewer tasks than this.
constexpr int64_t kTasks = 16;
// Blocks of rows that go through one group of panels, which stays in the second-level cache, before
// they go through the next. Not all: a thread shall have the rows that it had in the operation
// before.
constexpr int64_t kTogether = 8;
constexpr int64_t kGroupPanels = 512 / kColumns;
// Elements that one task converts: a few microseconds.
constexpr int64_t kTaskConverted = 1 << 15;
// Below this many multiply-adds a task would be dominated by being handed to a thread.
constexpr int64_t kTaskWork = 1 << 16;
// Weights that are not prepacked are packed in slabs of inputs of at most this size.
constexpr int64_t kSlabBytes = 8 << 20;

// Rows of x that are turned are turned for so many bytes of them at a time.
constexpr int64_t kTurnedBytes = 8 << 20;
// Factors that are used once are packed by tasks of so many words of all columns: whole lines of
// memory are read, and what is read and written next is fetched ahead, because the stores would
// wait for their lines one after the other. (A weight gradient of 512 x 512 from 4096 bfloat16
// rows, 1 thread: 356 GFLOP/s without fetching ahead and with 4 words, 413 with it, 454 with 16
// words, 478 reading ahead too; 510 without any packing.)
constexpr int64_t kStrip = 16;

// Slots of thread_scratch: of the caller for all tasks, and of each task.
constexpr int kInputSlot = 1, kSlabSlot = 2, kTurnedSlot = 3;
constexpr int kSumsSlot = 0;

// Whether the rows of x may lie in any direction, and weights be used that are not packed.
template <class T>
constexpr bool kTurns = !std::is_same_v<T, int8_t>;

template <class T>
T* scratch(int64_t count, int slot) {
  // Never null, so that an offset within no elements is one too.
  return static_cast<T*>(thread_scratch(static_cast<size_t>(count + 1) * sizeof(T), slot));
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// --- rows of float32 as rows of T ---------------------------------------------------------------

template <class T>
GemmInput convert(const float* x, int64_t m, int64_t k, int64_t ldx, void* out,
                  Parallel& parallel) {
  const int64_t ld = round_up(k, kWord<T>);
  T* const rows = static_cast<T*>(out);
  GemmRowScale* const scales =
      sizeof(T) == 1 ? reinterpret_cast<GemmRowScale*>(rows + m * ld) : nullptr;
  int64_t at_once = kTaskConverted / (k > 0 ? k : 1);
  at_once = at_once > 0 ? at_once : 1;
  parallel.for_each((m + at_once - 1) / at_once, [&](int64_t task) {
    const int64_t begin = task * at_once;
    const int64_t end = begin + at_once < m ? begin + at_once : m;
    for (int64_t row = begin; row < end; ++row) {
      convert_row(x + row * ldx, k, rows + row * ld, scales == nullptr ? nullptr : scales + row);
    }
  });
  return {rows, kType<T>, ld, 1, scales};
}

// --- the product --------------------------------------------------------------------------------

// A part of the inputs with packed weights.
template <class T>
struct Slab {
  const T* weights;
  int64_t begin;  // in inputs
  int64_t words;
  bool first;
  bool last;
};

template <class T, class Y>
class Product {
 public:
  Product(const GemmArguments& a, Parallel& parallel) : a_(a), parallel_(parallel) {
    const int64_t k = a.weight.k;
    panels_ = (a.weight.n + kColumns - 1) / kColumns;
    x_ = static_cast<const T*>(a.x.data);
    x_ld_ = a.x.row_stride;
    turned_ = a.x.k_stride != 1;
    row_scales_ = a.x.row_scales;
    // Rows of another type, or with a part of a word at their end, are copied once for all tasks.
    if (!turned_ && a.x.type != a.weight.type) {
      if constexpr (!std::is_same_v<T, float>) {
        void* const copy =
            scratch<char>(static_cast<int64_t>(gemm_converted_bytes(a.m, k, kType<T>)), kInputSlot);
        const GemmInput converted =
            convert<T>(static_cast<const float*>(a.x.data), a.m, k, a.x.row_stride, copy, parallel);
        x_ = static_cast<const T*>(converted.data);
        x_ld_ = converted.row_stride;
        row_scales_ = converted.row_scales;
      }
    } else if (!turned_ && k % kWord<T> != 0 && a.x.row_scales == nullptr) {
      x_ld_ = round_up(k, kWord<T>);
      T* const copy = scratch<T>(a.m * x_ld_, kInputSlot);
      parallel.for_each((a.m + 63) / 64, [&](int64_t task) {
        const int64_t end = task * 64 + 64 < a.m ? task * 64 + 64 : a.m;
        for (int64_t row = task * 64; row < end; ++row) copy_row(row, copy + row * x_ld_);
      });
      x_ = copy;
    }
    few_rows_ = a.m <= 3 && !turned_;

    if (a.m <= kBlockRows / 4) {  // one block of rows: cut the columns
      // Fetching ahead as below would fetch what another thread takes next: BERT base on 16 tokens,
      // 2 threads, 14.1 instead of 12.1 milliseconds, in bfloat16 6.8 instead of 5.9.
      block_rows_ = round_up(a.m, kRows);
      group_ = kTaskWork / (a.m * (k > 0 ? k : 1) * kColumns);
      group_ = group_ < 2 ? 2 : group_ < kGroupPanels ? group_ : kGroupPanels;
    } else if (a.m <= kFewRows && !turned_ && a.weight.data != nullptr) {
      // Each panel is read by one thread, once; its rows come from the caches.
      streams_ = true;
      group_ = 1;
      const int64_t blocks = (kTasks + panels_ - 1) / panels_;
      const int64_t most = (a.m + kBlockRows / 4 - 1) / (kBlockRows / 4);
      const int64_t fewer = blocks < most ? blocks : most;
      block_rows_ = round_up((a.m + fewer - 1) / fewer, kRows);
    } else {
      group_ = kGroupPanels;
      // Turned rows are used a part at a time, which must be enough tasks still.
      const int64_t most_rows = turned_ ? kBlockRows / 2 : kBlockRows;
      int64_t blocks = (a.m + most_rows - 1) / most_rows;
      const int64_t least = (kTasks + groups() - 1) / groups();
      if (blocks < least) {
        const int64_t most = (a.m + kBlockRows / 4 - 1) / (kBlockRows / 4);
        blocks = least < most ? least : most;
      }
      block_rows_ = round_up((a.m + blocks - 1) / blocks, kRows);
    }
    row_blocks_ = (a.m + block_rows_ - 1) / block_rows_;
  }

  void run(const Slab<T>& slab) {
    int64_t blocks = row_blocks_;
    if (turned_) {
      const int64_t bytes = row_blocks_ * block_rows_ * slab.words * 4;
      const int64_t parts = bytes > kTurnedBytes ? (bytes + kTurnedBytes - 1) / kTurnedBytes : 1;
      blocks = (row_blocks_ + parts - 1) / parts;
    }
    for (int64_t begin = 0; begin < row_blocks_; begin += blocks) {
      const int64_t count = row_blocks_ - begin < blocks ? row_blocks_ - begin : blocks;
      const T* turned = nullptr;
      if constexpr (kTurns<T>) turned = turned_ ? turn_rows(slab, begin, count) : nullptr;
      parallel_.for_each(count * groups(), [&](int64_t task) {
        const int64_t several = task / (kTogether * groups()) * kTogether;
        const int64_t rows = count - several < kTogether ? count - several : kTogether;
        const int64_t within = task - several * groups();
        const int64_t first_panel = within / rows * group_;
        const int64_t end = first_panel + group_ < panels_ ? first_panel + group_ : panels_;
        const int64_t row_block = several + within % rows;
        block(slab, (begin + row_block) * block_rows_,
              turned_ ? turned + row_block * block_rows_ * slab.words * kWord<T> : nullptr,
              first_panel, end);
      });
    }
  }

 private:
  int64_t groups() const { return (panels_ + group_ - 1) / group_; }

  void copy_row(int64_t row, T* to) const {
    const int64_t k = a_.weight.k;
    std::memcpy(to, static_cast<const T*>(a_.x.data) + row * a_.x.row_stride,
                static_cast<size_t>(k) * sizeof(T));
    for (int64_t i = k; i < x_ld_; ++i) to[i] = T{};
  }

  // x of some blocks of rows as [block][word][row].
  const T* turn_rows(const Slab<T>& slab, int64_t first_block, int64_t blocks) {
    const int64_t ld = block_rows_ * kWord<T>;
    T* const turned = scratch<T>(blocks * slab.words * ld, kTurnedSlot);
    parallel_.for_each((slab.words + kStrip - 1) / kStrip, [&](int64_t strip) {
      const int64_t word = strip * kStrip;
      const int64_t input = slab.begin + word * kWord<T>;
      const int64_t left = a_.weight.k - input;
      const int64_t inputs = left < kStrip * kWord<T> ? left : kStrip * kWord<T>;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = (first_block + block) * block_rows_;
        const int64_t rows = a_.m - row < block_rows_ ? a_.m - row : block_rows_;
        const int64_t at = row * a_.x.row_stride + input * a_.x.k_stride;
        T* const out = turned + (block * slab.words + word) * ld;
        if (a_.x.type != a_.weight.type) {
          pack_any(static_cast<const float*>(a_.x.data) + at, rows, inputs, a_.x.row_stride,
                   a_.x.k_stride, out, ld);
        } else if (a_.x.row_stride == 1) {
          const T* const from = static_cast<const T*>(a_.x.data) + at;
          if (block + 1 < blocks) {
            fetch<0>(from + block_rows_, inputs, a_.x.k_stride, block_rows_);
            fetch<1>(out + slab.words * ld, (inputs + kWord<T> - 1) / kWord<T>, ld, ld);
          }
          pack_rows(from, rows, inputs, a_.x.k_stride, out, ld);
        } else {
          pack_any(static_cast<const T*>(a_.x.data) + at, rows, inputs, a_.x.row_stride,
                   a_.x.k_stride, out, ld);
        }
      }
    });
    return turned;
  }

  // The slice of `words` from `begin` on, within the slab.
  Target<Y> target(const Slab<T>& slab, int64_t begin, int64_t row, int64_t column, float* sums,
                   int64_t sums_ld) const {
    Y* const y = static_cast<Y*>(a_.y) + row * a_.ldy + column;
    const bool first = slab.first && begin == 0;
    const bool last = slab.last && begin + kSlice<T> >= slab.words;
    Target<Y> t{nullptr, sums_ld, y, a_.ldy, nullptr, false, nullptr, nullptr};
    if constexpr (std::is_same_v<T, int8_t>) {
      t.row_scales = row_scales_ + row;
      t.column_scales = a_.weight.scales + column;
    }
    if (first) {
      if (a_.bias != nullptr) t.bias = a_.bias + column;
      if constexpr (sizeof(Y) == sizeof(float)) {
        if (a_.epilogue.accumulate) t.from = y, t.from_ld = a_.ldy;
      }
    } else {
      t.from = sums;
    }
    t.relu = last && a_.epilogue.activation == GemmActivation::relu;
    return t;
  }

  void block(const Slab<T>& slab, int64_t first_row, const T* turned, int64_t first_panel,
             int64_t end_panel) {
    const int64_t m = a_.m, n = a_.weight.n;
    const int64_t rows = m - first_row < block_rows_ ? m - first_row : block_rows_;
    const int64_t panel_size = slab.words * kColumns * kWord<T>;
    // Sums between slices: in y itself where it can hold them.
    constexpr bool kSumsInY = sizeof(Y) == sizeof(float);
    const int64_t sums_ld = kSumsInY ? a_.ldy : (end_panel - first_panel) * kColumns;
    float* sums;
    if constexpr (kSumsInY) {
      sums = static_cast<float*>(a_.y) + first_row * a_.ldy + first_panel * kColumns;
    } else {
      sums = slab.words > kSlice<T> ? scratch<float>(block_rows_ * sums_ld, kSumsSlot) : nullptr;
    }

    int64_t begin = 0;
    do {
      const int64_t words = slab.words - begin < kSlice<T> ? slab.words - begin : kSlice<T>;
      const int64_t input = slab.begin + begin * kWord<T>;
      const bool last = slab.last && begin + words == slab.words;
      // With so few rows every weight is used by one tile: two panels at a time, because the
      // accumulators of one are too few to hide the latency of the multiply-adds.
      const int64_t together = few_rows_ ? 2 : 1;
      for (int64_t panel = first_panel; panel < end_panel; panel += together) {
        const T* const w = slab.weights + panel * panel_size + begin * kColumns * kWord<T>;
        const int64_t column = panel * kColumns;
        const bool pair = few_rows_ && panel + 1 < end_panel;
        const char* ahead = reinterpret_cast<const char*>(w + words * kColumns * kWord<T>);
        const int64_t ahead_of_tile = round_up(words * kColumns * 4 * kTileRows<T> / rows, 64);
        for (int64_t r = 0; r < rows; r += kTileRows<T>) {
          // What comes next (behind the last panel too: a prefetch may go anywhere).
          if (streams_) {
            for (int64_t i = 0; i < ahead_of_tile; i += 64) __builtin_prefetch(ahead + i, 0, 2);
            ahead += ahead_of_tile;
          }
          const int count = static_cast<int>(rows - r < kTileRows<T> ? rows - r : kTileRows<T>);
          const int64_t row = first_row + r;
          float* const sum =
              sums == nullptr ? nullptr : sums + r * sums_ld + column - first_panel * kColumns;
          const Target<Y> to = target(slab, begin, row, column, sum, sums_ld);
          const auto run = [&](auto at_once, const auto& final) {
            constexpr int P = decltype(at_once)::value;
            if constexpr (kTurns<T>) {
              if (turned_) {
                return tile_of<P>(count, WordMajor{block_rows_ * kWord<T>},
                                  turned + (begin * block_rows_ + r) * kWord<T>, w, panel_size,
                                  words, final, n - column);
              }
            }
            tile_of<P>(count, RowMajor{x_ld_}, x_ + row * x_ld_ + input, w, panel_size, words,
                       final, n - column);
          };
          const auto run_to = [&](const auto& final) {
            if (pair) {
              run(Count<2>{}, final);
            } else {
              run(Count<1>{}, final);
            }
          };
          if constexpr (kSumsInY) {
            run_to(to);
          } else {
            if (last) {
              run_to(to);
            } else {
              run_to(Target<float>{to.from, sums_ld, sum, sums_ld, to.bias, false, to.row_scales,
                                   to.column_scales});
            }
          }
        }
      }
      begin += words;
    } while (begin < slab.words);
  }

  const GemmArguments& a_;
  Parallel& parallel_;
  const T* x_;
  const GemmRowScale* row_scales_;
  int64_t x_ld_;
  bool turned_;
  bool few_rows_;
  bool streams_ = false;
  int64_t panels_, block_rows_, row_blocks_, group_;
};

// Weights that are used once, packed a slab of inputs at a time.
template <class T, class Y>
void multiply_in_slabs(Product<T, Y>& product, const GemmArguments& a, Parallel& parallel) {
  const int64_t n = a.weight.n, k = a.weight.k;
  const int64_t words = (k + kWord<T> - 1) / kWord<T>;
  const int64_t panels = (n + kColumns - 1) / kColumns;
  int64_t most = kSlabBytes / (panels * kColumns * 4) / kSlice<T> * kSlice<T>;
  most = most > kSlice<T> ? most : kSlice<T>;
  const int64_t slabs = words > most ? (words + most - 1) / most : 1;
  const int64_t slab_words = round_up((words + slabs - 1) / slabs, kSlice<T>);
  T* const packed = scratch<T>(
      panels * kColumns * (slab_words < words ? slab_words : words) * kWord<T>, kSlabSlot);
  int64_t begin = 0;
  do {
    const int64_t depth = words - begin < slab_words ? words - begin : slab_words;
    const int64_t input = begin * kWord<T>;
    const int64_t inputs = k - input < depth * kWord<T> ? k - input : depth * kWord<T>;
    parallel.for_each((depth + kStrip - 1) / kStrip, [&](int64_t strip) {
      const int64_t word = strip * kStrip;
      const int64_t left = inputs - word * kWord<T>;
      const int64_t count = left < kStrip * kWord<T> ? left : kStrip * kWord<T>;
      const T* const from = static_cast<const T*>(a.rows) + (input + word * kWord<T>)*a.rows_stride;
      constexpr int64_t kLd = kColumns * kWord<T>;
      for (int64_t panel = 0; panel < panels; ++panel) {
        T* const out = packed + (panel * depth + word) * kLd;
        if (panel + 1 < panels) {
          fetch<0>(from + (panel + 1) * kColumns, count, a.rows_stride, kColumns);
          fetch<1>(out + depth * kLd, (count + kWord<T> - 1) / kWord<T>, kLd, kLd);
        }
        pack_panel(from + panel * kColumns, n - panel * kColumns, count, 1, a.rows_stride, out);
      }
    });
    product.run({packed, input, depth, begin == 0, begin + depth >= words});
    begin += depth;
  } while (begin < words);
}

template <class T, class Y>
void gemm_to(const GemmArguments& a, Parallel& parallel) {
  Product<T, Y> product(a, parallel);
  if (a.weight.data != nullptr) {
    product.run({static_cast<const T*>(a.weight.data), 0, (a.weight.k + kWord<T> - 1) / kWord<T>,
                 true, true});
  } else if constexpr (kTurns<T>) {
    multiply_in_slabs(product, a, parallel);
  }
}

template <class T>
void gemm(const GemmArguments& a, Parallel& parallel) {
  if (a.m <= 0 || a.weight.n <= 0) return;
  if constexpr (sizeof(T) == sizeof(bfloat16)) {
    if (a.y_type == GemmType::bfloat16) return gemm_to<T, bfloat16>(a, parallel);
  }
  gemm_to<T, float>(a, parallel);
}

}  // namespace
}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
