// A warp has 16 rows of one side. Its scores, weights and sums stay in registers: the weights of a
// product are, rounded, what the next one takes. In shared memory are tiles of the tensors as they
// are, brought by cp.async. Nothing is added up by atomics: results are the same bits in every run.
//
// Weights of 0 take part in the products: a NaN or an infinity in a value reaches the rows that
// share a tile of 16 keys with it, although a causal mask hides it from them. What lies behind the
// end of a sequence is read as 0.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "attention/attention_cuda.cuh"
#include "attention/attention_tensor_cuda.h"
#include "common/tensor_cores.cuh"

namespace transformer_ext {
namespace {

constexpr int kSide = 16;          // rows of a warp; keys of a step
constexpr int kForwardWarps = 4;   // at most
constexpr int kTile = 64;          // keys in shared memory at once, twice
constexpr int kForwardRows = 256;  // of queries, that a block takes one after another
constexpr size_t kUsualShared = 48 * 1024;

template <int kDim>
constexpr int kRowStride = kDim + 8;  // in shared memory: see load_a

__host__ __device__ inline int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ inline int in_sides(int n) { return (n + kSide - 1) / kSide; }

#if defined(TRANSFORMER_EXT_TENSOR_CORES)

// `count` rows into shared memory and zeros behind them up to a multiple of kSide, by `threads`
// threads of which this is `thread`.
template <int kDim, class T>
__device__ inline void copy_rows(T* to, const T* from, int64_t token_stride, int count, int thread,
                                 int threads) {
  constexpr int kChunks = kDim / 8;
  for (int i = thread; i < in_sides(count) * kSide * kChunks; i += threads) {
    const int row = i / kChunks;
    const int column = i % kChunks * 8;
    const bool inside = row < count;
    copy_async(to + row * kRowStride<kDim> + column,
               from + (inside ? row * token_stride + column : 0), inside);
  }
}

// 16 rows in the layout of C, times a factor for each of the lane's two, to `to`, through the
// warp's own `staging`: 16 bytes a lane instead of 4.
template <int kDim, class T>
__device__ inline void store_rows(const float (&x)[kDim / 8][4], const float (&factors)[2],
                                  int count, T* staging, T* to, int64_t token_stride) {
  constexpr int kChunks = kDim / 8;
  constexpr int kStride = kRowStride<kDim>;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      *reinterpret_cast<uint32_t*>(staging + (lane / 4 + 8 * r) * kStride + 8 * j + lane % 4 * 2) =
          pack<T>(x[j][2 * r] * factors[r], x[j][2 * r + 1] * factors[r]);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < kSide * kChunks; i += kWarp) {
    const int row = i / kChunks;
    const int column = i % kChunks * 8;
    if (row < count) {
      *reinterpret_cast<uint4*>(to + row * token_stride + column) =
          *reinterpret_cast<const uint4*>(staging + row * kStride + column);
    }
  }
}

// There is memory for max_key_length keys.
__device__ inline Sequence bounded_sequence_of(const AttentionArgs& a, int64_t b) {
  Sequence s = sequence_of(a, b);
  s.keys = least(s.keys, static_cast<int>(a.max_key_length));
  return s;
}

// Over the four lanes that share a row.
template <class Op>
__device__ inline float row_reduce(float x, Op op) {
  x = op(x, __shfl_xor_sync(kAllLanes, x, 1));
  return op(x, __shfl_xor_sync(kAllLanes, x, 2));
}

#endif

struct ForwardPlan {
  int tiles;      // blocks for a head of a sequence
  int rows;       // of queries, of a block
  int tile_rows;  // of keys and of values, that there is memory for in a tile
};

// A block has up to plan.rows queries of a head and takes them by 16 for each of its warps. Two
// tiles of keys and values are in memory at once: both stay if there are no more.
template <class T, int kDim>
__global__ void __launch_bounds__(kForwardWarps* kWarp, kDim <= 64 ? 4 : 2)
    forward_kernel(AttentionArgs a, CudaDropout dropout_argument, ForwardPlan plan) {
#if defined(TRANSFORMER_EXT_TENSOR_CORES)
  constexpr int kStride = kRowStride<kDim>;
  constexpr int kSteps = kTile / kSide;
  TRANSFORMER_EXT_DYNAMIC_SHARED(memory);
  const int threads = static_cast<int>(blockDim.x);
  const int warps = threads / kWarp;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  T* const own = reinterpret_cast<T*>(memory) + warp * kSide * kStride;
  T* const tiles = reinterpret_cast<T*>(memory) + warps * kSide * kStride;

  const Place place = place_of(plan.tiles, a.heads);
  const Sequence s = bounded_sequence_of(a, place.b);
  const int block_first = place.tile * plan.rows;
  if (block_first >= s.queries) return;
  const int block_last = least(block_first + plan.rows, s.queries);
  const bool packed = a.cu_seqlens_q != nullptr;
  const int64_t h = place.head;
  const int64_t kv_head = h / (a.heads / a.kv_heads);
  const T* const all_keys = row_of<const T>(a.key, packed, place.b, s.key_row, kv_head);
  const T* const all_values = row_of<const T>(a.value, packed, place.b, s.key_row, kv_head);
  const Dropout dropout = read_dropout(dropout_argument);
  const float factor = a.scale * kLog2e;
  const int block_keys = a.causal ? least(s.keys, block_last) : s.keys;
  const bool resident = block_keys <= 2 * kTile;

  const auto tile_at = [&](int tile) { return tiles + tile % 2 * 2 * plan.tile_rows * kStride; };
  const auto copy_tile = [&](int tile, int keys) {
    if (tile * kTile >= keys) return;
    const int count = least(keys - tile * kTile, kTile);
    copy_rows<kDim>(tile_at(tile), all_keys + tile * kTile * a.key.token_stride, a.key.token_stride,
                    count, threadIdx.x, threads);
    copy_rows<kDim>(tile_at(tile) + plan.tile_rows * kStride,
                    all_values + tile * kTile * a.value.token_stride, a.value.token_stride, count,
                    threadIdx.x, threads);
  };

  for (int first = block_first; first < block_last; first += warps * kSide) {
    const int mine = first + warp * kSide;
    const bool active = mine < s.queries;
    const bool load = first == block_first || !resident;
    const int keys = a.causal && !resident ? least(s.keys, first + warps * kSide) : block_keys;
    if (first != block_first) __syncwarp();  // the results of the former round are out of `own`
    if (active) {
      copy_rows<kDim>(own, row_of<const T>(a.query, packed, place.b, s.query_row + mine, h),
                      a.query.token_stride, least(s.queries - mine, kSide), lane, kWarp);
    }
    if (load) {
      if (first != block_first) __syncthreads();  // all are done with the former tiles
      copy_tile(0, keys);
      end_copies();
      copy_tile(1, keys);
    }
    end_copies();

    float out[kDim / 8][4] = {};
    float top[2] = {minus_infinity(), minus_infinity()};
    float sum[2] = {0.0f, 0.0f};
    int row_end[2];  // of the keys that a row may attend to
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_end[r] = a.causal ? least(s.keys, mine + lane / 4 + 8 * r + 1) : s.keys;
    }
    const int64_t dropout_row = token_of(a, s, place.b, mine + lane / 4) * a.heads + h;
    for (int tile = 0; tile * kTile < keys; ++tile) {
      if (load) {
        wait_for_copies<1>();
        __syncthreads();
      } else if (tile == 0) {
        wait_for_copies<0>();
        __syncwarp();
      }
      const int begin = tile * kTile;
      const int end = least(a.causal ? least(keys, mine + kSide) : keys, begin + kTile);
      if (active && end > begin) {
        const T* const tile_keys = tile_at(tile);
        const T* const tile_values = tile_keys + plan.tile_rows * kStride;
        const int steps = in_sides(end - begin);
        float scores[2 * kSteps][4];
#pragma unroll
        for (int j = 0; j < 2 * kSteps; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) scores[j][e] = 0.0f;
        }
#pragma unroll
        for (int k = 0; k < kDim / kSide; ++k) {
          // Held over the loop instead, the queries cost registers that there are not.
          uint32_t query[4];
          load_a(own + k * kSide, kStride, query);
#pragma unroll
          for (int n = 0; n < kSteps; ++n) {
            if (n >= steps) continue;
            uint32_t b[4];
            load_b_transposed(tile_keys + n * kSide * kStride + k * kSide, kStride, b);
            multiply_add<T>(scores[2 * n], query, b[0], b[1]);
            multiply_add<T>(scores[2 * n + 1], query, b[2], b[3]);
          }
        }
        float higher[2] = {top[0], top[1]};
#pragma unroll
        for (int j = 0; j < 2 * kSteps; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int column = begin + 8 * j + lane % 4 * 2 + e % 2;
            scores[j][e] = column < row_end[e / 2] ? scores[j][e] * factor : minus_infinity();
            higher[e / 2] = fmaxf(higher[e / 2], scores[j][e]);
          }
        }
        float shift[2];
        float former[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          higher[r] = row_reduce(higher[r], Max{});
          // Without a maximum (only masked keys and NaN) 0 lets a NaN through.
          shift[r] = higher[r] == minus_infinity() ? 0.0f : higher[r];
          former[r] = top[r] == minus_infinity() ? 0.0f : exp2f(top[r] - shift[r]);
          // Where there was no maximum yet, the sum holds nothing but NaN.
          if (top[r] != minus_infinity()) sum[r] *= former[r];
          top[r] = higher[r];
        }
#pragma unroll
        for (int j = 0; j < 2 * kSteps; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            scores[j][e] = exp2f(scores[j][e] - shift[e / 2]);
            sum[e / 2] += scores[j][e];
          }
        }
        if (dropout.threshold != 0) {
          // A counter of dropout serves a row's 8 keys of one C: each of the four lanes makes those
          // of another C, and gets two bits from each.
          unsigned bits = 0;
#pragma unroll
          for (int i = 0; i < kSteps / 2; ++i) {
            if (2 * i < steps) {
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                bits |=
                    kept_bits(dropout, dropout_row + 8 * r * a.heads, begin / 8 + 4 * i + lane % 4)
                    << (16 * i + 8 * r);
              }
            }
          }
#pragma unroll
          for (int source = 0; source < 4; ++source) {
            const unsigned theirs =
                __shfl_sync(kAllLanes, bits, (lane & ~3) + source) >> (lane % 4 * 2);
#pragma unroll
            for (int i = 0; i < kSteps / 2; ++i) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                if ((theirs >> (16 * i + 8 * (e / 2) + e % 2) & 1u) == 0) {
                  scores[4 * i + source][e] = 0.0f;
                }
              }
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[j][e] *= former[e / 2];
        }
