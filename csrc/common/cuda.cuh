// What all CUDA kernels share. For *.cu only. A kernel is launched by launch() and has its shared
// memory by the macros here, so that the tests can run it without a GPU (testing/cuda_emulation.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

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

// ---- Launches -----------------------------------------------------------------------------------

constexpr size_t kUsualShared = 48 * 1024;

// The first error since launch_error() was asked: that of a launcher, which runs in one thread.
inline std::string& failure() {
  static thread_local std::string text;
  return text;
}

// What runs on none of the GPUs that the kernels were compiled for.
inline bool is_about_the_build(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInvalidPtx ||
         error == cudaErrorInvalidKernelImage || error == cudaErrorInsufficientDriver ||
         error == cudaErrorJitCompilerNotFound || error == cudaErrorJitCompilationDisabled;
}

// What stays until the process ends, and which a later call to CUDA, of whatever library, is told.
inline bool is_of_the_context(cudaError_t error) {
  return error == cudaErrorIllegalAddress || error == cudaErrorLaunchFailure ||
         error == cudaErrorMisalignedAddress || error == cudaErrorIllegalInstruction ||
         error == cudaErrorInvalidAddressSpace || error == cudaErrorInvalidPc ||
         error == cudaErrorHardwareStackError || error == cudaErrorAssert ||
         error == cudaErrorLaunchTimeout || error == cudaErrorECCUncorrectable;
}

// "8.0, 9.0": what this file is compiled for.
inline std::string built_for() {
  std::string text;
#if defined(__CUDA_ARCH_LIST__)
  for (const int number : {__CUDA_ARCH_LIST__}) {
    text += (text.empty() ? "" : ", ") + std::to_string(number / 100) + "." +
            std::to_string(number / 10 % 10);
  }
#endif
  return text;
}

inline std::string device_text() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return "no device";
  }
  return "cuda:" + std::to_string(device) + ", compute capability " + std::to_string(major) + "." +
         std::to_string(minor);
}

inline void fail(const std::string& text) {
  if (failure().empty()) failure() = text;
}
// `asked` is what was asked of the device.
inline void fail(cudaError_t error, const std::string& asked) {
  std::string text = cudaGetErrorString(error);
  text += " (" + device_text() + "; " + asked + ")";
  if (is_about_the_build(error)) {
    text += "; the kernels are compiled for compute capability " + built_for() + " by CUDA " +
            std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION / 10 % 100);
  } else if (is_of_the_context(error)) {
    text += "; a kernel before this one may have failed, CUDA_LAUNCH_BLOCKING=1 tells which";
  }
  fail(text);
  cudaGetLastError();  // or the next launch of this thread would be told of it again
}

// Of a block, where a kernel asks for it; 0 where that cannot be told.
inline size_t most_shared() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    cudaGetLastError();
  }
  return static_cast<size_t>(bytes);
}

// find(), asked once for each device.
template <class F>
auto of_this_device(F&& find) {
  static std::mutex mutex;
  static std::map<int, decltype(find())> known;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, find()).first->second;
}

// More than kUsualShared must be allowed first, to each kernel on each device, once.
inline bool allow_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    const std::lock_guard<std::mutex> lock(mutex);
    size_t& most = allowed[{kernel, device}];
    if (bytes <= most) return true;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes));
    if (error == cudaSuccess) {
      most = bytes;
      return true;
    }
  }
  fail(error, std::to_string(bytes) + " bytes of shared memory a block, of " +
                  std::to_string(most_shared()));
  return false;
}

// kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...), unless a launch has failed since
// launch_error() was last asked.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
            cudaStream_t stream, typename Same<Parameters>::type... arguments) {
  if (!failure().empty()) return;
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kUsualShared && !allow_shared(address, shared_bytes)) return;
#if defined(TRANSFORMER_EXT_CUDA_EMULATION)
  (void)stream;
  ::cuda_emulation::launch(address, [=] { kernel(arguments...); }, blocks, threads, shared_bytes);
#else
  // clang-format off
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  // clang-format on
#endif
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  fail(error, std::to_string(blocks.x) + " x " + std::to_string(blocks.y) + " blocks of " +
                  std::to_string(threads.x) + " threads and " + std::to_string(shared_bytes) +
                  " bytes of shared memory");
}

inline void set_to_zero(void* to, size_t bytes, cudaStream_t stream) {
  if (!failure().empty()) return;
  const cudaError_t error = cudaMemsetAsync(to, 0, bytes, stream);
  if (error != cudaSuccess) fail(error, "setting " + std::to_string(bytes) + " bytes to 0");
}

// What the launchers return: null, or the text of the first error, which stays as it is until the
// next error of the thread.
inline const char* launch_error() {
  static thread_local std::string returned;
  if (failure().empty()) return nullptr;
  returned.swap(failure());
  failure().clear();
  return returned.c_str();
}

// ---- Numbers ------------------------------------------------------------------------------------

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
