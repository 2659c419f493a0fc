// The types of a matrix product's factors: how a word of each is multiplied, and how rows of
// float32 become one. Include it only from
// *_cpu.cpp.
//
// Factors are taken word by word of 32 bits along k: one float32; two bfloat16 that the dot-product
// instruction multiplies and adds to a float32 at once; or four 8-bit integers, added up in int32,
// which is exact, so that every way to do it gives the same result.
//
// Integers: a row of float32 is q * scale with q = round(x / scale), scale = max |x| / 127. Packed
// weights hold q + 128, which VNNI wants without a sign; what that adds to a sum, 128 times the sum
// of the other factor's row, is taken off at its start (GemmRowScale::offset).
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/simd.h"
#include "gemm/gemm.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Whether one instruction multiplies four integers and adds them up; what multiplies, for people.
#if defined(__AVX512VNNI__)
#define TRANSFORMER_EXT_DOTS 1
[[maybe_unused]] constexpr char kInstruction[] = "vpdpbusd (AVX512_VNNI)";
#elif defined(__AVXVNNI__)
#define TRANSFORMER_EXT_DOTS 1
[[maybe_unused]] constexpr char kInstruction[] = "vpdpbusd (AVX-VNNI)";
#else
#define TRANSFORMER_EXT_DOTS 0
#if defined(__AVX512F__)
[[maybe_unused]] constexpr char kInstruction[] = "vpmaddwd (AVX-512 without VNNI)";
#elif defined(__AVX2__)
[[maybe_unused]] constexpr char kInstruction[] = "vpmaddwd (AVX2 without VNNI)";
#elif defined(__x86_64__)
[[maybe_unused]] constexpr char kInstruction[] = "pmaddwd (SSE2)";
#else
[[maybe_unused]] constexpr char kInstruction[] = "multiplications of 32 bits";
#endif
#endif

// Elements of T in a word.
template <class T>
constexpr int kWord = 4 / static_cast<int>(sizeof(T));

constexpr int32_t kWeightZero = 128;
constexpr float kLargestInteger = 127.0f;

// --- vectors of words of weights ----------------------------------------------------------------

inline VecF load_words(const float* p) { return load(p); }
inline VecF broadcast_word(const float* p) { return broadcast(*p); }

inline VecF multiply_add(VecF a, VecF b, VecF c, float) {
#if defined(__AVX512F__)
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512BF16__)
inline __m512bh pairs(VecF v) {
  __m512bh h;
  std::memcpy(&h, &v, sizeof h);
  return h;
}

inline VecF load_words(const bfloat16* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline VecF broadcast_word(const bfloat16* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return (VecF)_mm512_set1_epi32(word);
}

inline VecF multiply_add(VecF a, VecF b, VecF c, bfloat16) {
  return (VecF)_mm512_dpbf16_ps((__m512)c, pairs(a), pairs(b));
}
#endif

inline VecI load_integers(const int8_t* p) {
  VecI v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline VecI broadcast_integers(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word - VecI{};
}

#if TRANSFORMER_EXT_DOTS
inline VecI load_words(const int8_t* p) { return load_integers(p); }
inline VecI broadcast_word(const int8_t* p) { return broadcast_integers(p); }
inline VecI multiply_add(VecI x, VecI weights, VecI sum, int8_t) {
#if defined(__AVX512VNNI__)
  return (VecI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
#else
  return (VecI)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)x);
#endif
}
#elif defined(__x86_64__)
// Without the dot product: the four integers as two pairs of 16 bits, which are multiplied and
// added to 32 bits at once. (_mm256_maddubs_epi16 would take them as they are, but its sums of two
// saturate at 16 bits.)
struct TwoPairs {
  VecI even, odd;
};
typedef int16_t Vec16 __attribute__((vector_size(sizeof(VecI))));

inline TwoPairs load_words(const int8_t* p) {
  const VecU v = (VecU)load_integers(p);
  return {(VecI)(v & 0x00ff00ffu), (VecI)((v >> 8) & 0x00ff00ffu)};
}
inline TwoPairs broadcast_word(const int8_t* p) {
  const Vec16 v = (Vec16)broadcast_integers(p);
  return {(VecI)((v << 8) >> 8), (VecI)(v >> 8)};
}
inline VecI multiply_add_pairs(VecI a, VecI b) {
#if defined(__AVX512F__)
  return (VecI)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VecI)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return (VecI)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}
inline VecI multiply_add(const TwoPairs& x, const TwoPairs& weights, VecI sum, int8_t) {
  return sum + multiply_add_pairs(x.even, weights.even) + multiply_add_pairs(x.odd, weights.odd);
}
#else
// Plain: the four integers of a word by themselves.
inline VecI load_words(const int8_t* p) { return load_integers(p); }
inline VecI broadcast_word(const int8_t* p) { return broadcast_integers(p); }
inline VecI multiply_add(VecI x, VecI weights, VecI sum, int8_t) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    sum += ((x << (24 - 8 * i)) >> 24) * (VecI)(((VecU)weights >> (8 * i)) & 0xffu);
  }
  return sum;
}
#endif

