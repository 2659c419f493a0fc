// The multiply-adds that the machine can do at all.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"

namespace transformer_ext {

// Independent multiply-adds in registers, in the instruction set that the kernels use: float32,
// pairs of bfloat16, fours of bytes. What the machine lacks is done in float32.
class Arithmetic {
 public:
  enum Type { float32, bfloat16, int8 };

  explicit Arithmetic(Type type) : variant_(choose(type)) {}

  // Of one call of run().
  double flop() const {
    return 2.0 * kChains * static_cast<double>(kRounds) * variant_.multiplications;
  }

  void run() const { variant_.run(); }

 private:
  struct Variant {
    void (*run)();
    int multiplications;  // of one step of one chain
  };

  static Variant choose(Type type) {
#if defined(__x86_64__)
    switch (active_isa()) {
      case Isa::avx512_bf16:
        if (type == int8) return {run_vnni, 64};
        if (type == bfloat16) return {run_bf16, 32};
        return {run_avx512, 16};
      case Isa::avx512:
        if (type == int8) return {has_vnni(Isa::avx512) ? run_vnni : run_avx512_bytes, 64};
        return {run_avx512, 16};
      case Isa::avx2:
        if (type == int8) return {has_vnni(Isa::avx2) ? run_avx_vnni : run_avx2_bytes, 32};
        return {run_avx2, 8};
      case Isa::baseline:
        break;
    }
#endif
    return {run_baseline, 4};
  }

  static constexpr int kChains = 12;  // of the 16 registers, and more than hide the latency
  static constexpr int64_t kRounds = 2000;

// The empty assembly keeps the chains apart, alive and in registers.
#define TRANSFORMER_EXT_CHAIN(c)     \
  x##c = TRANSFORMER_EXT_STEP(x##c); \
  asm volatile("" : TRANSFORMER_EXT_REGISTER(x##c))
#define TRANSFORMER_EXT_CHAINS(Vector, start)                     \
  Vector x0 = start, x1 = x0, x2 = x0, x3 = x0, x4 = x0, x5 = x0; \
  Vector x6 = x0, x7 = x0, x8 = x0, x9 = x0, x10 = x0, x11 = x0;  \
  for (int64_t i = 0; i < kRounds; ++i) {                         \
    TRANSFORMER_EXT_CHAIN(0);                                     \
    TRANSFORMER_EXT_CHAIN(1);                                     \
    TRANSFORMER_EXT_CHAIN(2);                                     \
    TRANSFORMER_EXT_CHAIN(3);                                     \
    TRANSFORMER_EXT_CHAIN(4);                                     \
    TRANSFORMER_EXT_CHAIN(5);                                     \
    TRANSFORMER_EXT_CHAIN(6);                                     \
    TRANSFORMER_EXT_CHAIN(7);                                     \
    TRANSFORMER_EXT_CHAIN(8);                                     \
    TRANSFORMER_EXT_CHAIN(9);                                     \
    TRANSFORMER_EXT_CHAIN(10);                                    \
    TRANSFORMER_EXT_CHAIN(11);                                    \
  }

#if defined(__x86_64__)
  static void run_baseline() {
    const __m128 one = _mm_set1_ps(1.0f);
#define TRANSFORMER_EXT_STEP(x) _mm_add_ps(_mm_mul_ps(x, one), one)
#define TRANSFORMER_EXT_REGISTER(x) "+x"(x)
    TRANSFORMER_EXT_CHAINS(__m128, one)
#undef TRANSFORMER_EXT_STEP
  }
  __attribute__((target("avx2,fma"))) static void run_avx2() {
    const __m256 one = _mm256_set1_ps(1.0f);
#define TRANSFORMER_EXT_STEP(x) _mm256_fmadd_ps(one, one, x)
    TRANSFORMER_EXT_CHAINS(__m256, one)
#undef TRANSFORMER_EXT_STEP
#undef TRANSFORMER_EXT_REGISTER
#define TRANSFORMER_EXT_REGISTER(x) "+v"(x)
  }
  __attribute__((target("avx512f"))) static void run_avx512() {
    const __m512 one = _mm512_set1_ps(1.0f);
#define TRANSFORMER_EXT_STEP(x) _mm512_fmadd_ps(one, one, x)
    TRANSFORMER_EXT_CHAINS(__m512, one)
#undef TRANSFORMER_EXT_STEP
  }
  __attribute__((target("avx512f,avx512bw,avx512bf16"))) static void run_bf16() {
    const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);
#define TRANSFORMER_EXT_STEP(x) _mm512_dpbf16_ps(x, one, one)
    TRANSFORMER_EXT_CHAINS(__m512, _mm512_set1_ps(1.0f))
#undef TRANSFORMER_EXT_STEP
  }
  __attribute__((target("avx512f,avx512bw,avx512vnni"))) static void run_vnni() {
    const __m512i one = _mm512_set1_epi8(1);
#define TRANSFORMER_EXT_STEP(x) _mm512_dpbusd_epi32(x, one, one)
    TRANSFORMER_EXT_CHAINS(__m512i, one)
#undef TRANSFORMER_EXT_STEP
  }
#if __clang_major__ >= 12 || (!defined(__clang__) && __GNUC__ >= 11)
  __attribute__((target("avx2,avxvnni"))) static void run_avx_vnni() {
    const __m256i one = _mm256_set1_epi8(1);
#define TRANSFORMER_EXT_STEP(x) _mm256_dpbusd_avx_epi32(x, one, one)
    TRANSFORMER_EXT_CHAINS(__m256i, one)
#undef TRANSFORMER_EXT_STEP
  }
#else
  static void run_avx_vnni() { run_avx2_bytes(); }  // the kernels are without it too
#endif
  // Without VNNI three instructions. The bytes are those of x, so that no product is computed once
  // for all.
  __attribute__((target("avx512f,avx512bw"))) static void run_avx512_bytes() {
    const __m512i one = _mm512_set1_epi8(1), pair = _mm512_set1_epi16(1);
#define TRANSFORMER_EXT_STEP(x) \
  _mm512_add_epi32(x, _mm512_madd_epi16(_mm512_maddubs_epi16(x, one), pair))
    TRANSFORMER_EXT_CHAINS(__m512i, one)
#undef TRANSFORMER_EXT_STEP
  }
  __attribute__((target("avx2"))) static void run_avx2_bytes() {
    const __m256i one = _mm256_set1_epi8(1), pair = _mm256_set1_epi16(1);
#define TRANSFORMER_EXT_STEP(x) \
  _mm256_add_epi32(x, _mm256_madd_epi16(_mm256_maddubs_epi16(x, one), pair))
    TRANSFORMER_EXT_CHAINS(__m256i, one)
  }
#else
  static void run_baseline() {
    typedef float Vector __attribute__((vector_size(16)));
    const Vector one = {1.0f, 1.0f, 1.0f, 1.0f};
#define TRANSFORMER_EXT_STEP(x) x + one* one
#define TRANSFORMER_EXT_REGISTER(x) "+w"(x)
    TRANSFORMER_EXT_CHAINS(Vector, one)
  }
#endif
#undef TRANSFORMER_EXT_STEP
#undef TRANSFORMER_EXT_REGISTER
#undef TRANSFORMER_EXT_CHAINS
#undef TRANSFORMER_EXT_CHAIN

  Variant variant_;
};

}  // namespace transformer_ext
