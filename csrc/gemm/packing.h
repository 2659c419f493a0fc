// Floating-point factors in the order in which the tile reads them: out[word * ld + c] = words of
// `from`'s column c, c < columns. Include it only from *_cpu.cpp.
#pragma once

#include "gemm/tile.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Element (c, i) at from[c * c_stride + i * k_stride]; a last half word is filled with 0.
template <class T, class S>
void pack_any(const S* from, int64_t columns, int64_t k, int64_t c_stride, int64_t k_stride, T* out,
              int64_t ld) {
  // 16 inputs at a time: one cache line of each column, and the lines written stay near.
  for (int64_t begin = 0; begin < k; begin += 16) {
    const int64_t end = begin + 16 < k ? begin + 16 : k;
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = begin; i < end; ++i) {
        put(out + i / kWord<T> * ld + c * kWord<T> + i % kWord<T>,
            from[c * c_stride + i * k_stride]);
      }
    }
  }
  if (k % kWord<T> != 0) {
    for (int64_t c = 0; c < columns; ++c) {
      put(out + k / kWord<T> * ld + c * kWord<T> + kWord<T> - 1, 0.0f);
    }
  }
}

template <int kWrite, class T>
inline void fetch(const T* from, int64_t rows, int64_t stride, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i, from += stride) {
    for (int64_t c = 0; c < columns; c += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(from + c, kWrite);
    }
  }
}

// The columns of each input lie side by side.
[[maybe_unused]] void pack_rows(const float* from, int64_t columns, int64_t k, int64_t k_stride,
                                float* out, int64_t ld) {
  for (int64_t i = 0; i < k; ++i, from += k_stride, out += ld) {
    std::memcpy(out, from, static_cast<size_t>(columns) * sizeof(float));
  }
}

#if defined(__AVX512BF16__)
inline __mmask16 first(int64_t lanes) {
  return static_cast<__mmask16>(lanes >= 16 ? 0xffffu : (1u << lanes) - 1u);
}

// 16 columns of two inputs as pairs.
inline __m512i pairs_of(__m512 even, __m512 odd) {
  const __m512bh rows = _mm512_cvtne2ps_pbh(odd, even);
  __m512i halves;
  std::memcpy(&halves, &rows, sizeof halves);
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves);
}

inline __m512i pairs_of(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

inline __m512 load_columns(const float* from) { return _mm512_loadu_ps(from); }
inline __m256i load_columns(const bfloat16* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline __m512 load_columns(const float* from, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, from);
}
inline __m256i load_columns(const bfloat16* from, __mmask16 mask) {
  return _mm256_maskz_loadu_epi16(mask, from);
}

template <class S>
void pack_rows(const S* from, int64_t columns, int64_t k, int64_t k_stride, bfloat16* out,
               int64_t ld) {
  for (int64_t i = 0; i < k; i += 2, from += 2 * k_stride, out += ld) {
    // Past the last input: 0, which masked loads give.
    const bool pair = i + 1 < k;
    const S* const odd = pair ? from + k_stride : from;
    int64_t c = 0;
    if (pair) {
      for (; c + 16 <= columns; c += 16) {
        _mm512_storeu_si512(out + 2 * c, pairs_of(load_columns(from + c), load_columns(odd + c)));
      }
    }
    for (; c < columns; c += 16) {
      const __mmask16 mask = first(columns - c);
      _mm512_mask_storeu_epi32(out + 2 * c, mask,
                               pairs_of(load_columns(from + c, mask),
                                        load_columns(odd + c, pair ? mask : __mmask16{0})));
    }
  }
}
#endif

#if defined(__AVX512F__)
inline __m512 word_vector(const float* from, float) { return _mm512_loadu_ps(from); }
#if defined(__AVX512BF16__)
inline __m512 word_vector(const float* from, bfloat16) {
  const __m512bh h = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
  __m512 words;
  std::memcpy(&words, &h, sizeof words);
  return words;
}
#endif

// 16 words of each of 16 rows, turned.
template <class T>
inline void turn(const float* from, int64_t stride, T* out, int64_t ld) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = word_vector(from + i * stride, T{});
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88);
    const __m512 low2 = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
    const __m512 high = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
    _mm512_storeu_ps(out + j * ld, _mm512_shuffle_f32x4(low, high, 0x88));
    _mm512_storeu_ps(out + (j + 8) * ld, _mm512_shuffle_f32x4(low, high, 0xdd));
    _mm512_storeu_ps(out + (j + 4) * ld, _mm512_shuffle_f32x4(low2, high2, 0x88));
    _mm512_storeu_ps(out + (j + 12) * ld, _mm512_shuffle_f32x4(low2, high2, 0xdd));
  }
}
#endif

// The inputs of each column lie side by side.
template <class T>
void pack_columns(const float* from, int64_t columns, int64_t k, int64_t c_stride, T* out,
                  int64_t ld) {
#if defined(__AVX512F__)
  constexpr int64_t kInputs = 16 * kWord<T>;
  const int64_t whole = k / kInputs * kInputs;
  int64_t c = 0;
  for (; c + 16 <= columns; c += 16) {
    for (int64_t i = 0; i < whole; i += kInputs) {
      turn(from + c * c_stride + i, c_stride, out + i / kWord<T> * ld + c * kWord<T>, ld);
    }
  }
  if (whole < k) {
    pack_any(from + whole, c, k - whole, c_stride, 1, out + whole / kWord<T> * ld, ld);
  }
  pack_any(from + c * c_stride, columns - c, k, c_stride, 1, out + c * kWord<T>, ld);
#else
  pack_any(from, columns, k, c_stride, 1, out, ld);
#endif
}

// One panel; columns at and past `columns` are zero.
template <class T, class S>
void pack_panel(const S* w, int64_t columns, int64_t k, int64_t n_stride, int64_t k_stride,
                T* out) {
  constexpr int64_t kLd = kColumns * kWord<T>;
  if (columns < kColumns) {
    std::memset(out, 0, static_cast<size_t>(round_up(k, kWord<T>) * kColumns) * sizeof(T));
  } else {
    columns = kColumns;
  }
  if (n_stride == 1) return pack_rows(w, columns, k, k_stride, out, kLd);
  if constexpr (sizeof(S) == sizeof(float)) {
    if (k_stride == 1) return pack_columns(w, columns, k, n_stride, out, kLd);
  }
  pack_any(w, columns, k, n_stride, k_stride, out, kLd);
}

template <class T>
void pack(const float* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride, void* out,
          Parallel& parallel) {
  const int64_t panel_size = kColumns * round_up(k, kWord<T>);
  parallel.for_each((n + kColumns - 1) / kColumns, [&](int64_t panel) {
    pack_panel(w + panel * kColumns * n_stride, n - panel * kColumns, k, n_stride, k_stride,
               static_cast<T*>(out) + panel * panel_size);
  });
}

}  // namespace
}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