// What the words of a tile are added up in, and where that starts.
template <class T>
struct Sum {
  using Vec = VecF;
  static VecF start(const GemmRowScale*, int) { return zero(); }
  static VecF scaled(VecF sum, const GemmRowScale*, int, const float*, int64_t) { return sum; }
};
template <>
struct Sum<int8_t> {
  using Vec = VecI;
  static VecI start(const GemmRowScale* rows, int row) { return rows[row].offset - VecI{}; }
  static VecF scaled(VecI sum, const GemmRowScale* rows, int row, const float* columns,
                     int64_t column) {
    return __builtin_convertvector(sum, VecF) * (load(columns + column) * rows[row].scale);
  }
};

// --- rows of float32 as another type ------------------------------------------------------------

inline void put(float* to, float x) { *to = x; }
inline void put(bfloat16* to, float x) { *to = to_bfloat16(x); }
inline void put(bfloat16* to, bfloat16 x) { *to = x; }

// To the end of the last word, with zeros.
[[maybe_unused]] inline void convert_row(const float* x, int64_t k, bfloat16* out, GemmRowScale*) {
  int64_t i = 0;
  for (; i + kWidth <= k; i += kWidth) store(out + i, load(x + i));
  for (; i < k; ++i) put(out + i, x[i]);
  for (; i % kWord<bfloat16> != 0; ++i) out[i] = bfloat16{};
}

inline void convert_row(const float* x, int64_t k, float* out, GemmRowScale*) {
  std::memcpy(out, x, static_cast<size_t>(k) * sizeof(float));
}

inline VecI nearest(VecF v) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (VecI)_mm256_cvtps_epi32((__m256)v);
#elif defined(__x86_64__)
  return (VecI)_mm_cvtps_epi32((__m128)v);
#elif defined(__aarch64__)
  return (VecI)vcvtnq_s32_f32((float32x4_t)v);
#else
  // |v| is at most 127, so adding 1.5 * 2^23 rounds; but not as one operation with the product that
  // v is, which would round once instead of twice and give other integers than elsewhere.
  asm volatile("" : "+m"(v));
  const VecF magic = broadcast(12582912.0f);
  return __builtin_convertvector((v + magic) - magic, VecI);
#endif
}

inline void store_integers(int8_t* p, VecI v) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)v);
#else
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  const Bytes bytes = __builtin_convertvector(v, Bytes);
#endif
  std::memcpy(p, &bytes, sizeof bytes);
}

inline uint32_t largest_lane(VecU v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32((__m512i)v);
#else
  uint32_t largest = v[0];
  for (int lane = 1; lane < kWidth; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
#endif
}

inline int32_t sum_of_lanes(VecI v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t sum = 0;
  for (int lane = 0; lane < kWidth; ++lane) sum += v[lane];
  return sum;
#endif
}

// Any part of a row that is not a finite number makes all results of the row NaN.
inline void convert_row(const float* x, int64_t k, int8_t* out, GemmRowScale* scale) {
  // Compared as integers, NaN is above infinity and both above all numbers.
  const VecU magnitude = 0x7fffffffu - VecU{};
  VecU most = {};
  int64_t i = 0;
  for (; i + kWidth <= k; i += kWidth) {
    const VecU v = (VecU)load(x + i) & magnitude;
    most = v > most ? v : most;
  }
  if (i < k) {
    const VecU v = (VecU)load_partial(x + i, k - i) & magnitude;
    most = v > most ? v : most;
  }
  const uint32_t bits = largest_lane(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const bool finite = bits < 0x7f800000u;
  // Below this the inverse would not be finite: such a row counts as 0.
  const bool some = finite && largest > 1e-35f;
  const VecF inverse = broadcast(some ? kLargestInteger / largest : 0.0f);
  VecI total = {};
  for (i = 0; i < k; i += kWidth) {
    const int64_t left = k - i < kWidth ? k - i : kWidth;
    const VecF v = left == kWidth ? load(x + i) : load_partial(x + i, left);
    const VecI q = some ? nearest(v * inverse) : VecI{};
    total += q;
    if (left == kWidth) {
      store_integers(out + i, q);
    } else {
      int8_t last[kWidth];
      store_integers(last, q);
      std::memcpy(out + i, last, static_cast<size_t>(left));
    }
  }
  for (i = k; i % kWord<int8_t> != 0; ++i) out[i] = 0;
  const int32_t sum = sum_of_lanes(total);
  *scale = {some     ? largest / kLargestInteger
            : finite ? 0.0f
                     : __builtin_nanf(""),
            -kWeightZero * sum};
}

}  // namespace
}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
