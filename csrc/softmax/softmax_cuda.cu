#include <cstdint>

#include "common/cuda.cuh"
#include "softmax/softmax_cuda.h"

namespace transformer_ext {
namespace {

constexpr int kWarpsPerBlock = 4;
// Rows up to this length stay in the registers of one warp; longer ones take a block, which reads
// them again from the cache for each pass.
constexpr int64_t kMaxWarpColumns = 1024;
constexpr int kBlockThreads = 256;

// The slots of one row that are kept: those before `columns` at which mask (null: all) is not 0.
struct RowMask {
  const uint8_t* mask;
  int64_t columns;

  __device__ RowMask(const SoftmaxMask& keep, uint32_t row, int64_t rows, int64_t all_columns)
      : mask(nullptr), columns(all_columns) {
    if (keep.key_lengths != nullptr) {
      const uint32_t rows_per_batch = static_cast<uint32_t>(rows / keep.sizes[0]);
      const int64_t length = keep.key_lengths[row / rows_per_batch];
      columns = length < columns ? length : columns;
    }
    if (keep.causal) {
      const int64_t query = row % static_cast<uint32_t>(keep.sizes[keep.dims - 1]);
      columns = query + 1 < columns ? query + 1 : columns;
    }
    if (keep.mask != nullptr) {
      // 32-bit division: at 64 bits it would cost as much as the row's memory traffic.
      int64_t offset = 0;
      uint32_t rest = row;
      for (int d = keep.dims - 1; d >= 0; --d) {
        const uint32_t size = static_cast<uint32_t>(keep.sizes[d]);
        offset += static_cast<int64_t>(rest % size) * keep.strides[d];
        rest /= size;
      }
      mask = keep.mask + offset;
      if (keep.column_stride == 0) {
        if (*mask == 0) columns = 0;
        mask = nullptr;
      }
    }
  }

  __device__ bool operator()(int64_t column) const {
    return column < columns && (mask == nullptr || mask[column] != 0);
  }
};

__device__ inline float softmax_value(float e, float inverse) {
  // A masked slot stays 0 where a NaN elsewhere in the row makes the sum NaN.
  return e == 0.0f ? 0.0f : e * inverse;
}

__device__ inline float log_softmax_value(float x, float shift, float log_sum) {
  return x == minus_infinity() ? x : (x - shift) - log_sum;
}

// One warp a row; a lane holds kItems groups of kVector neighbouring columns.
template <class T, int kItems, int kVector>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) forward_warp(SoftmaxForward a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= a.rows) return;
  const int lane = threadIdx.x % kWarp;
  const RowMask keep(a.keep, static_cast<uint32_t>(row), a.rows, a.columns);
  const T* const x = static_cast<const T*>(a.x) + row * a.columns;
  T* const out = static_cast<T*>(a.out) + row * a.columns;

