// A product of two 16 x 16 matrices by common/tensor_cores.cuh, sound or with mistakes, for the
// test of the emulation.
#include "common/tensor_cores.cuh"
#include "testing/tile_product_cuda.h"

namespace transformer_ext {
namespace {

template <class T>
__global__ void product(TileProduct how, const T* a, const T* b, float* c) {
#if defined(TRANSFORMER_EXT_TENSOR_CORES)
  constexpr int kStride = 24;
  TRANSFORMER_EXT_DYNAMIC_SHARED(memory);
  T* const first = reinterpret_cast<T*>(memory);
  T* const second = first + 16 * kStride;
  const int lane = threadIdx.x;
  const int row = lane / 2;
  const int column = lane % 2 * 8;
  copy_async(first + row * kStride + column, a + row * 16 + column, true);
  end_copies();
  copy_async(second + row * kStride + column, b + row * 16 + column, true);
  end_copies();
  if (how.wait_early) {
    wait_for_copies<1>();
  } else if (!how.no_wait) {
    wait_for_copies<0>();
  }
  __syncwarp();
  if (how.read_former) copy_async(first + row * kStride + column, b + row * 16 + column, true);
  uint32_t left[4];
  uint32_t right[4];
  if (how.a_transposed) {
    load_a_transposed(first, kStride, left);
  } else {
    load_a(first, kStride, left);
  }
  if (how.b_transposed) {
    load_b_transposed(second, kStride, right);
  } else {
    load_b(second, kStride, right);
  }
  for (int half = 0; half < 2; ++half) {
    float sum[4] = {};
    multiply_add<T>(sum, left, right[2 * half], right[2 * half + 1]);
    for (int i = 0; i < 4; ++i) {
      c[(lane / 4 + i / 2 * 8) * 16 + 8 * half + lane % 4 * 2 + i % 2] = sum[i];
    }
  }
  if (!how.no_wait) {
    end_copies();
    wait_for_copies<0>();
  }
#endif
}

}  // namespace

const char* tile_product_cuda(const TileProduct& how, FloatType type, const void* a, const void* b,
                              float* c) {
  const size_t bytes = 2 * 16 * 24 * 2;
  if (type == FloatType::bfloat16) {
    launch(product<__nv_bfloat16>, 1, kWarp, bytes, nullptr, how,
           static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), c);
  } else {
    launch(product<__half>, 1, kWarp, bytes, nullptr, how, static_cast<const __half*>(a),
           static_cast<const __half*>(b), c);
  }
  return launch_error();
}

}  // namespace transformer_ext
