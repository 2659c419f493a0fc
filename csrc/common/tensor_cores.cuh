// Products of 16 x 16 by 16 x 8 on the tensor cores (mma.sync, compute capability 8.0 on), in
// bfloat16 or float16 with sums in float32, of matrices in shared memory. For *.cu only.
//
// A lane holds, with g = lane / 4 and t = lane % 4 (PTX ISA 8.7, "Matrix Fragments for
// mma.m16n8k16 with floating point type"):
//
//   A, 16 x 16, four registers of two elements: rows g, g + 8, g, g + 8; columns 2 t and 2 t + 1,
//     in the last two registers 8 further
//   B, 16 x 8, two registers: rows 2 t and 2 t + 1, in the second 8 further; column g
//   C and D, 16 x 8: c[0] and c[1] are row g, columns 2 t and 2 t + 1; c[2] and c[3] row g + 8
//
// So two neighbouring C, rounded, are an A, without a word between lanes. The tests hold this
// against the layouts that CUTLASS has of the same instruction.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/cuda.cuh"
#if defined(TRANSFORMER_EXT_CUDA_EMULATION)
#include "tensor_cores.h"
#endif

// Not defined where code is made for a GPU that lacks the instructions: kernels have no body there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define TRANSFORMER_EXT_TENSOR_CORES
#endif

namespace transformer_ext {
namespace {

#if defined(TRANSFORMER_EXT_TENSOR_CORES)

// Two neighbours, the first in the lower half.
template <class T>
__device__ inline uint32_t pack(float first, float second);
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}
template <>
__device__ inline uint32_t pack<__half>(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}

// c += a * b, by all lanes.
template <class T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#if defined(TRANSFORMER_EXT_CUDA_EMULATION)
  cuda_emulation::multiply_add<T>(c, a, b0, b1);
#else
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// Four matrices of 8 x 8; lane i gives the address of row i % 8 of matrix i / 8, in shared memory
// and aligned to 16 bytes. Of each it gets row g, columns 2 t and 2 t + 1; with kTransposed column
// g, rows 2 t and 2 t + 1.
template <bool kTransposed, class T>
__device__ inline void load_matrices(const T* row, uint32_t (&x)[4]) {
  static_assert(sizeof(T) == 2, "elements of 16 bits");
#if defined(TRANSFORMER_EXT_CUDA_EMULATION)
  cuda_emulation::load_matrices<kTransposed>(row, x);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// What a matrix in shared memory is to a product. A stride of 8 elements more than a multiple of
// 16 lets 8 rows lie in different banks.

// A = the 16 x 16 at `m`.
template <class T>
__device__ inline void load_a(const T* m, int stride, uint32_t (&a)[4]) {
  const int lane = threadIdx.x % kWarp;
  load_matrices<false>(m + lane % 16 * stride + lane / 16 * 8, a);
}
// A = the transpose of the 16 x 16 at `m`.
template <class T>
__device__ inline void load_a_transposed(const T* m, int stride, uint32_t (&a)[4]) {
  const int lane = threadIdx.x % kWarp;
  load_matrices<true>(m + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8, a);
}
// Two B, b[0], b[1] and b[2], b[3], side by side: the 16 x 16 at `m`.
template <class T>
__device__ inline void load_b(const T* m, int stride, uint32_t (&b)[4]) {
  const int lane = threadIdx.x % kWarp;
  load_matrices<true>(m + lane % 16 * stride + lane / 16 * 8, b);
}
// The same of the transpose of the 16 x 16 at `m`.
template <class T>
__device__ inline void load_b_transposed(const T* m, int stride, uint32_t (&b)[4]) {
  const int lane = threadIdx.x % kWarp;
  load_matrices<false>(m + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8, b);
}

// 16 bytes from global to shared memory, zeros if not `inside`, while the thread goes on. They are
// there for this thread once it has waited, for others after a barrier behind that.
__device__ inline void copy_async(void* to, const void* from, bool inside) {
#if defined(TRANSFORMER_EXT_CUDA_EMULATION)
  cuda_emulation::copy_async(to, from, inside);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
               : "memory");
#endif
}
// Ends a group of copies of this thread.
__device__ inline void end_copies() {
#if defined(TRANSFORMER_EXT_CUDA_EMULATION)
  cuda_emulation::end_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all groups of this thread but the last kPending.
template <int kPending>
__device__ inline void wait_for_copies() {
#if defined(TRANSFORMER_EXT_CUDA_EMULATION)
  cuda_emulation::wait_for_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

#endif

}  // namespace
}  // namespace transformer_ext