  float values[kItems][kVector];
  float top = minus_infinity();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t column = (static_cast<int64_t>(i) * kWarp + lane) * kVector;
    Vector<T, kVector> loaded;
    const bool inside = column < a.columns;
    if (inside) loaded = *reinterpret_cast<const Vector<T, kVector>*>(x + column);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      values[i][v] = inside && keep(column + v) ? to_float(loaded.values[v]) : minus_infinity();
      top = fmaxf(top, values[i][v]);
    }
  }
  top = warp_reduce(top, Max{});
  // As on the CPU: without a maximum (only masked slots and NaN) 0 lets a NaN through.
  const float shift = top == minus_infinity() ? 0.0f : top;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float e = expf(values[i][v] - shift);
      sum += e;
      if (!a.log) values[i][v] = e;
    }
  }
  sum = warp_reduce(sum, Sum{});
  const float inverse = 1.0f / sum;
  const float log_sum = logf(sum);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t column = (static_cast<int64_t>(i) * kWarp + lane) * kVector;
    if (column >= a.columns) continue;
    Vector<T, kVector> result;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float value = a.log ? log_softmax_value(values[i][v], shift, log_sum)
                                : softmax_value(values[i][v], inverse);
      result.values[v] = from_float<T>(sum == 0.0f ? 0.0f : value);
    }
    *reinterpret_cast<Vector<T, kVector>*>(out + column) = result;
  }
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) forward_block(SoftmaxForward a) {
  const int64_t row = blockIdx.x;
  const RowMask keep(a.keep, static_cast<uint32_t>(row), a.rows, a.columns);
  const T* const x = static_cast<const T*>(a.x) + row * a.columns;
  T* const out = static_cast<T*>(a.out) + row * a.columns;

  float top = minus_infinity();
  for (int64_t c = threadIdx.x; c < a.columns; c += kBlockThreads) {
    if (keep(c)) top = fmaxf(top, to_float(x[c]));
  }
  top = block_reduce<kBlockThreads>(top, Max{});
  const float shift = top == minus_infinity() ? 0.0f : top;
  float sum = 0.0f;
  for (int64_t c = threadIdx.x; c < a.columns; c += kBlockThreads) {
    if (keep(c)) sum += expf(to_float(x[c]) - shift);
  }
  sum = block_reduce<kBlockThreads>(sum, Sum{});
  const float inverse = 1.0f / sum;
  const float log_sum = logf(sum);
  for (int64_t c = threadIdx.x; c < a.columns; c += kBlockThreads) {
    const float v = keep(c) ? to_float(x[c]) : minus_infinity();
    const float value =
        a.log ? log_softmax_value(v, shift, log_sum) : softmax_value(expf(v - shift), inverse);
    out[c] = from_float<T>(sum == 0.0f ? 0.0f : value);
  }
}

// The term of a slot in the row's sum, and its gradient from that sum. Masked slots (y = 0, or -inf
// of the logarithm) must not be read from the gradient, which may hold NaN there.
__device__ inline float backward_term(float g, float y, bool log) {
  if (log) return y == minus_infinity() ? 0.0f : g;
  return y == 0.0f ? 0.0f : y * g;
}
__device__ inline float backward_value(float g, float y, float sum, bool log) {
  if (log) return y == minus_infinity() ? 0.0f : g - expf(y) * sum;
  return y == 0.0f ? 0.0f : y * (g - sum);
}

// Two log-probabilities of 0 cannot stand in one row: such a row had no kept slot. (Nor does a row
// of one slot have a gradient.)
template <class T>
__device__ inline bool without_gradient(const T* y, int64_t columns) {
  return columns == 1 || (to_float(y[0]) == 0.0f && to_float(y[1]) == 0.0f);
}

template <class T, int kItems, int kVector>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) backward_warp(SoftmaxBackward a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= a.rows) return;
  const int lane = threadIdx.x % kWarp;
  const T* const grad = static_cast<const T*>(a.grad) + row * a.columns;
  const T* const y = static_cast<const T*>(a.output) + row * a.columns;
  // grad_x may be grad: nothing of the row is written before all of it is read.
  T* const grad_x = static_cast<T*>(a.grad_x) + row * a.columns;
  const bool none = a.log && without_gradient(y, a.columns);

  Vector<T, kVector> g[kItems];
  Vector<T, kVector> p[kItems];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t column = (static_cast<int64_t>(i) * kWarp + lane) * kVector;
    if (column >= a.columns) continue;
    g[i] = *reinterpret_cast<const Vector<T, kVector>*>(grad + column);
    p[i] = *reinterpret_cast<const Vector<T, kVector>*>(y + column);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      sum += backward_term(to_float(g[i].values[v]), to_float(p[i].values[v]), a.log);
    }
  }
  sum = warp_reduce(sum, Sum{});
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t column = (static_cast<int64_t>(i) * kWarp + lane) * kVector;
    if (column >= a.columns) continue;
    Vector<T, kVector> result;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float value =
          backward_value(to_float(g[i].values[v]), to_float(p[i].values[v]), sum, a.log);
      result.values[v] = from_float<T>(none ? 0.0f : value);
    }
    *reinterpret_cast<Vector<T, kVector>*>(grad_x + column) = result;
  }
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) backward_block(SoftmaxBackward a) {
  const int64_t row = blockIdx.x;
  const T* const grad = static_cast<const T*>(a.grad) + row * a.columns;
  const T* const y = static_cast<const T*>(a.output) + row * a.columns;
  T* const grad_x = static_cast<T*>(a.grad_x) + row * a.columns;
  const bool none = a.log && without_gradient(y, a.columns);
  float sum = 0.0f;
  for (int64_t c = threadIdx.x; c < a.columns; c += kBlockThreads) {
    sum += backward_term(to_float(grad[c]), to_float(y[c]), a.log);
  }
  sum = block_reduce<kBlockThreads>(sum, Sum{});
  for (int64_t c = threadIdx.x; c < a.columns; c += kBlockThreads) {
    const float value = backward_value(to_float(grad[c]), to_float(y[c]), sum, a.log);
    grad_x[c] = from_float<T>(none ? 0.0f : value);
  }
}

