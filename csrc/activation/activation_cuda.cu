// Bytes a bfloat16 element of the result: forward 4 (gated 6), backward 6 (gated 10). Expected of
// copy bandwidth, not measured: 85 to 90 % for ReLU; GELU and SiLU cost 20 to 40 instructions and
// one or two of the special function unit an element, near the limit of an H200 (16 of these a
// cycle and processor against 5 elements' bytes): 80 %.
#include <cstdint>

#include "activation/activation_cuda.h"
#include "common/cuda_chunks.cuh"

namespace transformer_ext {
namespace {

// 1 / (1 + e^-x), and 1 minus it without cancellation.
struct Sigmoid {
  float value;
  float rest;
  __device__ explicit Sigmoid(float x) {
    const float e = expf(-fabsf(x));
    const float larger = 1.0f / (1.0f + e);
    value = x < 0.0f ? e * larger : larger;
    rest = x < 0.0f ? larger : e * larger;
  }
};

struct ValueAndSlope {
  float value;
  float slope;
};

struct Relu {
  // `x <= 0` and not `x > 0`: a NaN stays a NaN.
  static __device__ float value(float x) { return x <= 0.0f ? 0.0f : x; }
  static __device__ ValueAndSlope both(float x) { return {value(x), x <= 0.0f ? 0.0f : 1.0f}; }
};

// By erfcf, which keeps its relative precision in the lower tail.
struct Gelu {
  static __device__ float phi(float x) { return 0.5f * erfcf(-0.70710678118654752f * x); }
  static __device__ float value(float x) { return x * phi(x); }
  static __device__ ValueAndSlope both(float x) {
    const float p = phi(x);
    return {x * p, p + x * expf(-0.5f * x * x) * 0.39894228040143268f};
  }
};

// 0.5 * (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  static constexpr float kTwice = 1.5957691216057308f;
  static constexpr float kCubic = 0.044715f;
  static __device__ float twice_u(float x) { return kTwice * (x + kCubic * x * x * x); }
  static __device__ float value(float x) { return x / (1.0f + expf(-twice_u(x))); }
  static __device__ ValueAndSlope both(float x) {
    const Sigmoid s(twice_u(x));
    const float slope = kTwice * (1.0f + 3.0f * kCubic * x * x);
    // In this order a vanishing factor comes first: x * slope overflows from |x| = 1e13 on.
    return {x * s.value, s.value + s.value * s.rest * x * slope};
  }
};

struct Silu {
  static __device__ float value(float x) { return x / (1.0f + expf(-x)); }
  static __device__ ValueAndSlope both(float x) {
    const Sigmoid s(x);
    return {x * s.value, s.value * (1.0f + x * s.rest)};
  }
};

template <class F>
__device__ inline void values(float (&v)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v[i] = F::value(v[i]);
}

template <class F>
__device__ inline void slopes(float (&v)[kChunk], float (&slope)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const ValueAndSlope both = F::both(v[i]);
    v[i] = both.value;
    slope[i] = both.slope;
  }
}

// The same branch for all threads; a kernel for each kind would take minutes to compile.
__device__ inline void apply(Activation kind, float (&v)[kChunk]) {
  switch (kind) {
    case Activation::relu:
    case Activation::reglu:
      return values<Relu>(v);
    case Activation::gelu:
    case Activation::geglu:
      return values<Gelu>(v);
    case Activation::gelu_tanh:
      return values<GeluTanh>(v);
    case Activation::silu:
    case Activation::swiglu:
      return values<Silu>(v);
  }
}

__device__ inline void apply(Activation kind, float (&v)[kChunk], float (&slope)[kChunk]) {
  switch (kind) {
    case Activation::relu:
    case Activation::reglu:
      return slopes<Relu>(v, slope);
    case Activation::gelu:
    case Activation::geglu:
      return slopes<Gelu>(v, slope);
    case Activation::gelu_tanh:
      return slopes<GeluTanh>(v, slope);
    case Activation::silu:
    case Activation::swiglu:
      return slopes<Silu>(v, slope);
  }
}

// x + bias.
template <bool kVector, class T>
__device__ inline void load_biased(const T* x, const float* bias, int64_t n, float (&v)[kChunk]) {
  load_chunk<kVector>(x, n, v);
  if (bias == nullptr) return;
  float b[kChunk];
  load_chunk<kVector>(bias, n, b);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v[i] += b[i];
}

template <class T, bool kGated, bool kVector>
__global__ void __launch_bounds__(kFlatThreads) forward_chunks(ActivationForwardCuda a) {
  const uint32_t across = static_cast<uint32_t>((a.columns + kChunk - 1) / kChunk);
  const uint32_t index = blockIdx.x * kFlatThreads + threadIdx.x;
  const int64_t row = index / across;
  if (row >= a.rows) return;
  const uint32_t chunk = index % across;
  const int64_t column = static_cast<int64_t>(chunk) * kChunk;
  const int64_t n = a.columns - column;
  const T* const x = static_cast<const T*>(a.x) + row * a.columns * (kGated ? 2 : 1) + column;
  const float* const bias = a.bias == nullptr ? nullptr : a.bias + column;
  float v[kChunk];
  load_biased<kVector>(x, bias, n, v);
  apply(a.kind, v);
  if constexpr (kGated) {
    float up[kChunk];
    load_biased<kVector>(x + a.columns, bias == nullptr ? nullptr : bias + a.columns, n, up);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] *= up[i];
  }
  if (a.dropout.threshold != 0) drop_chunk(read_dropout(a.dropout), row, chunk, v);
  store_chunk<kVector>(static_cast<T*>(a.out) + row * a.columns + column, n, v);
}