#pragma unroll
        for (int n = 0; n < kSteps; ++n) {
          if (n >= steps) continue;
          uint32_t weights[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            weights[i] =
                pack<T>(scores[2 * n + i / 2][i % 2 * 2], scores[2 * n + i / 2][i % 2 * 2 + 1]);
          }
#pragma unroll
          for (int d = 0; d < kDim / kSide; ++d) {
            uint32_t b[4];
            load_b(tile_values + n * kSide * kStride + d * kSide, kStride, b);
            multiply_add<T>(out[2 * d], weights, b[0], b[1]);
            multiply_add<T>(out[2 * d + 1], weights, b[2], b[3]);
          }
        }
      }
      if (load && (tile + 2) * kTile < keys) {
        __syncthreads();  // all are done with this tile
        copy_tile(tile + 2, keys);
      }
      if (load) end_copies();
    }
    wait_for_copies<0>();
    if (!active) continue;
    __syncwarp();  // `own` is read
    float factors[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = row_reduce(sum[r], Sum{});
      const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
      factors[r] = inverse * (dropout.threshold == 0 ? 1.0f : dropout.scale);
      const int query_row = mine + lane / 4 + 8 * r;
      if (lane % 4 == 0 && query_row < s.queries && a.statistics != nullptr) {
        const int64_t index = statistics_index(a, s, place.b, h, query_row);
        a.statistics[index] = top[r] == minus_infinity() ? 0.0f : top[r];
        a.statistics[index + statistics_half(a)] = inverse;
      }
    }
    store_rows<kDim>(out, factors, least(s.queries - mine, kSide), own,
                     row_of<T>(a.out, packed, place.b, s.query_row + mine, h), a.out.token_stride);
  }