struct Forward {
  using Arguments = SoftmaxForward;
  template <class T, int kItems, int kVector>
  static void warp(const SoftmaxForward& a, unsigned blocks, cudaStream_t stream) {
    launch(forward_warp<T, kItems, kVector>, blocks, kWarp * kWarpsPerBlock, 0, stream, a);
  }
  template <class T>
  static void block(const SoftmaxForward& a, cudaStream_t stream) {
    launch(forward_block<T>, static_cast<unsigned>(a.rows), kBlockThreads, 0, stream, a);
  }
  static bool aligned(const SoftmaxForward& a, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(a.x) % bytes == 0 &&
           reinterpret_cast<uintptr_t>(a.out) % bytes == 0;
  }
};

struct Backward {
  using Arguments = SoftmaxBackward;
  template <class T, int kItems, int kVector>
  static void warp(const SoftmaxBackward& a, unsigned blocks, cudaStream_t stream) {
    launch(backward_warp<T, kItems, kVector>, blocks, kWarp * kWarpsPerBlock, 0, stream, a);
  }
  template <class T>
  static void block(const SoftmaxBackward& a, cudaStream_t stream) {
    launch(backward_block<T>, static_cast<unsigned>(a.rows), kBlockThreads, 0, stream, a);
  }
  static bool aligned(const SoftmaxBackward& a, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(a.grad) % bytes == 0 &&
           reinterpret_cast<uintptr_t>(a.output) % bytes == 0 &&
           reinterpret_cast<uintptr_t>(a.grad_x) % bytes == 0;
  }
};

template <class Kernel, class T>
void launch_by_width(const typename Kernel::Arguments& a, cudaStream_t stream) {
  if (a.columns > kMaxWarpColumns) return Kernel::template block<T>(a, stream);
  const unsigned blocks = static_cast<unsigned>((a.rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
  if (a.columns % 4 == 0 && Kernel::aligned(a, 4 * sizeof(T))) {
    if (a.columns <= 128) return Kernel::template warp<T, 1, 4>(a, blocks, stream);
    if (a.columns <= 256) return Kernel::template warp<T, 2, 4>(a, blocks, stream);
    if (a.columns <= 512) return Kernel::template warp<T, 4, 4>(a, blocks, stream);
    return Kernel::template warp<T, 8, 4>(a, blocks, stream);
  }
  if (a.columns <= 128) return Kernel::template warp<T, 4, 1>(a, blocks, stream);
  if (a.columns <= 512) return Kernel::template warp<T, 16, 1>(a, blocks, stream);
  return Kernel::template warp<T, 32, 1>(a, blocks, stream);
}

template <class Kernel>
const char* run(const typename Kernel::Arguments& a, SoftmaxType type, void* stream) {
  if (a.rows == 0 || a.columns == 0) return nullptr;
  if (a.rows > INT32_MAX) return "more than 2^31 - 1 rows";
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (type) {
    case SoftmaxType::float32:
      launch_by_width<Kernel, float>(a, on);
      break;
    case SoftmaxType::bfloat16:
      launch_by_width<Kernel, __nv_bfloat16>(a, on);
      break;
    case SoftmaxType::float16:
      launch_by_width<Kernel, __half>(a, on);
      break;
  }
  return launch_error();
}

}  // namespace

const char* softmax_forward_cuda(const SoftmaxForward& arguments, SoftmaxType type, void* stream) {
  return run<Forward>(arguments, type, stream);
}

const char* softmax_backward_cuda(const SoftmaxBackward& arguments, SoftmaxType type,
                                  void* stream) {
  return run<Backward>(arguments, type, stream);
}

}  // namespace transformer_ext
