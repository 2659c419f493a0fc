// Dropout masks 64 columns at a time, for *_cpu.cpp kernels.
//
//   const uint64_t bits = keep_bits(dropout, row, column / 64);     // column a multiple of 64
//   v = keep(v * dropout.scale, bits, 16);                          // columns 16 .. 16 + kWidth
//
// The counters of 8 columns each sit in the low halves of 64-bit lanes: the widening multiply
// reads only these, so the low half of a product needs no instruction of its own, and what is
// left in the high halves does no harm until the last round.
//
// 64 columns are about 46 vector instructions and 22 cycles (Zen 5, 512 bits). Four groups side by
// side take 17 each in a loop of nothing else, but inside the kernels, whose other work fills the
// gaps, that gained 0 to 5 % and lost 12 % in the gradient of a norm. Shuffles for the shifts: no
// difference.
#pragma once

#include "common/simd.h"
#include "dropout/philox.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

#if defined(__AVX2__)

#if defined(__AVX512F__)
typedef __m512i PhiloxVec;
inline PhiloxVec philox_broadcast(uint32_t x) {
  return _mm512_set1_epi64(static_cast<long long>(x));
}
inline PhiloxVec philox_multiply(uint32_t m, PhiloxVec x) {
  return _mm512_mul_epu32(philox_broadcast(m), x);
}
inline PhiloxVec philox_high(PhiloxVec x) { return _mm512_srli_epi64(x, 32); }
inline PhiloxVec philox_xor(PhiloxVec a, PhiloxVec b) { return _mm512_xor_si512(a, b); }
inline PhiloxVec philox_xor(PhiloxVec a, PhiloxVec b, PhiloxVec c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
#else
typedef __m256i PhiloxVec;
inline PhiloxVec philox_broadcast(uint32_t x) {
  return _mm256_set1_epi64x(static_cast<long long>(x));
}
inline PhiloxVec philox_multiply(uint32_t m, PhiloxVec x) {
  return _mm256_mul_epu32(philox_broadcast(m), x);
}
inline PhiloxVec philox_high(PhiloxVec x) { return _mm256_srli_epi64(x, 32); }
inline PhiloxVec philox_xor(PhiloxVec a, PhiloxVec b) { return _mm256_xor_si256(a, b); }
inline PhiloxVec philox_xor(PhiloxVec a, PhiloxVec b, PhiloxVec c) {
  return philox_xor(philox_xor(a, b), c);
}
#endif

// All rounds for a vector of counters that differ in their first word only. What depends on the
// row alone in the first two rounds is computed once, in scalar registers.
inline void philox_rounds(const Dropout& dropout, uint32_t row, PhiloxVec counter, PhiloxVec& word0,
                          PhiloxVec& word1, PhiloxVec& word2, PhiloxVec& word3) {
  uint32_t key0 = dropout.key0;
  uint32_t key1 = dropout.key1;
  const uint64_t step_product = static_cast<uint64_t>(kPhiloxMultiplier1) * dropout.step;
  const uint32_t first0 = static_cast<uint32_t>(step_product >> 32) ^ row ^ key0;
  const uint32_t first1 = static_cast<uint32_t>(step_product);
  PhiloxVec product0 = philox_multiply(kPhiloxMultiplier0, counter);
  const PhiloxVec first2 = philox_xor(philox_high(product0), philox_broadcast(dropout.site ^ key1));
  key0 += kPhiloxKeyStep0;
  key1 += kPhiloxKeyStep1;

  const uint64_t row_product = static_cast<uint64_t>(kPhiloxMultiplier0) * first0;
  PhiloxVec product1 = philox_multiply(kPhiloxMultiplier1, first2);
  word0 = philox_xor(philox_high(product1), philox_broadcast(first1 ^ key0));
  word1 = product1;
  word2 = philox_xor(product0, philox_broadcast(static_cast<uint32_t>(row_product >> 32) ^ key1));
  word3 = philox_broadcast(static_cast<uint32_t>(row_product));

  for (int i = 2; i < kPhiloxRounds; ++i) {
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
    product0 = philox_multiply(kPhiloxMultiplier0, word0);
    product1 = philox_multiply(kPhiloxMultiplier1, word2);
    word0 = philox_xor(philox_high(product1), word1, philox_broadcast(key0));
    word1 = product1;
    word2 = philox_xor(philox_high(product0), word3, philox_broadcast(key1));
    word3 = product0;
  }
}

#endif

// Bit c = whether column 64 * block + c of the row is kept. dropout.threshold must be above 0.
[[maybe_unused]] inline uint64_t keep_bits(const Dropout& dropout, uint32_t row, uint32_t block) {
#if defined(__AVX512F__)
  PhiloxVec word0, word1, word2, word3;
  // Lane order such that the two unpacks below give counters 0..3 and 4..7 in order.
  const PhiloxVec counter =
      _mm512_add_epi64(philox_broadcast(block * 8u), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  philox_rounds(dropout, row, counter, word0, word1, word2, word3);
  const __m512i pair01 = _mm512_mask_shuffle_epi32(word0, 0xAAAA, word1, _MM_PERM_CCAA);
  const __m512i pair23 = _mm512_mask_shuffle_epi32(word2, 0xAAAA, word3, _MM_PERM_CCAA);
  // value > threshold - 1, not value >= threshold: 65536 does not fit into 16 bits.
  const __m512i below = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold - 1u));
  const uint64_t low = _mm512_cmpgt_epu16_mask(_mm512_unpacklo_epi64(pair01, pair23), below);
  const uint64_t high = _mm512_cmpgt_epu16_mask(_mm512_unpackhi_epi64(pair01, pair23), below);
  return low | (high << 32);
#elif defined(__AVX2__)
  const __m256i below = _mm256_set1_epi16(static_cast<int16_t>(dropout.threshold - 1u));
  uint64_t bits = 0;
  for (uint32_t half = 0; half < 2; ++half) {
    PhiloxVec word0, word1, word2, word3;
    const PhiloxVec counter =
        _mm256_add_epi64(philox_broadcast(block * 8u + half * 4u), _mm256_setr_epi64x(0, 1, 2, 3));
    philox_rounds(dropout, row, counter, word0, word1, word2, word3);
    const __m256i pair01 = _mm256_blend_epi32(word0, _mm256_slli_epi64(word1, 32), 0xAA);
    const __m256i pair23 = _mm256_blend_epi32(word2, _mm256_slli_epi64(word3, 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(pair01, pair23);
    const __m256i odd = _mm256_unpackhi_epi64(pair01, pair23);
    const __m256i drop_even = _mm256_cmpeq_epi16(_mm256_min_epu16(even, below), even);
    const __m256i drop_odd = _mm256_cmpeq_epi16(_mm256_min_epu16(odd, below), odd);
    // The pack works within 128-bit halves, which puts the four counters into order.
    const uint32_t drop =
        static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(drop_even, drop_odd)));
    bits |= static_cast<uint64_t>(~drop) << (32 * half);
  }
  return bits;
#else
  uint64_t bits = 0;
  for (uint32_t i = 0; i < 8; ++i) {
    const PhiloxWords words = dropout_words(dropout, row, block * 8u + i);
    for (int j = 0; j < 8; ++j) {
      const uint64_t kept = dropout_value(words, j) >= dropout.threshold;
      bits |= kept << (8 * i + j);
    }
  }
  return bits;
#endif
}