#endif
}

bool aligned(const AttentionTensor& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride % 8 == 0 &&
         x.token_stride % 8 == 0 && x.head_stride % 8 == 0;
}

// Launches `blocks` blocks, if any.
template <class... Parameters, class... Arguments>
const char* launch_blocks(void (*kernel)(Parameters...), int64_t blocks, int warps, size_t bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more than 2^31 - 1 tiles of rows";
  if (bytes > kUsualShared) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  launch(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarp), bytes, stream,
         arguments...);
  return launch_error();
}

template <class T, int kDim>
const char* forward(const AttentionArgs& a, const CudaDropout& dropout, cudaStream_t stream) {
  zero_slack<T>(a.out, a.cu_seqlens_q, a.batch, a.query_length, a.heads, a.head_dim, stream);
  const int sides = in_sides(static_cast<int>(a.max_query_length));
  const int warps = sides <= 1 ? 1 : sides <= 2 ? 2 : kForwardWarps;
  ForwardPlan plan{};
  // Few and long sequences: more blocks, though each reads the keys again. 1024 keep 132 processors
  // busy; what a row's result is does not depend on it.
  plan.rows = warps * kSide;
  if (a.batch * a.heads * ((a.max_query_length + kForwardRows - 1) / kForwardRows) >= 1024) {
    plan.rows = kForwardRows;
  }
  plan.tiles = static_cast<int>((a.max_query_length + plan.rows - 1) / plan.rows);
  plan.tile_rows = least(kTile, in_sides(static_cast<int>(a.max_key_length)) * kSide);
  const int tiles = a.max_key_length > kTile ? 2 : 1;
  const size_t rows = static_cast<size_t>(warps * kSide + 2 * tiles * plan.tile_rows);
  return launch_blocks(forward_kernel<T, kDim>, plan.tiles * a.heads * a.batch, warps,
                       rows * kRowStride<kDim> * sizeof(T), stream, a, dropout, plan);
}

