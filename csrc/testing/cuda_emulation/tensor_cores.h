// The instructions of common/tensor_cores.cuh, lane by lane as the PTX ISA describes them: see
// testing/cuda_emulation.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace cuda_emulation {

inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float widen(__half x) { return __half2float(x); }

// mma.sync.aligned.m16n8k16.row.col.f32.{bf16.bf16,f16.f16}.f32
template <class T>
struct MultiplyAdd {
  float c[4];
  T a[8];
  T b[4];

  CUDA_EMULATION_UNSANITIZED static void all(void* const* lanes, unsigned mask) {
    if (mask != 0xffffffffu) fail("mma.sync without all lanes");
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const MultiplyAdd& of = *static_cast<MultiplyAdd*>(lanes[lane]);
      const int group = lane >> 2;
      const int in_group = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
        a[row][in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)] = widen(of.a[i]);
      }
      for (int i = 0; i < 4; ++i) {
        b[in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = widen(of.b[i]);
        c[i < 2 ? group : group + 8][in_group * 2 + (i & 1)] = of.c[i];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      MultiplyAdd& of = *static_cast<MultiplyAdd*>(lanes[lane]);
      for (int i = 0; i < 4; ++i)
        of.c[i] = c[(lane >> 2) + (i < 2 ? 0 : 8)][lane % 4 * 2 + (i & 1)];
    }
  }
};

template <class T>
CUDA_EMULATION_UNSANITIZED void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, Location where = Location::current()) {
  const uint32_t b[2] = {b0, b1};
  MultiplyAdd<T> mine;
  std::memcpy(mine.c, c, sizeof c);
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  warp_together(0xffffffffu, "mma.sync", &mine, &MultiplyAdd<T>::all, where);
  std::memcpy(c, mine.c, sizeof c);
}

// ldmatrix.sync.aligned.m8n8.x4{,.trans}.shared.b16
template <bool kTransposed>
struct LoadMatrices {
  uint16_t row[8];
  uint16_t x[4][2];

  CUDA_EMULATION_UNSANITIZED static void all(void* const* lanes, unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
      LoadMatrices& to = *static_cast<LoadMatrices*>(lanes[lane]);
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int i = 0; i < 2; ++i) {
          const int row = kTransposed ? lane % 4 * 2 + i : lane / 4;
          const int column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
          to.x[matrix][i] = static_cast<LoadMatrices*>(lanes[matrix * 8 + row])->row[column];
        }
      }
    }
  }
};

// Each lane reads the row that it gives the address of, so that the sanitizers see it.
template <bool kTransposed>
void load_matrices(const void* row, uint32_t (&x)[4], Location where = Location::current()) {
  LoadMatrices<kTransposed> mine{};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix: a row not aligned to 16 bytes");
  std::memcpy(mine.row, row, sizeof mine.row);
  warp_together(0xffffffffu, "ldmatrix", &mine, &LoadMatrices<kTransposed>::all, where);
  std::memcpy(x, mine.x, sizeof x);
}

// cp.async: NaN at first, and what was to be copied when it is waited for. So who reads too early,
// and who still reads what lay there before, sees NaN, and ThreadSanitizer two writes.
inline void copy_async(void* to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("cp.async: an address not aligned to 16 bytes");
  }
  std::memset(to, 0xff, 16);
  note_copy({to, inside ? from : nullptr});
}
inline void end_copies() { end_copy_group(); }
inline void wait_for_copies(unsigned pending) {
  for (AsyncCopy copy; next_copy(pending, copy);) {
    if (copy.from != nullptr) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
}

}  // namespace cuda_emulation
