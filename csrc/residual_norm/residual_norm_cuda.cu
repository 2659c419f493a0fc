// Bytes a bfloat16 element, which bound all of these (weights and statistics lie in the cache):
//   residual_dropout  4 to 6: x, residual, out
//   forward           6 to 8: x, residual, sum, normed
//   backward          8 to 12: grad_normed, grad_sum, sum, grad_residual, grad_x
// Expected of copy bandwidth, not measured: 85 to 90 % forward; 75 to 85 % backward, where a warp
// holds a row twice and the sums of two parameters in registers, so that few warps run at a time.
// Dropout adds about 70 integer instructions for 8 elements, which stay below the time of their
// bytes on a GPU with less than 80 bytes a cycle and processor (H200: 20).
#include <cstdint>

#include "common/cuda_chunks.cuh"
#include "residual_norm/residual_norm_cuda.h"

namespace transformer_ext {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kRowThreads = kWarp * kWarpsPerBlock;
// Rows up to this length stay in the registers of a warp; longer ones take a block, which reads
// them again from the cache for each pass.
constexpr int64_t kMaxWarpColumns = 1024;
constexpr int kBlockThreads = 256;
// Gradients of the parameters are summed over at most so many blocks of rows (132 processors, 4
// blocks each), and these added up.
constexpr int64_t kMaxRowBlocks = 528;

template <class T, bool kVector>
__global__ void __launch_bounds__(kFlatThreads) dropout_chunks(ResidualDropoutCuda a) {
  const uint32_t across = static_cast<uint32_t>((a.columns + kChunk - 1) / kChunk);
  const uint32_t index = blockIdx.x * kFlatThreads + threadIdx.x;
  const int64_t row = index / across;
  if (row >= a.rows) return;
  const uint32_t chunk = index % across;
  const int64_t column = static_cast<int64_t>(chunk) * kChunk;
  const int64_t at = row * a.columns + column;
  const int64_t n = a.columns - column;
  float v[kChunk];
  load_chunk<kVector>(static_cast<const T*>(a.x) + at, n, v);
  if (a.dropout.threshold != 0) drop_chunk(read_dropout(a.dropout), row, chunk, v);
  if (a.residual != nullptr) {
    float residual[kChunk];
    load_chunk<kVector>(static_cast<const T*>(a.residual) + at, n, residual);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] += residual[i];
  }
  store_chunk<kVector>(static_cast<T*>(a.out) + at, n, v);
}

// A chunk of residual + dropout(x), as it is after rounding to T, and stored.
template <class T, bool kVector>
__device__ inline void sum_chunk(const ResidualNormForwardCuda& a, const Dropout& dropout,
                                 int64_t row, int64_t chunk, float (&v)[kChunk]) {
  const int64_t at = row * a.columns + chunk * kChunk;
  const int64_t n = a.columns - chunk * kChunk;
  load_chunk<kVector>(static_cast<const T*>(a.x) + at, n, v);
  if (dropout.threshold != 0) drop_chunk(dropout, row, chunk, v);
  if (a.residual != nullptr) {
    float residual[kChunk];
    load_chunk<kVector>(static_cast<const T*>(a.residual) + at, n, residual);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] += residual[i];
  }
  if (a.sum != nullptr) {
    store_chunk<kVector>(static_cast<T*>(a.sum) + at, n, v);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = to_float(from_float<T>(v[i]));
  }
}

// The parameters lie in the cache: scalars do where vectors would need alignment.
template <class T, bool kVector>
__device__ inline void norm_chunk(const ResidualNormForwardCuda& a, int64_t row, int64_t chunk,
                                  float mean, float rstd, float (&v)[kChunk]) {
  const int64_t column = chunk * kChunk;
  const int64_t n = a.columns - column;
  float parameter[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v[i] = (v[i] - mean) * rstd;
  if (a.weight != nullptr) {
    load_chunk<kVector>(a.weight + column, n, parameter);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] *= parameter[i];
  }
  if (a.bias != nullptr) {
    load_chunk<kVector>(a.bias + column, n, parameter);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] += parameter[i];
  }
  store_chunk<kVector>(static_cast<T*>(a.normed) + row * a.columns + column, n, v);
}

