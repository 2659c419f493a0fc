// In place of CUDA's header where a .cu file is compiled for the CPU: see testing/cuda_emulation.h.
// What is missing here is not used yet.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "testing/cuda_emulation.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::cuda_emulation::thread_index())
#define blockIdx (::cuda_emulation::block_index())
#define blockDim (::cuda_emulation::block_size())
#define gridDim (::cuda_emulation::grid_size())
constexpr int warpSize = 32;

// ---- Host ---------------------------------------------------------------------------------------

struct dim3 : cuda_emulation::Index {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : cuda_emulation::Index{x, y, z} {}
};

typedef struct CUstream_st* cudaStream_t;
#define CUDART_VERSION 13000
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorECCUncorrectable = 214,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorJitCompilationDisabled = 223,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchTimeout = 702,
  cudaErrorAssert = 710,
  cudaErrorHardwareStackError = 714,
  cudaErrorIllegalInstruction = 715,
  cudaErrorMisalignedAddress = 716,
  cudaErrorInvalidAddressSpace = 717,
  cudaErrorInvalidPc = 718,
  cudaErrorLaunchFailure = 719,
  cudaErrorUnknown = 999,  // here: found by the emulation
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline const char*& cuda_emulation_error_text() {
  static const char* text = nullptr;
  return text;
}
inline cudaError_t cudaGetLastError() {
  if (const int failed = cuda_emulation::failed_launch()) return static_cast<cudaError_t>(failed);
  const char* const found = cuda_emulation::last_error();
  if (found != nullptr) cuda_emulation_error_text() = found;
  return found == nullptr ? cudaSuccess : cudaErrorUnknown;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorUnknown ? cuda_emulation_error_text()
         : error == cudaSuccess    ? "no error"
                                   : "an error of CUDA's";
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return cuda_emulation::allow_shared(kernel, static_cast<size_t>(bytes)) ? cudaSuccess
                                                                          : cudaErrorInvalidValue;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = 90;
  return static_cast<cudaError_t>(cuda_emulation::take_failure());
}
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_emulation::device();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  cuda_emulation::set_device(device);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor
               ? 0
               : static_cast<int>(cuda_emulation::most_shared());
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

// ---- Barriers, shuffles, votes ------------------------------------------------------------------

inline void __syncthreads(cuda_emulation::Location where = cuda_emulation::Location::current()) {
  cuda_emulation::sync_threads(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       cuda_emulation::Location where = cuda_emulation::Location::current()) {
  cuda_emulation::warp_together(mask, "__syncwarp", nullptr, nullptr, where);
}

// What one lane does with the values of others is the machine's work, no race between them.
#define CUDA_EMULATION_UNSANITIZED __attribute__((no_sanitize("thread")))

namespace cuda_emulation {

template <class T>
struct Shuffle {
  T value;
  int source;  // lane, or -1: its own
  T result;

  CUDA_EMULATION_UNSANITIZED static void all(void* const* lanes, unsigned mask) {
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] == nullptr) continue;
      Shuffle& to = *static_cast<Shuffle*>(lanes[i]);
      const int source = to.source < 0 ? i : to.source;
      if ((mask >> source & 1u) == 0) fail("a shuffle from a lane outside of the mask");
      to.result = static_cast<Shuffle*>(lanes[source])->value;
    }
  }
};

template <class T>
CUDA_EMULATION_UNSANITIZED T shuffle(unsigned mask, const char* what, T value, int source,
                                     Location where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  Shuffle<T> mine{value, source, value};
  warp_together(mask, what, &mine, &Shuffle<T>::all, where);
  return mine.result;
}

inline int lane() {
  const Index i = thread_index();
  const Index size = block_size();
  return static_cast<int>((i.x + size.x * (i.y + size.y * i.z)) % 32);
}

struct Vote {
  uint64_t value;
  unsigned ballot;
  unsigned same;

  CUDA_EMULATION_UNSANITIZED static void all(void* const* lanes, unsigned) {
    unsigned ballot = 0;
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] != nullptr && static_cast<Vote*>(lanes[i])->value != 0) ballot |= 1u << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] == nullptr) continue;
      Vote& to = *static_cast<Vote*>(lanes[i]);
      to.ballot = ballot;
      to.same = 0;
      for (int j = 0; j < 32; ++j) {
        if (lanes[j] != nullptr && static_cast<Vote*>(lanes[j])->value == to.value) {
          to.same |= 1u << j;
        }
      }
    }
  }
};

CUDA_EMULATION_UNSANITIZED inline Vote vote(unsigned mask, const char* what, uint64_t value,
                                            Location where) {
  Vote mine{value, 0, 0};
  warp_together(mask, what, &mine, &Vote::all, where);
  return mine;
}

}  // namespace cuda_emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cuda_emulation::Location where = cuda_emulation::Location::current()) {
  const int base = cuda_emulation::lane() / width * width;
  return cuda_emulation::shuffle(mask, "__shfl_sync", value, base + (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  cuda_emulation::Location where = cuda_emulation::Location::current()) {
  const int lane = cuda_emulation::lane();
  const int source = lane ^ lanes;
  return cuda_emulation::shuffle(mask, "__shfl_xor_sync", value,
                                 source / width > lane / width ? -1 : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                   cuda_emulation::Location where = cuda_emulation::Location::current()) {
  const int source = cuda_emulation::lane() + static_cast<int>(lanes);
  return cuda_emulation::shuffle(mask, "__shfl_down_sync", value,
                                 source / width != cuda_emulation::lane() / width ? -1 : source,
                                 where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                 cuda_emulation::Location where = cuda_emulation::Location::current()) {
  const int source = cuda_emulation::lane() - static_cast<int>(lanes);
  return cuda_emulation::shuffle(mask, "__shfl_up_sync", value,
                                 source < cuda_emulation::lane() / width * width ? -1 : source,
                                 where);
}
inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    cuda_emulation::Location where = cuda_emulation::Location::current()) {
  return cuda_emulation::vote(mask, "__ballot_sync", predicate != 0, where).ballot;
}
inline int __any_sync(unsigned mask, int predicate,
                      cuda_emulation::Location where = cuda_emulation::Location::current()) {
  return cuda_emulation::vote(mask, "__any_sync", predicate != 0, where).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      cuda_emulation::Location where = cuda_emulation::Location::current()) {
  return cuda_emulation::vote(mask, "__all_sync", predicate == 0, where).ballot == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value,
                          cuda_emulation::Location where = cuda_emulation::Location::current()) {
  static_assert(std::is_integral_v<T>);
  return cuda_emulation::vote(mask, "__match_any_sync", static_cast<uint64_t>(value), where).same;
}

// ---- Memory -------------------------------------------------------------------------------------

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}

namespace cuda_emulation {
// Real atomics, so that ThreadSanitizer does not take them for races.
template <class T, class F>
T atomic(T* address, F&& f) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits* const bits = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &old, std::bit_cast<Bits>(f(std::bit_cast<T>(old))),
                                      false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return std::bit_cast<T>(old);
}
}  // namespace cuda_emulation

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return cuda_emulation::atomic(address, [&](T old) -> T { return old + value; });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return cuda_emulation::atomic(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return cuda_emulation::atomic(address, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return cuda_emulation::atomic(address, [&](T old) -> T { return old | value; });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return cuda_emulation::atomic(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return cuda_emulation::atomic(address, [&](T old) { return old == expected ? value : old; });
}

// ---- Arithmetic ---------------------------------------------------------------------------------

inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline int __ffs(unsigned x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// ---- Vectors ------------------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