// One tile; the sums of its rows for the bias go to scratch[blockIdx.y][columns of x].
template <class T, bool kGated, bool kVector>
__global__ void __launch_bounds__(kTileThreads)
    backward_tiles(ActivationBackwardCuda a, int64_t rows_per_tile) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const int64_t column = chunk * kChunk;
  const int64_t n = a.columns - column;
  const int64_t begin = blockIdx.y * rows_per_tile;
  const int64_t end = begin + rows_per_tile < a.rows ? begin + rows_per_tile : a.rows;
  const int64_t x_columns = a.columns * (kGated ? 2 : 1);
  const bool relu = a.kind == Activation::relu;
  const float* const bias = a.bias == nullptr ? nullptr : a.bias + column;
  const Dropout dropout = read_dropout(a.dropout);
  float sums[kChunk] = {};
  float up_sums[kChunk] = {};
  if (n > 0) {
    for (int64_t row = begin + threadIdx.x / kWarp; row < end; row += kTileWarps) {
      const T* const x = static_cast<const T*>(a.x) + row * x_columns + column;
      T* const grad_x = static_cast<T*>(a.grad_x) + row * x_columns + column;
      float grad[kChunk];
      load_chunk<kVector>(static_cast<const T*>(a.grad) + row * a.columns + column, n, grad);
      float v[kChunk];
      if (!kGated && relu) {
        // From its output: grad * scale where that is not 0 (a NaN is not).
        load_chunk<kVector>(x, n, v);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) v[i] = v[i] == 0.0f ? 0.0f : grad[i] * dropout.scale;
      } else {
        if (dropout.threshold != 0) drop_chunk(dropout, row, chunk, grad);
        float slope[kChunk];
        load_biased<kVector>(x, bias, n, v);
        apply(a.kind, v, slope);
        if constexpr (kGated) {
          float up[kChunk];
          load_biased<kVector>(x + a.columns, bias == nullptr ? nullptr : bias + a.columns, n, up);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            const float to_up = grad[i] * v[i];
            v[i] = grad[i] * slope[i] * up[i];
            up[i] = to_up;
            up_sums[i] += to_up;
          }
          store_chunk<kVector>(grad_x + a.columns, n, up);
        } else {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) v[i] = grad[i] * slope[i];
        }
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sums[i] += v[i];
      store_chunk<kVector>(grad_x, n, v);
    }
  }
  if (a.grad_bias == nullptr) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileColumns;
  float* const partial = a.scratch + blockIdx.y * x_columns;
  add_warps(sums, first, a.columns, partial);
  if constexpr (kGated) add_warps(up_sums, first, a.columns, partial + a.columns);
}

template <class T, bool kVector>
void launch_forward(const ActivationForwardCuda& a, cudaStream_t stream) {
  launch(is_gated(a.kind) ? forward_chunks<T, true, kVector> : forward_chunks<T, false, kVector>,
         flat_blocks(a.rows, a.columns), kFlatThreads, 0, stream, a);
}

template <class T, bool kVector>
void launch_backward(const ActivationBackwardCuda& a, cudaStream_t stream) {
  const RowTiles tiles = row_tiles(a.rows, a.columns);
  launch(is_gated(a.kind) ? backward_tiles<T, true, kVector> : backward_tiles<T, false, kVector>,
         dim3(static_cast<unsigned>(divide_up(a.columns, kTileColumns)),
              static_cast<unsigned>(tiles.count)),
         kTileThreads, 0, stream, a, tiles.rows_per_tile);
  if (a.grad_bias == nullptr) return;
  const int64_t x_columns = a.columns * (is_gated(a.kind) ? 2 : 1);
  launch_add_partials(a.scratch, tiles.count, x_columns, x_columns, a.grad_bias, stream);
}

}  // namespace

int64_t activation_backward_scratch(int64_t rows, int64_t columns, Activation kind) {
  if (rows == 0 || columns == 0) return 0;
  return row_tiles(rows, columns).count * columns * (is_gated(kind) ? 2 : 1);
}

const char* activation_forward_cuda(const ActivationForwardCuda& a, FloatType type, void* stream) {
  if (a.rows == 0 || a.columns == 0) return nullptr;
  if (!fits_flat(a.rows, a.columns)) return "more than 2^35 elements or 2^31 - 1 rows";
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (vectors_fit(a.columns, a.x, a.bias, a.out)) {
      launch_forward<T, true>(a, on);
    } else {
      launch_forward<T, false>(a, on);
    }
  });
  return launch_error();
}

const char* activation_backward_cuda(const ActivationBackwardCuda& a, FloatType type,
                                     void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (a.rows == 0 || a.columns == 0) {
    if (a.grad_bias != nullptr && a.columns > 0) {
      const int64_t x_columns = a.columns * (is_gated(a.kind) ? 2 : 1);
      set_to_zero(a.grad_bias, static_cast<size_t>(x_columns) * sizeof(float), on);
    }
    return launch_error();
  }
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (vectors_fit(a.columns, a.grad, a.x, a.bias, a.grad_x)) {
      launch_backward<T, true>(a, on);
    } else {
      launch_backward<T, false>(a, on);
    }
  });
  return launch_error();
}

}  // namespace transformer_ext