__device__ inline float chunk_sum(const float (&v)[kChunk]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Of the first n elements.
__device__ inline float chunk_squares(const float (&v)[kChunk], float mean, int64_t n) {
  float squares[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    squares[i] = i < n ? (v[i] - mean) * (v[i] - mean) : 0.0f;
  }
  return chunk_sum(squares);
}

// One warp a row, kItems chunks a lane.
template <class T, int kItems, bool kVector>
__global__ void __launch_bounds__(kRowThreads) forward_warp(ResidualNormForwardCuda a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= a.rows) return;
  const int lane = threadIdx.x % kWarp;
  const Dropout dropout = read_dropout(a.dropout);
  float v[kItems][kChunk];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int chunk = i * kWarp + lane;
    if (chunk * kChunk >= a.columns) continue;
    sum_chunk<T, kVector>(a, dropout, row, chunk, v[i]);
    sum += chunk_sum(v[i]);
  }
  const float columns = static_cast<float>(a.columns);
  const float mean = a.rms ? 0.0f : warp_reduce(sum, Sum{}) / columns;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int chunk = i * kWarp + lane;
    if (chunk * kChunk >= a.columns) continue;
    squares += chunk_squares(v[i], mean, a.columns - chunk * kChunk);
  }
  const float rstd = 1.0f / sqrtf(warp_reduce(squares, Sum{}) / columns + a.eps);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int chunk = i * kWarp + lane;
    if (chunk * kChunk >= a.columns) continue;
    norm_chunk<T, kVector>(a, row, chunk, mean, rstd, v[i]);
  }
  if (lane != 0) return;
  if (a.mean != nullptr) a.mean[row] = mean;
  if (a.rstd != nullptr) a.rstd[row] = rstd;
}

// One block a row. Each thread reads again what it has written itself.
template <class T, bool kVector>
__global__ void __launch_bounds__(kBlockThreads) forward_block(ResidualNormForwardCuda a) {
  const int64_t row = blockIdx.x;
  const int64_t chunks = (a.columns + kChunk - 1) / kChunk;
  const T* const line = static_cast<const T*>(a.sum != nullptr ? a.sum : a.x) + row * a.columns;
  const Dropout dropout = read_dropout(a.dropout);
  float v[kChunk];
  float sum = 0.0f;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kBlockThreads) {
    sum_chunk<T, kVector>(a, dropout, row, chunk, v);
    sum += chunk_sum(v);
  }
  const float columns = static_cast<float>(a.columns);
  const float mean = a.rms ? 0.0f : block_reduce<kBlockThreads>(sum, Sum{}) / columns;
  float squares = 0.0f;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kBlockThreads) {
    const int64_t n = a.columns - chunk * kChunk;
    load_chunk<kVector>(line + chunk * kChunk, n, v);
    squares += chunk_squares(v, mean, n);
  }
  const float rstd = 1.0f / sqrtf(block_reduce<kBlockThreads>(squares, Sum{}) / columns + a.eps);
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kBlockThreads) {
    load_chunk<kVector>(line + chunk * kChunk, a.columns - chunk * kChunk, v);
    norm_chunk<T, kVector>(a, row, chunk, mean, rstd, v);
  }
  if (threadIdx.x != 0) return;
  if (a.mean != nullptr) a.mean[row] = mean;
  if (a.rstd != nullptr) a.rstd[row] = rstd;
}

// With g = grad_normed * weight, h = (sum - mean) * rstd:
//   grad of sum = rstd * (g - mean(g) - h * mean(g * h)) + grad_sum     (RMSNorm: no mean(g))
//               = rstd * (g - mean_g - of_centred * (sum - mean)) + grad_sum
struct RowTerms {
  float mean;
  float rstd;
  float mean_g;
  float of_centred;
};

// The chunk's grad_normed and sum - mean, and what they add to the sums of g and g * centred.
template <class T, bool kVector>
__device__ inline void load_gradient(const ResidualNormBackwardCuda& a, int64_t row, int64_t chunk,
                                     float mean, float (&grad)[kChunk], float (&centred)[kChunk]) {
  const int64_t at = row * a.columns + chunk * kChunk;
  const int64_t n = a.columns - chunk * kChunk;
  load_chunk<kVector>(static_cast<const T*>(a.grad_normed) + at, n, grad);
  load_chunk<kVector>(static_cast<const T*>(a.sum) + at, n, centred);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) centred[i] -= mean;
}

