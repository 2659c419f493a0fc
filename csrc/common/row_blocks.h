// How row-wise kernels cut their work, and how they add up the columns over all rows.
//
// For *_cpu.cpp files. The cut depends on the sizes alone, so results do not depend on threads.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Below this many elements a task is not worth handing to another thread (about 5 us).
constexpr int64_t kElementsPerTask = 32768;

struct RowBlocks {
  int64_t rows;
  int64_t rows_per_block;
  int64_t count;
  int64_t begin(int64_t block) const { return block * rows_per_block; }
  int64_t end(int64_t block) const {
    const int64_t last = (block + 1) * rows_per_block;
    return last < rows ? last : rows;
  }
};

// At most max_blocks blocks (0: any number), each a multiple of `multiple` rows but for the last.
[[maybe_unused]] inline RowBlocks row_blocks(int64_t rows, int64_t columns, int64_t max_blocks = 0,
                                             int64_t multiple = 1) {
  int64_t per_block = kElementsPerTask / (columns > 0 ? columns : 1);
  if (max_blocks > 0) {
    const int64_t least = (rows + max_blocks - 1) / max_blocks;
    per_block = per_block > least ? per_block : least;
  }
  per_block = per_block > 1 ? (per_block + multiple - 1) / multiple * multiple : multiple;
  return {rows, per_block, (rows + per_block - 1) / per_block};
}

// out[c] = sum over blocks, in ascending order, of partials[block * columns + c].
[[maybe_unused]] inline void add_blocks(const float* partials, int64_t blocks, int64_t columns,
                                        float* out, Parallel& parallel) {
  constexpr int64_t kChunk = 512;
  parallel.for_each((columns + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t end = (chunk + 1) * kChunk < columns ? (chunk + 1) * kChunk : columns;
    for (int64_t c = chunk * kChunk; c < end; c += kWidth) {
      const int64_t n = end - c < kWidth ? end - c : kWidth;
      VecF total = zero();
      for (int64_t block = 0; block < blocks; ++block) {
        const float* p = partials + block * columns + c;
        total = total + (n == kWidth ? load(p) : load_partial(p, n));
      }
      if (n == kWidth) {
        store(out + c, total);
      } else {
        store_partial(out + c, total, n);
      }
    }
  });
}

}  // namespace
}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
