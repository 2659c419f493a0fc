// Kernels with mistakes that a GPU may or may not show, for the test of the emulation.
#include "common/cuda.cuh"
#include "testing/broken_kernels_cuda.h"

namespace transformer_ext {
namespace {

// Each thread doubles what its right neighbour in the block has written.
template <bool kBarrier>
__global__ void neighbour(const float* x, float* out) {
  TRANSFORMER_EXT_SHARED(float, row, 64);
  row[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = 2.0f * row[(threadIdx.x + 1) % 64];
}

__global__ void diverging_shuffle(const float* x, float* out) {
  float v = x[threadIdx.x];
  if (threadIdx.x != 5) v += __shfl_xor_sync(kAllLanes, v, 1);
  out[threadIdx.x] = v;
}

__global__ void diverging_barrier(const float* x, float* out) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void shuffle_from_outside(const float* x, float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, x[threadIdx.x], 20);
}

__global__ void beyond_shared(const float* x, float* out) {
  TRANSFORMER_EXT_SHARED(float, row, 63);
  row[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = row[threadIdx.x];
}

__global__ void float_atomics(const float* x, float* out) { atomicAdd(out, x[threadIdx.x]); }

__global__ void one_sum(const float* x, float* out) {
  const float sum = block_reduce<64>(x[threadIdx.x], Sum{});
  out[threadIdx.x] = sum;
}

}  // namespace

const char* broken_kernel_cuda(BrokenKernel which, const float* x, float* out) {
  void (*kernel)(const float*, float*) = nullptr;
  switch (which) {
    case BrokenKernel::none:
      kernel = neighbour<true>;
      break;
    case BrokenKernel::no_barrier:
      kernel = neighbour<false>;
      break;
    case BrokenKernel::diverging_shuffle:
      kernel = diverging_shuffle;
      break;
    case BrokenKernel::diverging_barrier:
      kernel = diverging_barrier;
      break;
    case BrokenKernel::shuffle_from_outside:
      kernel = shuffle_from_outside;
      break;
    case BrokenKernel::beyond_shared:
      kernel = beyond_shared;
      break;
    case BrokenKernel::float_atomics:
      kernel = float_atomics;
      break;
    case BrokenKernel::reduction:
      kernel = one_sum;
      break;
  }
  launch(kernel, 1, 64, 0, nullptr, x, out);
  return launch_error();
}

}  // namespace transformer_ext