template <bool kVector>
__device__ inline void load_weight(const ResidualNormBackwardCuda& a, int64_t chunk,
                                   float (&weight)[kChunk]) {
  if (a.weight != nullptr) {
    load_chunk<kVector>(a.weight + chunk * kChunk, a.columns - chunk * kChunk, weight);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) weight[i] = 1.0f;
  }
}

template <class T, bool kVector>
__device__ inline void store_gradient(const ResidualNormBackwardCuda& a, const Dropout& dropout,
                                      int64_t row, int64_t chunk, const RowTerms& terms,
                                      const float (&grad)[kChunk], const float (&centred)[kChunk],
                                      const float (&weight)[kChunk]) {
  const int64_t at = row * a.columns + chunk * kChunk;
  const int64_t n = a.columns - chunk * kChunk;
  float v[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    v[i] = (grad[i] * weight[i] - terms.mean_g - terms.of_centred * centred[i]) * terms.rstd;
  }
  if (a.grad_sum != nullptr) {
    float more[kChunk];
    load_chunk<kVector>(static_cast<const T*>(a.grad_sum) + at, n, more);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] += more[i];
  }
  store_chunk<kVector>(static_cast<T*>(a.grad_residual) + at, n, v);
  if (dropout.threshold != 0) {
    drop_chunk(dropout, row, chunk, v);
    store_chunk<kVector>(static_cast<T*>(a.grad_x) + at, n, v);
  }
}

// Adds g and g * centred of the chunk; past the row grad is 0.
__device__ inline void add_terms(const float (&grad)[kChunk], const float (&centred)[kChunk],
                                 const float (&weight)[kChunk], float& g_sum, float& gc_sum) {
  float g[kChunk];
  float gc[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    g[i] = grad[i] * weight[i];
    gc[i] = g[i] * centred[i];
  }
  g_sum += chunk_sum(g);
  gc_sum += chunk_sum(gc);
}

__device__ inline RowTerms row_terms(const ResidualNormBackwardCuda& a, float mean, float rstd,
                                     float g_sum, float gc_sum) {
  const float columns = static_cast<float>(a.columns);
  return {mean, rstd, a.rms ? 0.0f : g_sum / columns, gc_sum * rstd / columns * rstd};
}

