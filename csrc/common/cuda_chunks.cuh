// Rows in chunks of 8 neighbouring columns: what one Philox counter serves, and 16 bytes of
// bfloat16. And sums over rows, in an order that the problem alone decides. For *.cu only.
#pragma once

#include "common/cuda.cuh"
#include "common/float_type.h"
#include "dropout/dropout_cuda.h"

namespace transformer_ext {
namespace {

constexpr int kChunk = 8;

// kVector: whole chunks by vectors of 16 bytes. Else element by element, the first n of them.
template <bool kVector, class T>
__device__ inline void load_chunk(const T* p, int64_t n, float (&v)[kChunk]) {
  if constexpr (kVector) {
    constexpr int kEach = 16 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kChunk; i += kEach) {
      const Vector<T, kEach> part = *reinterpret_cast<const Vector<T, kEach>*>(p + i);
#pragma unroll
      for (int j = 0; j < kEach; ++j) v[i + j] = to_float(part.values[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = i < n ? to_float(p[i]) : 0.0f;
  }
}

template <bool kVector, class T>
__device__ inline void store_chunk(T* p, int64_t n, const float (&v)[kChunk]) {
  if constexpr (kVector) {
    constexpr int kEach = 16 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kChunk; i += kEach) {
      Vector<T, kEach> part;
#pragma unroll
      for (int j = 0; j < kEach; ++j) part.values[j] = from_float<T>(v[i + j]);
      *reinterpret_cast<Vector<T, kEach>*>(p + i) = part;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < n) p[i] = from_float<T>(v[i]);
    }
  }
}

// dropout.threshold must be above 0. What is dropped becomes 0, a NaN too.
__device__ inline void drop_chunk(const Dropout& dropout, int64_t row, int64_t chunk,
                                  float (&v)[kChunk]) {
  const PhiloxWords words =
      dropout_words(dropout, static_cast<uint32_t>(row), static_cast<uint32_t>(chunk));
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    v[i] = dropout_value(words, i) >= dropout.threshold ? v[i] * dropout.scale : 0.0f;
  }
}

// Whether chunks can be read and written as vectors: a null pointer is no hindrance.
template <class... Pointers>
bool vectors_fit(int64_t columns, Pointers... pointers) {
  return columns % kChunk == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One thread for each chunk of a matrix, in 32 bits: a 64-bit division a chunk would cost as much
// as its memory traffic.
constexpr int kFlatThreads = 256;
inline bool fits_flat(int64_t rows, int64_t columns) {
  return rows * divide_up(columns, kChunk) <= INT64_C(0xffffff00) && rows <= INT32_MAX;
}
inline unsigned flat_blocks(int64_t rows, int64_t columns) {
  return static_cast<unsigned>(divide_up(rows * divide_up(columns, kChunk), kFlatThreads));
}

// ---- Sums over rows -----------------------------------------------------------------------------

// A tile: 256 columns (a warp, a chunk a lane) and a block of rows that 8 warps take in turn.
constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarp;
constexpr int kTileColumns = kWarp * kChunk;

struct RowTiles {
  int64_t rows_per_tile;
  int64_t count;
};

// As many as keep 132 processors busy (8 blocks each, twice over), each of at least 32 rows; a
// number that depends on the GPU would make its results depend on it.
inline RowTiles row_tiles(int64_t rows, int64_t columns) {
  const int64_t across = divide_up(columns, kTileColumns);
  int64_t count = divide_up(2048, across > 0 ? across : 1);
  if (count > divide_up(rows, 32)) count = divide_up(rows, 32);
  if (count < 1) count = 1;
  const int64_t per_tile = divide_up(rows, count);
  return {per_tile, per_tile > 0 ? divide_up(rows, per_tile) : 1};
}

// partials[column] = sum over the warps, in their order, of their sums of a tile's columns. All
// threads of the block must come.
__device__ inline void add_warps(const float (&sums)[kChunk], int64_t first_column, int64_t columns,
                                 float* partials) {
  TRANSFORMER_EXT_SHARED(float, tile, kTileWarps* kTileColumns);
  __syncthreads();  // the last use of `tile` is over
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    tile[threadIdx.x / kWarp * kTileColumns + threadIdx.x % kWarp * kChunk + i] = sums[i];
  }
  __syncthreads();
  const int64_t column = first_column + threadIdx.x;
  if (column >= columns) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kTileWarps; ++warp) total += tile[warp * kTileColumns + threadIdx.x];
  partials[column] = total;
}

// out[c] (+)= sum of partials[i * stride + c] over i: 32 warps take every 32nd, and are added up in
// their order.
constexpr int kAddThreads = 1024;
template <bool kAccumulate>
__global__ void __launch_bounds__(kAddThreads)
    add_partials(const float* partials, int64_t count, int64_t stride, int64_t columns,
                 float* out) {
  constexpr int kSlices = kAddThreads / kWarp;
  TRANSFORMER_EXT_SHARED(float, slices, kAddThreads);
  const int lane = threadIdx.x % kWarp;
  const int slice = threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t i = slice; i < count; i += kSlices) sum += partials[i * stride + column];
  }
  slices[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || column >= columns) return;
  float total = 0.0f;
  for (int i = 0; i < kSlices; ++i) total += slices[i * kWarp + lane];
  out[column] = kAccumulate ? out[column] + total : total;
}

inline void launch_add_partials(const float* partials, int64_t count, int64_t stride,
                                int64_t columns, float* out, cudaStream_t stream) {
  launch(add_partials<false>, static_cast<unsigned>(divide_up(columns, kWarp)), kAddThreads, 0,
         stream, partials, count, stride, columns, out);
}

// Calls f(T{}) for the type.
template <class F>
void with_type(FloatType type, F&& f) {
  switch (type) {
    case FloatType::float32:
      f(float{});
      break;
    case FloatType::bfloat16:
      f(__nv_bfloat16{});
      break;
    case FloatType::float16:
      f(__half{});
      break;
  }
}

}  // namespace
}  // namespace transformer_ext
