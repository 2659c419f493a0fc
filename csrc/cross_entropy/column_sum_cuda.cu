// Reads each element once (2 bytes in bfloat16). Expected of the bandwidth of reading, not
// measured: 85 %.
#include <cstdint>

#include "common/cuda_chunks.cuh"
#include "cross_entropy/column_sum_cuda.h"

namespace transformer_ext {
namespace {

template <class T, bool kVector>
__global__ void __launch_bounds__(kTileThreads) sum_tiles(ColumnSumCuda a, int64_t rows_per_tile) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp) * kChunk;
  const int64_t begin = blockIdx.y * rows_per_tile;
  const int64_t end = begin + rows_per_tile < a.rows ? begin + rows_per_tile : a.rows;
  float sums[kChunk] = {};
  if (column < a.columns) {
#pragma unroll 4
    for (int64_t row = begin + threadIdx.x / kWarp; row < end; row += kTileWarps) {
      float v[kChunk];
      load_chunk<kVector>(static_cast<const T*>(a.x) + row * a.stride + column, a.columns - column,
                          v);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sums[i] += v[i];
    }
  }
  add_warps(sums, static_cast<int64_t>(blockIdx.x) * kTileColumns, a.columns,
            a.scratch + blockIdx.y * a.columns);
}

}  // namespace

int64_t column_sum_scratch(int64_t rows, int64_t columns) {
  return rows == 0 || columns == 0 ? 0 : row_tiles(rows, columns).count * columns;
}

const char* column_sum_cuda(const ColumnSumCuda& a, FloatType type, void* stream) {
  if (a.columns == 0) return nullptr;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const RowTiles tiles = row_tiles(a.rows, a.columns);
  const int64_t partials = a.rows == 0 ? 0 : tiles.count;
  if (partials > 0) {
    with_type(type, [&](auto zero) {
      using T = decltype(zero);
      const bool vectors = vectors_fit(a.columns, a.x) && a.stride % kChunk == 0;
      launch(vectors ? sum_tiles<T, true> : sum_tiles<T, false>,
             dim3(static_cast<unsigned>(divide_up(a.columns, kTileColumns)),
                  static_cast<unsigned>(tiles.count)),
             kTileThreads, 0, on, a, tiles.rows_per_tile);
    });
  }
  launch(a.accumulate ? add_partials<true> : add_partials<false>,
         static_cast<unsigned>(divide_up(a.columns, kWarp)), kAddThreads, 0, on,
         static_cast<const float*>(a.scratch), partials, a.columns, a.columns, a.out);
  return launch_error();
}

}  // namespace transformer_ext
