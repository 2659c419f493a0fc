// Vectors of float32 for the CPU kernels: one source for every instruction set.
//
// Built on the vector extensions of GCC and Clang, so that `a * b + c` reads as it should and
// compiles to FMA where the target has it; intrinsics stand only where the compilers do badly.
// Include it only from a `*_cpu.cpp` file (compiled once per instruction set): everything is in an
// anonymous namespace, so that no weak symbol compiled for AVX-512 can be picked by the linker for
// a machine without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/bfloat16.h"

#ifndef TRANSFORMER_EXT_ISA
#error "simd.h belongs in *_cpu.cpp files, which are compiled once per instruction set"
#endif

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float VecF __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecI __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecU __attribute__((vector_size(kWidth * 4)));
typedef uint16_t VecH __attribute__((vector_size(kWidth * 2)));

// x - 0 and not x + 0: only the first is x for every x (-0 + 0 is +0), so only it costs nothing.
[[maybe_unused]] inline VecF broadcast(float x) { return x - VecF{}; }
[[maybe_unused]] inline VecF zero() { return VecF{}; }

[[maybe_unused]] inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// GCC 12 would widen 16 bits to 32 by halves: five instructions instead of one.
[[maybe_unused]] inline VecF from_bfloat16(VecH h) {
#if defined(__AVX512F__)
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return (VecF)(__builtin_convertvector(h, VecU) << 16);
#endif
}

[[maybe_unused]] inline VecF load(const bfloat16* p) {
  VecH h;
  std::memcpy(&h, p, sizeof h);
  return from_bfloat16(h);
}

[[maybe_unused]] inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }

[[maybe_unused]] inline VecH round_to_bfloat16(VecF v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  VecH out;
  std::memcpy(&out, &h, sizeof out);
  return out;
#else
  const VecU u = (VecU)v;
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU quiet = (u >> 16) | 0x40u;
  const VecU is_nan = (VecU)((u & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), VecH);
#endif
}

[[maybe_unused]] inline void store(bfloat16* p, VecF v) {
  const VecH h = round_to_bfloat16(v);
  std::memcpy(p, &h, sizeof h);
}

// The first n elements, 0 <= n <= kWidth; the others read as 0 and are not written.
[[maybe_unused]] inline VecF load_partial(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
#else
  VecF v{};
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
#endif
}

[[maybe_unused]] inline VecF load_partial(const bfloat16* p, int64_t n) {
#if defined(__AVX512F__)
  return from_bfloat16((VecH)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p));
#else
  VecH h{};
  std::memcpy(&h, p, static_cast<size_t>(n) * sizeof(bfloat16));
  return from_bfloat16(h);
#endif
}

[[maybe_unused]] inline void store_partial(float* p, VecF v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
#else
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
#endif
}

[[maybe_unused]] inline void store_partial(bfloat16* p, VecF v, int64_t n) {
  const VecH h = round_to_bfloat16(v);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), (__m256i)h);
#else
  std::memcpy(p, &h, static_cast<size_t>(n) * sizeof(bfloat16));
#endif
}

// v in the first n lanes, 0 in the others.
[[maybe_unused]] inline VecF first_lanes(VecF v, int64_t n) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
#else
  VecI lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return (VecF)((VecI)v & (lane < static_cast<int32_t>(n)));
#endif
}

[[maybe_unused]] inline VecF select(VecI condition, VecF yes, VecF no) {
  return condition ? yes : no;
}
[[maybe_unused]] inline VecF max(VecF a, VecF b) { return a > b ? a : b; }
[[maybe_unused]] inline VecF min(VecF a, VecF b) { return a < b ? a : b; }

// Sum and maximum over the lanes, by halves: the order is fixed for a given width.
[[maybe_unused]] inline float reduce_add(VecF v) {
#if defined(__AVX512F__)
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
#elif defined(__AVX2__)
  __m128 b = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#endif
#if defined(__AVX2__)
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  b = _mm_add_ss(b, _mm_shuffle_ps(b, b, 1));
  return _mm_cvtss_f32(b);
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

[[maybe_unused]] inline float reduce_max(VecF v) {
#if defined(__AVX512F__)
  __m256 a = _mm256_max_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
#elif defined(__AVX2__)
  __m128 b = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#endif
#if defined(__AVX2__)
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  b = _mm_max_ss(b, _mm_shuffle_ps(b, b, 1));
  return _mm_cvtss_f32(b);
#else
  const float x = v[0] > v[2] ? v[0] : v[2];
  const float y = v[1] > v[3] ? v[1] : v[3];
  return x > y ? x : y;
#endif
}

// e^x, relative error below 1e-7 for |x| < 87; 0 below -87.3 (so exp(-inf) is exactly 0),
// inf above 88.7, NaN for NaN. Cody-Waite reduction by ln 2 and a minimax polynomial of degree 6.
[[maybe_unused]] inline VecF exp(VecF x) {
#if defined(__AVX512F__)
  // Keeps infinity from becoming infinity - infinity below; the second operand is the result for
  // NaN.
  const VecI too_low = x < -87.3f;
  x = (VecF)_mm512_min_ps((__m512)broadcast(100.0f), (__m512)x);
#endif
  const VecF n_real = x * 1.44269504088896341f;
#if defined(__AVX512F__)
  const VecF n = (VecF)_mm512_roundscale_ps((__m512)n_real, 8);
#elif defined(__AVX2__)
  const VecF n = (VecF)_mm256_round_ps((__m256)n_real, 8);
#else
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer for |n| < 2^22; beyond it the
  // result is replaced below.
  const VecF magic = broadcast(12582912.0f);
  const VecF n = (n_real + magic) - magic;
#endif
  VecF r = x - n * 0.693145751953125f;
  r = r - n * 1.42860677e-06f;
  // e^r = 1 + r + r^2 p(r), p minimising the greatest relative error (5e-9) over |r| <= ln(2) / 2;
  // not Horner to the end: without FMA its last steps would round twice at the size of 1.
  VecF p = broadcast(0.00138145231f);
  p = p * r + 0.00836874731f;
  p = p * r + 0.0416683927f;
  p = p * r + 0.166665196f;
  p = p * r + 0.49999994f;
  p = (p * (r * r) + r) + 1.0f;
#if defined(__AVX512F__)
  // Scales by 2^n with overflow to infinity, in one instruction for the dozen below.
  return select(too_low, zero(), (VecF)_mm512_scalef_ps((__m512)p, (__m512)n));
#else
  const VecI too_low = x < -87.3f;
  const VecI too_high = x > 88.7f;
  // Out-of-range lanes must not reach the float-to-int conversion with an undefined value.
  const VecI in_range = ~(too_low | too_high) & (x == x);
  const VecI exponent = __builtin_convertvector(select(in_range, n, zero()), VecI);
  // 2^n in two factors: n can be 128, one more than a float exponent holds.
  const VecI half = exponent >> 1;
  const VecF scale1 = (VecF)((half + 127) << 23);
  const VecF scale2 = (VecF)((exponent - half + 127) << 23);
  VecF y = p * scale1 * scale2;
  y = select(too_low, zero(), y);
  y = select(too_high, broadcast(__builtin_inff()), y);
  return select(x == x, y, x);
#endif
}

}  // namespace
}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