// Rows blockIdx.x * rows_per_block and on, in turn for the warps; the sums of the block's rows for
// weight and bias go to scratch[blockIdx.x][2][columns].
template <class T, int kItems, bool kVector>
__global__ void __launch_bounds__(kRowThreads)
    backward_warp(ResidualNormBackwardCuda a, int64_t rows_per_block) {
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = blockIdx.x * rows_per_block;
  const int64_t end = begin + rows_per_block < a.rows ? begin + rows_per_block : a.rows;
  const Dropout dropout = read_dropout(a.dropout);
  float weight_sum[kItems][kChunk] = {};
  float bias_sum[kItems][kChunk] = {};
  for (int64_t row = begin + threadIdx.x / kWarp; row < end; row += kWarpsPerBlock) {
    const float mean = a.mean == nullptr ? 0.0f : a.mean[row];
    const float rstd = a.rstd[row];
    float grad[kItems][kChunk];
    float centred[kItems][kChunk];
    float weight[kChunk];
    float g_sum = 0.0f;
    float gc_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int chunk = i * kWarp + lane;
      if (chunk * kChunk >= a.columns) continue;
      load_gradient<T, kVector>(a, row, chunk, mean, grad[i], centred[i]);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int chunk = i * kWarp + lane;
      if (chunk * kChunk >= a.columns) continue;
      load_weight<kVector>(a, chunk, weight);
      add_terms(grad[i], centred[i], weight, g_sum, gc_sum);
    }
    g_sum = warp_reduce(g_sum, Sum{});
    gc_sum = warp_reduce(gc_sum, Sum{});
    const RowTerms terms = row_terms(a, mean, rstd, g_sum, gc_sum);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int chunk = i * kWarp + lane;
      if (chunk * kChunk >= a.columns) continue;
      load_weight<kVector>(a, chunk, weight);
      store_gradient<T, kVector>(a, dropout, row, chunk, terms, grad[i], centred[i], weight);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        weight_sum[i][j] += grad[i][j] * rstd * centred[i][j];
        bias_sum[i][j] += grad[i][j];
      }
    }
  }

  constexpr int kWidth = kItems * kWarp * kChunk;
  TRANSFORMER_EXT_SHARED(float, sums, kWarpsPerBlock* kWidth);
  for (int which = 0; which < 2; ++which) {
    if ((which == 0 ? a.grad_weight : a.grad_bias) == nullptr) continue;
    __syncthreads();  // the last use of `sums` is over
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        sums[threadIdx.x / kWarp * kWidth + (i * kWarp + lane) * kChunk + j] =
            which == 0 ? weight_sum[i][j] : bias_sum[i][j];
      }
    }
    __syncthreads();
    float* const partial = a.scratch + (blockIdx.x * 2 + which) * a.columns;
    for (int c = threadIdx.x; c < a.columns; c += kRowThreads) {
      float total = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarpsPerBlock; ++warp) total += sums[warp * kWidth + c];
      partial[c] = total;
    }
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kBlockThreads) backward_block(ResidualNormBackwardCuda a) {
  const int64_t row = blockIdx.x;
  const int64_t chunks = (a.columns + kChunk - 1) / kChunk;
  const Dropout dropout = read_dropout(a.dropout);
  const float mean = a.mean == nullptr ? 0.0f : a.mean[row];
  const float rstd = a.rstd[row];
  float grad[kChunk];
  float centred[kChunk];
  float weight[kChunk];
  float g_sum = 0.0f;
  float gc_sum = 0.0f;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kBlockThreads) {
    load_gradient<T, kVector>(a, row, chunk, mean, grad, centred);
    load_weight<kVector>(a, chunk, weight);
    add_terms(grad, centred, weight, g_sum, gc_sum);
  }
  g_sum = block_reduce<kBlockThreads>(g_sum, Sum{});
  gc_sum = block_reduce<kBlockThreads>(gc_sum, Sum{});
  const RowTerms terms = row_terms(a, mean, rstd, g_sum, gc_sum);
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kBlockThreads) {
    load_gradient<T, kVector>(a, row, chunk, mean, grad, centred);
    load_weight<kVector>(a, chunk, weight);
    store_gradient<T, kVector>(a, dropout, row, chunk, terms, grad, centred, weight);
  }
}

// The sums for weight and bias of one tile, where no warp holds a row.
template <class T, bool kVector>
__global__ void __launch_bounds__(kTileThreads)
    backward_parameters(ResidualNormBackwardCuda a, int64_t rows_per_tile) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const int64_t begin = blockIdx.y * rows_per_tile;
  const int64_t end = begin + rows_per_tile < a.rows ? begin + rows_per_tile : a.rows;
  float weight_sum[kChunk] = {};
  float bias_sum[kChunk] = {};
  if (chunk * kChunk < a.columns) {
    for (int64_t row = begin + threadIdx.x / kWarp; row < end; row += kTileWarps) {
      const float rstd = a.rstd[row];
      float grad[kChunk];
      float centred[kChunk];
      load_gradient<T, kVector>(a, row, chunk, a.mean == nullptr ? 0.0f : a.mean[row], grad,
                                centred);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        weight_sum[i] += grad[i] * rstd * centred[i];
        bias_sum[i] += grad[i];
      }
    }
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileColumns;
  float* const partial = a.scratch + static_cast<int64_t>(blockIdx.y) * 2 * a.columns;
  add_warps(weight_sum, first, a.columns, partial);
  add_warps(bias_sum, first, a.columns, partial + a.columns);
}

struct RowBlocks {
  int64_t rows_per_block;
  int64_t count;
};

RowBlocks row_blocks(int64_t rows) {
  int64_t per_block = divide_up(rows, kMaxRowBlocks);
  per_block = divide_up(per_block > 0 ? per_block : 1, kWarpsPerBlock) * kWarpsPerBlock;
  return {per_block, divide_up(rows, per_block)};
}