// v where bits first .. first + kWidth - 1 are set, exact 0 (NaN dropped too) elsewhere.
[[maybe_unused]] inline VecF keep(VecF v, uint64_t bits, int first) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> first), (__m512)v);
#else
#if defined(__AVX2__)
  const VecI lane_bit = {1, 2, 4, 8, 16, 32, 64, 128};
#else
  const VecI lane_bit = {1, 2, 4, 8};
#endif
  const VecI all = VecI{} + static_cast<int32_t>(static_cast<uint32_t>(bits >> first));
  return (VecF)((VecI)v & (VecI)((all & lane_bit) != 0));
#endif
}

// Loads and stores of a whole vector (kWhole) or of its first n elements.
template <bool kWhole, class T>
inline __attribute__((always_inline)) VecF load_n(const T* p, int64_t n) {
  if constexpr (kWhole) {
    return load(p);
  } else {
    return load_partial(p, n);
  }
}

template <bool kWhole, class T>
inline __attribute__((always_inline)) void store_n(T* p, VecF v, int64_t n) {
  if constexpr (kWhole) {
    store(p, v);
  } else {
    store_partial(p, v, n);
  }
}

template <bool kValue>
struct BoolConstant {
  static constexpr bool value = kValue;
};

// Walks the columns in groups of 64: start(column / 64) once a group, then body(whole, column,
// first, n) for each of its vectors: `first` = column % 64, `whole` a BoolConstant, n the number of
// elements (kWidth if whole).
template <class Start, class Body>
inline __attribute__((always_inline)) void for_columns(int64_t columns, Start&& start,
                                                       Body&& body) {
  int64_t group = 0;
  for (; group + 64 <= columns; group += 64) {
    start(static_cast<uint32_t>(group / 64));
#pragma GCC unroll 16
    for (int i = 0; i < 64; i += kWidth) body(BoolConstant<true>{}, group + i, i, kWidth);
  }
  if (group == columns) return;
  start(static_cast<uint32_t>(group / 64));
  int i = 0;
  for (; group + i + kWidth <= columns; i += kWidth) {
    body(BoolConstant<true>{}, group + i, i, kWidth);
  }
  if (group + i < columns) {
    body(BoolConstant<false>{}, group + i, i, static_cast<int>(columns - group - i));
  }
}

}  // namespace
}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