// Whether the code that would run was made for a GPU with these instructions.
bool has_instructions() {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, forward_kernel<__nv_bfloat16, 64>) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.ptxVersion >= 80;
}

// Calls run(type, head_dim).
template <class F>
const char* by_type(FloatType type, int64_t head_dim, F&& run) {
  const auto by_width = [&](auto element) -> const char* {
    switch (head_dim) {
      case 32:
        return run(element, std::integral_constant<int, 32>{});
      case 64:
        return run(element, std::integral_constant<int, 64>{});
      default:
        return run(element, std::integral_constant<int, 128>{});
    }
  };
  return type == FloatType::bfloat16 ? by_width(Same<__nv_bfloat16>{}) : by_width(Same<__half>{});
}

}  // namespace

bool attention_forward_has_tensor_cores(const AttentionArgs& a, FloatType type) {
  if (type == FloatType::float32 || a.mask != nullptr || a.bias != nullptr) return false;
  if (a.head_dim != 32 && a.head_dim != 64 && a.head_dim != 128) return false;
  for (const AttentionTensor* x : {&a.query, &a.key, &a.value, &a.out}) {
    if (!aligned(*x)) return false;
  }
  const char* const choice = std::getenv("TRANSFORMER_EXT_CUDA_ATTENTION");
  if (choice != nullptr && std::strcmp(choice, "simple") == 0) return false;
  return has_instructions();
}

const char* attention_forward_tensor_cuda(const AttentionArgs& a, FloatType type,
                                          const CudaDropout& dropout, void* stream) {
  return by_type(type, a.head_dim, [&](auto element, auto head_dim) {
    return forward<typename decltype(element)::type, decltype(head_dim)::value>(
        a, dropout, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace transformer_ext
