// What all CUDA kernels share. For *.cu only. A kernel is launched by launch() and has its shared
// memory by the macros here, so that the tests can run it without a GPU (testing/cuda_emulation.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

// TRANSFORMER_EXT_SHARED(float, partial, 8): an array of the block.
// TRANSFORMER_EXT_DYNAMIC_SHARED(memory): a pointer to the bytes asked for at the launch, aligned
// to 16 bytes.
#if defined(TRANSFORMER_EXT_CUDA_EMULATION)
#define TRANSFORMER_EXT_SHARED(type, name, count)                                  \
  type(&name)[count] =                                                             \
      *static_cast<type(*)[count]>(::cuda_emulation::shared(([]() -> const void* { \
                                                              static char key = 0; \
                                                              return &key;         \
                                                            }()),                  \
                                                            sizeof(type) * (count)))
#define TRANSFORMER_EXT_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::cuda_emulation::dynamic_shared())
#else
#define TRANSFORMER_EXT_SHARED(type, name, count) __shared__ type name[count]
#define TRANSFORMER_EXT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace transformer_ext {
namespace {

template <class T>
struct Same {
  using type = T;
};

// kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...)
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
            cudaStream_t stream, typename Same<Parameters>::type... arguments) {
#if defined(TRANSFORMER_EXT_CUDA_EMULATION)
  (void)stream;
  ::cuda_emulation::launch([=] { kernel(arguments...); }, blocks, threads, shared_bytes);
#else
  // clang-format off
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  // clang-format on
#endif
}

// What the launchers return: null, or the text of the error.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Neighbouring elements, read and written at once.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T values[kVector];
};

__device__ inline float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

struct Sum {
  static __device__ float identity() { return 0.0f; }
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  static __device__ float identity() { return minus_infinity(); }
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The same for all lanes, bit for bit; all must come.
template <class Op>
__device__ inline float warp_reduce(float x, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = op(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

// The same for all threads, bit for bit; all kThreads of the block must come.
template <int kThreads, class Op>
__device__ inline float block_reduce(float x, Op op) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp, "whole warps, at most 1024 threads");
  TRANSFORMER_EXT_SHARED(float, partial, kWarps);
  x = warp_reduce(x, op);
  __syncthreads();  // the last use of `partial` is over
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = threadIdx.x % kWarp < kWarps ? partial[threadIdx.x % kWarp] : op.identity();
  return warp_reduce(x, op);
}

}  // namespace
}  // namespace transformer_ext