template <class T, bool kVector>
void launch_forward(const ResidualNormForwardCuda& a, cudaStream_t stream) {
  if (a.columns > kMaxWarpColumns) {
    launch(forward_block<T, kVector>, static_cast<unsigned>(a.rows), kBlockThreads, 0, stream, a);
    return;
  }
  const unsigned blocks = static_cast<unsigned>(divide_up(a.rows, kWarpsPerBlock));
  const auto kernel = a.columns <= 256   ? forward_warp<T, 1, kVector>
                      : a.columns <= 512 ? forward_warp<T, 2, kVector>
                                         : forward_warp<T, 4, kVector>;
  launch(kernel, blocks, kRowThreads, 0, stream, a);
}

template <class T, bool kVector>
void launch_backward(const ResidualNormBackwardCuda& a, cudaStream_t stream) {
  int64_t partials;
  if (a.columns > kMaxWarpColumns) {
    launch(backward_block<T, kVector>, static_cast<unsigned>(a.rows), kBlockThreads, 0, stream, a);
    const RowTiles tiles = row_tiles(a.rows, a.columns);
    partials = tiles.count;
    if (a.grad_weight != nullptr || a.grad_bias != nullptr) {
      launch(backward_parameters<T, kVector>,
             dim3(static_cast<unsigned>(divide_up(a.columns, kTileColumns)),
                  static_cast<unsigned>(tiles.count)),
             kTileThreads, 0, stream, a, tiles.rows_per_tile);
    }
  } else {
    const RowBlocks blocks = row_blocks(a.rows);
    partials = blocks.count;
    const auto kernel = a.columns <= 256   ? backward_warp<T, 1, kVector>
                        : a.columns <= 512 ? backward_warp<T, 2, kVector>
                                           : backward_warp<T, 4, kVector>;
    launch(kernel, static_cast<unsigned>(blocks.count), kRowThreads, 0, stream, a,
           blocks.rows_per_block);
  }
  if (a.grad_weight != nullptr) {
    launch_add_partials(a.scratch, partials, 2 * a.columns, a.columns, a.grad_weight, stream);
  }
  if (a.grad_bias != nullptr) {
    launch_add_partials(a.scratch + a.columns, partials, 2 * a.columns, a.columns, a.grad_bias,
                        stream);
  }
}

}  // namespace

int64_t residual_norm_backward_scratch(int64_t rows, int64_t columns) {
  if (rows == 0 || columns == 0) return 0;
  const int64_t partials =
      columns > kMaxWarpColumns ? row_tiles(rows, columns).count : row_blocks(rows).count;
  return partials * 2 * columns;
}

const char* residual_dropout_cuda(const ResidualDropoutCuda& a, FloatType type, void* stream) {
  if (a.rows == 0 || a.columns == 0) return nullptr;
  if (!fits_flat(a.rows, a.columns)) return "more than 2^35 elements or 2^31 - 1 rows";
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = vectors_fit(a.columns, a.x, a.residual, a.out) ? dropout_chunks<T, true>
                                                                       : dropout_chunks<T, false>;
    launch(kernel, flat_blocks(a.rows, a.columns), kFlatThreads, 0, on, a);
  });
  return launch_error();
}

const char* residual_norm_forward_cuda(const ResidualNormForwardCuda& a, FloatType type,
                                       void* stream) {
  if (a.rows == 0 || a.columns == 0) return nullptr;
  if (a.rows > INT32_MAX) return "more than 2^31 - 1 rows";
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (vectors_fit(a.columns, a.x, a.residual, a.weight, a.bias, a.sum, a.normed)) {
      launch_forward<T, true>(a, on);
    } else {
      launch_forward<T, false>(a, on);
    }
  });
  return launch_error();
}

const char* residual_norm_backward_cuda(const ResidualNormBackwardCuda& a, FloatType type,
                                        void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (a.rows == 0 || a.columns == 0) {
    for (float* const out : {a.grad_weight, a.grad_bias}) {
      if (out != nullptr && a.columns > 0) {
        set_to_zero(out, static_cast<size_t>(a.columns) * sizeof(float), on);
      }
    }
    return launch_error();
  }
  if (a.rows > INT32_MAX) return "more than 2^31 - 1 rows";
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (vectors_fit(a.columns, a.grad_normed, a.grad_sum, a.sum, a.weight, a.grad_x,
                    a.grad_residual)) {
      launch_backward<T, true>(a, on);
    } else {
      launch_backward<T, false>(a, on);
    }
  });
  return launch_error();
}

}  // namespace transformer_ext
