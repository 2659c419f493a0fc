// One tile of the matrix product of gemm.h. Include it only from *_cpu.cpp.
//
// Factors are taken word by word of 32 bits along k (factors.h), so that all types share the tile:
// kRows rows by one panel (kVectors vectors of columns) of accumulators in registers; one load of
// the panel's vectors and one broadcast a row give kRows * kVectors multiply-adds. The weights are
// cut along k into slices that fit in the first-level cache and are used by all tiles of a row
// block; between slices the accumulators rest in memory as float32, which loses nothing.
#pragma once

#include "gemm/factors.h"

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
template <class T>
constexpr int kTileRows = kRows;
#if !TRANSFORMER_EXT_DOTS
template <>
constexpr int kTileRows<int8_t> = 4;  // weights and broadcasts take two registers each
#endif
constexpr int kColumns = kVectors * kWidth;

// Words a slice. float32 (AVX-512: 32 KiB of weights): 256 measured 2 % faster, with 1.4 times the
// error. bfloat16 has no such error to fear, and its slices are read from the second-level cache
// fast enough.
template <class T>
constexpr int64_t kSlice = 128;
template <>
constexpr int64_t kSlice<bfloat16> = 256;
// Integers: all at once, because a part of a sum would not fit into float32.
template <>
constexpr int64_t kSlice<int8_t> = int64_t{1} << 30;

template <class T>
constexpr GemmType kType = sizeof(T) == 4   ? GemmType::float32
                           : sizeof(T) == 2 ? GemmType::bfloat16
                                            : GemmType::int8;
inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Where the words of a tile of x lie: rows as the caller has them, or packed [word][row] with `ld`
// elements from word to word.
struct RowMajor {
  int64_t ld;
  template <class T>
  const T* at(const T* x, int64_t row, int64_t word) const {
    return x + row * ld + word * kWord<T>;
  }
};
struct WordMajor {
  int64_t ld;
  template <class T>
  const T* at(const T* x, int64_t row, int64_t word) const {
    return x + word * ld + row * kWord<T>;
  }
};

// What becomes of the sums of a tile: y = activation(sums + from + bias).
template <class Y>
struct Target {
  const float* from;  // null: 0
  int64_t from_ld;
  Y* y;
  int64_t ldy;
  const float* bias;  // null: 0
  bool relu;
  const GemmRowScale* row_scales;  // of integers
  const float* column_scales;
};

// One tile of R rows by P panels, `panel_stride` elements apart, over `words`.
template <class T, class Y, int R, int P, class Layout>
inline void tile(Layout layout, const T* x, const T* w, int64_t panel_stride, int64_t words,
                 const Target<Y>& target, int64_t columns) {
  typename Sum<T>::Vec acc[R][P * kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
    for (int v = 0; v < P * kVectors; ++v) acc[r][v] = Sum<T>::start(target.row_scales, r);
  }
#pragma GCC unroll 2
  for (int64_t i = 0; i < words; ++i) {
    decltype(load_words(w)) weights[P * kVectors];
#pragma GCC unroll 32
    for (int v = 0; v < P * kVectors; ++v) {
      weights[v] =
          load_words(w + (v / kVectors) * panel_stride + (v % kVectors) * kWidth * kWord<T>);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto value = broadcast_word(layout.at(x, r, i));
#pragma GCC unroll 32
      for (int v = 0; v < P * kVectors; ++v) {
        acc[r][v] = multiply_add(value, weights[v], acc[r][v], T{});
      }
    }
    w += kColumns * kWord<T>;
  }
  const bool full = columns >= P * kColumns;
#pragma GCC unroll 32
  for (int v = 0; v < P * kVectors; ++v) {
    const int64_t left = full ? kWidth : columns - v * kWidth;
    const int64_t lanes = left < 0 ? 0 : left < kWidth ? left : kWidth;
    const int64_t c = v * kWidth;
    VecF start = zero();
    if (target.bias != nullptr) {
      start = full ? load(target.bias + c) : load_partial(target.bias + c, lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      VecF out = Sum<T>::scaled(acc[r][v], target.row_scales, r, target.column_scales, c) + start;
      if (target.from != nullptr) {
        const float* const p = target.from + r * target.from_ld + c;
        out += full ? load(p) : load_partial(p, lanes);
      }
      // Written so that a NaN stays one.
      if (target.relu) out = select(out < 0.0f, zero(), out);
      Y* const p = target.y + r * target.ldy + c;
      if (full) {
        store(p, out);
      } else {
        store_partial(p, out, lanes);
      }
    }
  }
}

template <int P, class T, class Y, class Layout>
inline void tile_of(int rows, Layout layout, const T* x, const T* w, int64_t panel_stride,
                    int64_t words, const Target<Y>& target, int64_t columns) {
  static_assert(kRows == 6);
  switch (rows) {
    case 1:
      return tile<T, Y, 1, P>(layout, x, w, panel_stride, words, target, columns);
    case 2:
      return tile<T, Y, 2, P>(layout, x, w, panel_stride, words, target, columns);
    case 3:
      return tile<T, Y, 3, P>(layout, x, w, panel_stride, words, target, columns);
    default:
      break;
  }
  if constexpr (P == 1) {
    switch (rows) {
      case 4:
        return tile<T, Y, 4, P>(layout, x, w, panel_stride, words, target, columns);
      case 5:
        return tile<T, Y, 5, P>(layout, x, w, panel_stride, words, target, columns);
      default:
        return tile<T, Y, 6, P>(layout, x, w, panel_stride, words, target, columns);
    }
  }
}

}  // namespace
}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
