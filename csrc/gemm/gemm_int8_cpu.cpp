// The product of 8-bit integers. This file is compiled for avx2_vnni and avx512_vnni too
// (common/isa.h): of factors.h, only what multiplies integers differs.
#include "gemm/product.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Panels of integers, then the scale of each column (0 past the last).
void pack_integers(const float* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride,
                   void* out, Parallel& parallel) {
  const int64_t panels = (n + kColumns - 1) / kColumns;
  const int64_t words = (k + 3) / 4;
  int8_t* const packed = static_cast<int8_t*>(out);
  float* const scales = reinterpret_cast<float*>(packed + panels * kColumns * words * 4);
  parallel.for_each(panels, [&](int64_t panel) {
    char* const memory = scratch<char>(k * 4 + words * 4, kTurnedSlot);
    float* const row = reinterpret_cast<float*>(memory);
    int8_t* const integers = reinterpret_cast<int8_t*>(memory + k * 4);
    int8_t* const begin = packed + panel * kColumns * words * 4;
    for (int64_t c = 0; c < kColumns; ++c) {
      const int64_t column = panel * kColumns + c;
      GemmRowScale scale{};
      if (column < n) {
        const float* from = w + column * n_stride;
        if (k_stride != 1) {
          for (int64_t i = 0; i < k; ++i) row[i] = from[i * k_stride];
          from = row;
        }
        convert_row(from, k, integers, &scale);
      } else {
        std::memset(integers, 0, static_cast<size_t>(words * 4));
      }
      scales[column] = scale.scale;
      for (int64_t word = 0; word < words; ++word) {
        uint32_t four;
        std::memcpy(&four, integers + word * 4, sizeof four);
        four ^= 0x80808080u;
        std::memcpy(begin + (word * kColumns + c) * 4, &four, sizeof four);
      }
    }
  });
}

}  // namespace

extern const GemmInt8Kernels gemm_int8_kernels = {
    {&pack_integers, &convert<int8_t>, &gemm<int8_t>},
    kInstruction,
// Beside float32 in decoding (base, beam 4, 2 threads), output tokens/s of batches of 64, 16 and 1:
// AVX2 661, 613, 183, with int8 788, 750, 401, and with AVX-VNNI 1958, 1740, 661; AVX-512 1145,
// 999, 261, with int8 1495, 1600, 827, and with VNNI 3371, 3323, 1103.
#if defined(__AVX2__)
    true,
#else
    false,
#endif
};

}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
