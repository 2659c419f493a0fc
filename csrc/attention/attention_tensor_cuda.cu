// A warp has 16 rows of one side. Its scores, weights and sums stay in registers: the weights of a
// product are, rounded, what the next one takes. In shared memory are tiles of the tensors as they
// are, brought by cp.async. Nothing is added up by atomics: results are the same bits in every run.
//
// Weights of 0 take part in the products: a NaN or an infinity in row j of one side reaches rows of
// the other side that are hidden from it, in the same sequence and head: by a causal mask, those of
// j's own 16; by dropout, all. (So it is on the CPU, whose tiles are larger; the simple kernels
// leave weights of 0 out where a tile holds such a value.) To find them in the results would cost 2
// % of the forward pass's instructions, and a second way to compute a row its registers. What lies
// behind the end of a sequence is read as 0.
#include <cstdint>
#include <type_traits>

#include "attention/attention_cuda.cuh"
#include "attention/attention_tensor_cuda.h"
#include "common/tensor_cores.cuh"

namespace transformer_ext {
namespace {

constexpr int kSide = 16;          // rows of a warp; keys of a step
constexpr int kForwardWarps = 4;   // at most
constexpr int kBackwardWarps = 8;  // at most
constexpr int kTile = 64;          // keys in shared memory at once, twice
constexpr int kForwardRows = 256;  // of queries, that a block takes one after another

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

// 16 rows in the layout of C, times a factor, to `to`, through the warp's own `staging`: 16 bytes a
// lane instead of 4.
template <int kStride, int kChunks, class T>
__device__ inline void store_rows(const float (&x)[kChunks][4], float factor, int count, T* staging,
                                  T* to, int64_t token_stride) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      *reinterpret_cast<uint32_t*>(staging + (lane / 4 + 8 * r) * kStride + 8 * j + lane % 4 * 2) =
          pack<T>(x[j][2 * r] * factor, x[j][2 * r + 1] * factor);
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

// A = two neighbouring C.
template <class T>
__device__ inline void as_a(const float (&left)[4], const float (&right)[4], uint32_t (&a)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// out += weights * tile: of kCount neighbouring C as A (the first 16 `steps` columns matter) and as
// many rows of a tile.
template <int kDim, class T, int kCount>
__device__ inline void add_tile(const float (&weights)[kCount][4], const T* tile, int steps,
                                float (&out)[kDim / 8][4]) {
#pragma unroll
  for (int n = 0; n < kCount / 2; ++n) {
    if (n >= steps) continue;
    uint32_t a[4];
    as_a<T>(weights[2 * n], weights[2 * n + 1], a);
#pragma unroll
    for (int d = 0; d < kDim / kSide; ++d) {
      uint32_t b[4];
      load_b(tile + (n * kRowStride<kDim> + d) * kSide, kRowStride<kDim>, b);
      multiply_add<T>(out[2 * d], a, b[0], b[1]);
      multiply_add<T>(out[2 * d + 1], a, b[2], b[3]);
    }
  }
}

// Bit e of kept[j]: whether dropout keeps value e of the lane's C number j, of 8 columns each.
// `row` is that of dropout of the lane's first row, `step` leads to its second, `block` is the
// first column / 8; of the kGroups groups of four C only the first `groups` matter. A counter of
// dropout serves a row's 8 columns of one C: each of the four lanes of a row makes those of another
// C, and gets two bits from each.
template <int kCount>
__device__ inline void kept_in_rows(const Dropout& dropout, int64_t row, int64_t step, int block,
                                    int groups, unsigned (&kept)[kCount]) {
  static_assert(kCount <= 8 && kCount % 4 == 0, "bits of 32");
  const int lane = threadIdx.x % kWarp;
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    if (i >= groups) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bits |= kept_bits(dropout, row + r * step, block + 4 * i + lane % 4) << (16 * i + 8 * r);
    }
  }
#pragma unroll
  for (int source = 0; source < 4; ++source) {
    const unsigned theirs = __shfl_sync(kAllLanes, bits, (lane & ~3) + source) >> (lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      kept[4 * i + source] = (theirs >> (16 * i) & 3u) | (theirs >> (16 * i + 8) & 3u) << 2;
    }
  }
}

// Of 16 query rows from `first` on, by a warp: the maximum, the inverse sum, and the sum of
// grad_out * out, which is 0 for a query that attends to nothing, whatever comes from above. All
// are 0 behind the last query.
template <int kDim, class T>
__device__ inline void row_statistics(const AttentionBackwardArgs& a, const Sequence& s, int64_t b,
                                      int64_t h, int first, float* tops, float* inverses,
                                      float* deltas) {
  constexpr int kChunks = kDim / 8;
  const bool packed = a.cu_seqlens_q != nullptr;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int begin = 0; begin < kSide; begin += kWarp / kChunks) {
    const int row = begin + lane / kChunks;
    float top = 0.0f;
    float inverse = 0.0f;
    float sum = 0.0f;
    if (first + row < s.queries) {
      const int64_t index = statistics_index(a, s, b, h, first + row);
      top = a.statistics[index];
      inverse = a.statistics[index + statistics_half(a)];
      const int64_t token = s.query_row + first + row;
      const Vector<T, 8> out = *reinterpret_cast<const Vector<T, 8>*>(
          row_of<const T>(a.out, packed, b, token, h) + lane % kChunks * 8);
      const Vector<T, 8> grad = *reinterpret_cast<const Vector<T, 8>*>(
          row_of<const T>(a.grad_out, packed, b, token, h) + lane % kChunks * 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum = fmaf(to_float(out.values[i]), to_float(grad.values[i]), sum);
      }
    }
#pragma unroll
    for (int offset = kChunks / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (lane % kChunks == 0) {
      tops[row] = top;
      inverses[row] = inverse;
      deltas[row] = inverse == 0.0f ? 0.0f : sum;
    }
  }
}

#endif

// A launch takes the sequences of more than `above` and at most `most` tokens.
struct ForwardPlan {
  int tiles;      // blocks for a head of a sequence
  int rows;       // of queries, of a block
  int tile_rows;  // of keys and of values, that there is memory for in a tile
  int above;
  int most;
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
  const int longer = s.queries > s.keys ? s.queries : s.keys;
  if (block_first >= s.queries || longer <= plan.above || longer > plan.most) return;
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
          unsigned kept[2 * kSteps];
          kept_in_rows(dropout, dropout_row, 8 * a.heads, begin / 8, (steps + 1) / 2, kept);
#pragma unroll
          for (int j = 0; j < 2 * kSteps; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              if ((kept[j] >> e & 1u) == 0) scores[j][e] = 0.0f;
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[j][e] *= former[e / 2];
        }
        add_tile<kDim>(scores, tile_values, steps, out);
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
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = row_reduce(sum[r], Sum{});
      const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        out[j][2 * r] *= inverse;
        out[j][2 * r + 1] *= inverse;
      }
      const int query_row = mine + lane / 4 + 8 * r;
      if (lane % 4 == 0 && query_row < s.queries && a.statistics != nullptr) {
        const int64_t index = statistics_index(a, s, place.b, h, query_row);
        a.statistics[index] = top[r] == minus_infinity() ? 0.0f : top[r];
        a.statistics[index + statistics_half(a)] = inverse;
      }
    }
    store_rows<kStride>(out, dropout.scale, least(s.queries - mine, kSide), own,
                        row_of<T>(a.out, packed, place.b, s.query_row + mine, h),
                        a.out.token_stride);
  }
#endif
}

// ---- Gradients ----------------------------------------------------------------------------------

// A launch takes the sequences of more than `above` and at most `most` keys.
struct BackwardPlan {
  int tiles;  // blocks for a head of a sequence
  int above;
  int most;
  bool whole;  // all keys of a sequence are in one block, which makes the gradient of queries too
};

#if defined(TRANSFORMER_EXT_TENSOR_CORES)
__device__ inline bool is_taken(const BackwardPlan& plan, const Sequence& s) {
  return s.keys > plan.above && s.keys <= plan.most;
}
#endif

// A warp has 16 keys. Scores are made with keys as rows, so that weights and their gradients, in
// registers, are what the gradients of values and keys are products of. Only the gradient of
// queries, which sums over all keys, takes them from shared memory, if `whole`.
template <class T, int kDim>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, kDim <= 64 ? 2 : 1)
    grad_key_value_kernel(AttentionBackwardArgs a, CudaDropout dropout_argument,
                          BackwardPlan plan) {
#if defined(TRANSFORMER_EXT_TENSOR_CORES)
  constexpr int kStride = kRowStride<kDim>;
  TRANSFORMER_EXT_DYNAMIC_SHARED(memory);
  const int threads = static_cast<int>(blockDim.x);
  const int rows = threads / kWarp * kSide;  // of keys and of queries
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  float* const tops = reinterpret_cast<float*>(memory);
  float* const inverses = tops + rows;
  float* const deltas = inverses + rows;
  T* const keys = reinterpret_cast<T*>(deltas + rows);
  T* const values = keys + rows * kStride;
  T* const queries = values + rows * kStride;
  T* const grads = queries + rows * kStride;
  T* const factors = grads + rows * kStride;  // gradients of scores: a row for each key
  const int factor_stride = rows + 8;

  const Place place = place_of(plan.tiles, a.kv_heads);
  const Sequence s = sequence_of(a, place.b);
  if (!is_taken(plan, s)) return;
  const bool packed = a.cu_seqlens_q != nullptr;
  const int first = place.tile * rows;
  // Keys that are padding have a gradient too, of 0.
  const int written = packed ? s.keys : static_cast<int>(a.key_length);
  if (first >= written && !plan.whole) return;
  const int64_t kv_head = place.head;
  const int64_t group = a.heads / a.kv_heads;
  const Dropout dropout = read_dropout(dropout_argument);
  const float factor = a.scale * kLog2e;
  const int inside = s.keys - first < 0 ? 0 : least(s.keys - first, rows);
  const int mine = first + warp * kSide;
  const bool active = mine < s.keys;
  copy_rows<kDim>(keys, row_of<const T>(a.key, packed, place.b, s.key_row + first, kv_head),
                  a.key.token_stride, inside, threadIdx.x, threads);
  copy_rows<kDim>(values, row_of<const T>(a.value, packed, place.b, s.key_row + first, kv_head),
                  a.value.token_stride, inside, threadIdx.x, threads);

  float grad_key[kDim / 8][4] = {};
  float grad_value[kDim / 8][4] = {};
  const int start = a.causal ? first : 0;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    for (int begin = start; begin < s.queries; begin += rows) {
      if (inside == 0 && !plan.whole) break;
      const int count = least(s.queries - begin, rows);
      __syncthreads();  // the former queries are done with
      copy_rows<kDim>(queries, row_of<const T>(a.query, packed, place.b, s.query_row + begin, h),
                      a.query.token_stride, count, threadIdx.x, threads);
      copy_rows<kDim>(grads, row_of<const T>(a.grad_out, packed, place.b, s.query_row + begin, h),
                      a.grad_out.token_stride, count, threadIdx.x, threads);
      end_copies();
      row_statistics<kDim, T>(a, s, place.b, h, begin + warp * kSide, tops + warp * kSide,
                              inverses + warp * kSide, deltas + warp * kSide);
      wait_for_copies<0>();
      __syncthreads();
      for (int chunk = 0; active && chunk < count; chunk += kSide) {
        if (a.causal && begin + chunk + kSide <= mine) continue;
        float scores[2][4] = {};
        float grad_weights[2][4] = {};
#pragma unroll
        for (int k = 0; k < kDim / kSide; ++k) {
          uint32_t key[4];
          uint32_t value[4];
          load_a(keys + warp * kSide * kStride + k * kSide, kStride, key);
          load_a(values + warp * kSide * kStride + k * kSide, kStride, value);
          const int at = chunk * kStride + k * kSide;
          uint32_t b[4];
          load_b_transposed(queries + at, kStride, b);
          multiply_add<T>(scores[0], key, b[0], b[1]);
          multiply_add<T>(scores[1], key, b[2], b[3]);
          load_b_transposed(grads + at, kStride, b);
          multiply_add<T>(grad_weights[0], value, b[0], b[1]);
          multiply_add<T>(grad_weights[1], value, b[2], b[3]);
        }
        // A lane makes the bits of one query and 8 of the warp's keys.
        unsigned bits = 0;
        if (dropout.threshold != 0) {
          bits = kept_bits(dropout,
                           token_of(a, s, place.b, begin + chunk + lane % kSide) * a.heads + h,
                           mine / 8 + lane / kSide);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = 8 * j + lane % 4 * 2;  // in the chunk
          const Vector<float, 2> top = *reinterpret_cast<Vector<float, 2>*>(tops + chunk + column);
          const Vector<float, 2> inverse =
              *reinterpret_cast<Vector<float, 2>*>(inverses + chunk + column);
          const Vector<float, 2> delta =
              *reinterpret_cast<Vector<float, 2>*>(deltas + chunk + column);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int key = mine + lane / 4 + e / 2 * 8;
            const bool none = key >= s.keys || (a.causal && key > begin + chunk + column + e % 2) ||
                              inverse.values[e % 2] == 0.0f;
            const float weight =
                none ? 0.0f
                     : exp2f(scores[j][e] * factor - top.values[e % 2]) * inverse.values[e % 2];
            const bool keep =
                dropout.threshold == 0 ||
                (__shfl_sync(kAllLanes, bits, column + e % 2 + e / 2 * kSide) >> (lane / 4) & 1u);
            const float grad = keep ? grad_weights[j][e] * dropout.scale : 0.0f;
            scores[j][e] = keep ? weight * dropout.scale : 0.0f;
            grad_weights[j][e] = none ? 0.0f : weight * (grad - delta.values[e % 2]);
          }
        }
        uint32_t weight[4];
        uint32_t grad[4];
        as_a<T>(scores[0], scores[1], weight);
        as_a<T>(grad_weights[0], grad_weights[1], grad);
        if (plan.whole) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            *reinterpret_cast<uint32_t*>(factors +
                                         (warp * kSide + lane / 4 + i % 2 * 8) * factor_stride +
                                         chunk + i / 2 * 8 + lane % 4 * 2) = grad[i];
          }
        }
#pragma unroll
        for (int d = 0; d < kDim / kSide; ++d) {
          const int at = chunk * kStride + d * kSide;
          uint32_t b[4];
          load_b(grads + at, kStride, b);
          multiply_add<T>(grad_value[2 * d], weight, b[0], b[1]);
          multiply_add<T>(grad_value[2 * d + 1], weight, b[2], b[3]);
          load_b(queries + at, kStride, b);
          multiply_add<T>(grad_key[2 * d], grad, b[0], b[1]);
          multiply_add<T>(grad_key[2 * d + 1], grad, b[2], b[3]);
        }
      }
      if (!plan.whole) continue;
      __syncthreads();  // all gradients of scores are there, and the queries done with
      const int query = begin + warp * kSide;
      if (query >= s.queries) continue;
      const int end = a.causal ? least(s.keys, query + kSide) : s.keys;
      T* const to = row_of<T>(a.grad_query, packed, place.b, s.query_row + query, h);
      // 32 columns at a time: the registers are full.
#pragma unroll 1
      for (int column = 0; column < kDim; column += 2 * kSide) {
        float out[4][4] = {};
        for (int key = 0; key < end; key += kSide) {
          uint32_t grad[4];
          load_a_transposed(factors + key * factor_stride + warp * kSide, factor_stride, grad);
#pragma unroll
          for (int d = 0; d < 2; ++d) {
            uint32_t b[4];
            load_b(keys + key * kStride + column + d * kSide, kStride, b);
            multiply_add<T>(out[2 * d], grad, b[0], b[1]);
            multiply_add<T>(out[2 * d + 1], grad, b[2], b[3]);
          }
        }
        store_rows<kStride>(out, a.scale, least(s.queries - query, kSide),
                            queries + warp * kSide * kStride + column, to + column,
                            a.grad_query.token_stride);
      }
    }
  }
  end_copies();  // of the keys, if there was no query
  wait_for_copies<0>();
  __syncthreads();  // the keys are done with
  if (active) {
    const int64_t token = s.key_row + mine;
    const int count = least(s.keys - mine, kSide);
    store_rows<kStride>(grad_key, a.scale, count, keys + warp * kSide * kStride,
                        row_of<T>(a.grad_key, packed, place.b, token, kv_head),
                        a.grad_key.token_stride);
    store_rows<kStride>(grad_value, 1.0f, count, values + warp * kSide * kStride,
                        row_of<T>(a.grad_value, packed, place.b, token, kv_head),
                        a.grad_value.token_stride);
  }
  const int end = plan.whole ? written : least(written, first + rows);
  for (int row = first + inside + warp; row < end; row += threads / kWarp) {
    for (int d = lane; d < kDim; d += kWarp) {
      row_of<T>(a.grad_key, packed, place.b, s.key_row + row, kv_head)[d] = from_float<T>(0.0f);
      row_of<T>(a.grad_value, packed, place.b, s.key_row + row, kv_head)[d] = from_float<T>(0.0f);
    }
  }
#endif
}

// Keys at once: 99 KiB of shared memory is what some GPUs have.
template <int kDim>
constexpr int kGradTile = kDim <= 64 ? kTile : kTile / 2;

// For sequences of more keys than one block holds: a warp has 16 queries, and the block passes over
// the keys as in the forward pass.
template <class T, int kDim>
__global__ void __launch_bounds__(kForwardWarps* kWarp)
    grad_query_kernel(AttentionBackwardArgs a, CudaDropout dropout_argument, BackwardPlan plan) {
#if defined(TRANSFORMER_EXT_TENSOR_CORES)
  constexpr int kStride = kRowStride<kDim>;
  constexpr int kRows = kForwardWarps * kSide;
  constexpr int kSteps = 2;
  constexpr int kKeys = kGradTile<kDim>;
  TRANSFORMER_EXT_DYNAMIC_SHARED(memory);
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  float* const tops = reinterpret_cast<float*>(memory) + warp * kSide;
  float* const inverses = tops + kRows;
  float* const deltas = inverses + kRows;
  T* const all_queries = reinterpret_cast<T*>(reinterpret_cast<float*>(memory) + 3 * kRows);
  T* const queries = all_queries + warp * kSide * kStride;
  T* const grads = queries + kRows * kStride;
  T* const tiles = all_queries + 2 * kRows * kStride;

  const Place place = place_of(plan.tiles, a.heads);
  const Sequence s = sequence_of(a, place.b);
  const int first = place.tile * kRows;
  if (!is_taken(plan, s) || first >= s.queries) return;
  const bool packed = a.cu_seqlens_q != nullptr;
  const int64_t h = place.head;
  const int64_t kv_head = h / (a.heads / a.kv_heads);
  const T* const all_keys = row_of<const T>(a.key, packed, place.b, s.key_row, kv_head);
  const T* const all_values = row_of<const T>(a.value, packed, place.b, s.key_row, kv_head);
  const Dropout dropout = read_dropout(dropout_argument);
  const float factor = a.scale * kLog2e;
  const int mine = first + warp * kSide;
  const bool active = mine < s.queries;
  const int keys = a.causal ? least(s.keys, first + kRows) : s.keys;
  const auto copy_tile = [&](int tile) {
    if (tile * kKeys >= keys) return;
    const int count = least(keys - tile * kKeys, kKeys);
    T* const to = tiles + tile % 2 * 2 * kKeys * kStride;
    copy_rows<kDim>(to, all_keys + tile * kKeys * a.key.token_stride, a.key.token_stride, count,
                    threadIdx.x, kForwardWarps * kWarp);
    copy_rows<kDim>(to + kKeys * kStride, all_values + tile * kKeys * a.value.token_stride,
                    a.value.token_stride, count, threadIdx.x, kForwardWarps * kWarp);
  };

  if (active) {
    const int count = least(s.queries - mine, kSide);
    copy_rows<kDim>(queries, row_of<const T>(a.query, packed, place.b, s.query_row + mine, h),
                    a.query.token_stride, count, lane, kWarp);
    copy_rows<kDim>(grads, row_of<const T>(a.grad_out, packed, place.b, s.query_row + mine, h),
                    a.grad_out.token_stride, count, lane, kWarp);
  }
  copy_tile(0);
  end_copies();
  copy_tile(1);
  end_copies();
  row_statistics<kDim, T>(a, s, place.b, h, mine, tops, inverses, deltas);
  __syncwarp();
  float top[2];
  float inverse[2];
  float delta[2];
  int row_end[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    top[r] = tops[row];
    inverse[r] = inverses[row];
    delta[r] = deltas[row];
    // A query that attends to nothing ends before it begins.
    row_end[r] = inverse[r] == 0.0f ? 0 : a.causal ? least(s.keys, mine + row + 1) : s.keys;
  }
  const int64_t dropout_row = token_of(a, s, place.b, mine + lane / 4) * a.heads + h;

  float out[kDim / 8][4] = {};
  for (int tile = 0; tile * kKeys < keys; ++tile) {
    wait_for_copies<1>();
    __syncthreads();
    const int last = a.causal ? least(keys, mine + kSide) : keys;
    for (int chunk = 0; chunk < kKeys; chunk += kSteps * kSide) {
      const int begin = tile * kKeys + chunk;
      if (!active || begin >= last) break;
      const int steps = in_sides(least(last - begin, kSteps * kSide));
      const T* const chunk_keys = tiles + (tile % 2 * 2 * kKeys + chunk) * kStride;
      const T* const chunk_values = chunk_keys + kKeys * kStride;
      float scores[2 * kSteps][4] = {};
      float grad_weights[2 * kSteps][4] = {};
#pragma unroll
      for (int k = 0; k < kDim / kSide; ++k) {
        uint32_t query[4];
        uint32_t grad[4];
        load_a(queries + k * kSide, kStride, query);
        load_a(grads + k * kSide, kStride, grad);
#pragma unroll
        for (int n = 0; n < kSteps; ++n) {
          if (n >= steps) continue;
          const int at = n * kSide * kStride + k * kSide;
          uint32_t b[4];
          load_b_transposed(chunk_keys + at, kStride, b);
          multiply_add<T>(scores[2 * n], query, b[0], b[1]);
          multiply_add<T>(scores[2 * n + 1], query, b[2], b[3]);
          load_b_transposed(chunk_values + at, kStride, b);
          multiply_add<T>(grad_weights[2 * n], grad, b[0], b[1]);
          multiply_add<T>(grad_weights[2 * n + 1], grad, b[2], b[3]);
        }
      }
      unsigned kept[2 * kSteps] = {~0u, ~0u, ~0u, ~0u};
      if (dropout.threshold != 0) {
        kept_in_rows(dropout, dropout_row, 8 * a.heads, begin / 8, 1, kept);
      }
#pragma unroll
      for (int j = 0; j < 2 * kSteps; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool none = begin + 8 * j + lane % 4 * 2 + e % 2 >= row_end[e / 2];
          const float weight =
              none ? 0.0f : exp2f(scores[j][e] * factor - top[e / 2]) * inverse[e / 2];
          const float grad = kept[j] >> e & 1u ? grad_weights[j][e] * dropout.scale : 0.0f;
          grad_weights[j][e] = none ? 0.0f : weight * (grad - delta[e / 2]);
        }
      }
      add_tile<kDim>(grad_weights, chunk_keys, steps, out);
    }
    if ((tile + 2) * kKeys < keys) {
      __syncthreads();  // all are done with this tile
      copy_tile(tile + 2);
    }
    end_copies();
  }
  wait_for_copies<0>();
  if (!active) return;
  __syncwarp();  // the queries are done with
  store_rows<kStride>(out, a.scale, least(s.queries - mine, kSide), queries,
                      row_of<T>(a.grad_query, packed, place.b, s.query_row + mine, h),
                      a.grad_query.token_stride);
#endif
}

bool aligned(const AttentionTensor& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride % 8 == 0 &&
         x.token_stride % 8 == 0 && x.head_stride % 8 == 0;
}

inline int tiles_of(int64_t length, int rows) {
  return static_cast<int>((length + rows - 1) / rows);
}

// Launches `blocks` blocks, if any.
template <class... Parameters, class... Arguments>
const char* launch_blocks(void (*kernel)(Parameters...), int64_t blocks, int warps, size_t bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) fail("more than 2^31 - 1 tiles of rows");
  if (blocks > 0) {
    launch(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarp), bytes,
           stream, arguments...);
  }
  return launch_error();
}

// Sequences of more than `above` and at most `most` tokens.
template <class T, int kDim>
const char* forward(const AttentionArgs& a, const CudaDropout& dropout, cudaStream_t stream,
                    int above, int most) {
  const int queries = least(static_cast<int>(a.max_query_length), most);
  const int keys = least(static_cast<int>(a.max_key_length), most);
  const int sides = in_sides(queries);
  const int warps = sides <= 1 ? 1 : sides <= 2 ? 2 : kForwardWarps;
  ForwardPlan plan{};
  plan.above = above;
  plan.most = most;
  // Few and long sequences: more blocks, though each reads the keys again. 1024 keep 132 processors
  // busy; what a row's result is does not depend on it.
  plan.rows =
      a.batch * a.heads * tiles_of(queries, kForwardRows) >= 1024 ? kForwardRows : warps * kSide;
  plan.tiles = tiles_of(queries, plan.rows);
  plan.tile_rows = least(kTile, in_sides(keys) * kSide);
  const int tiles = keys > kTile ? 2 : 1;
  const size_t rows = static_cast<size_t>(warps * kSide + 2 * tiles * plan.tile_rows);
  return launch_blocks(forward_kernel<T, kDim>, plan.tiles * a.heads * a.batch, warps,
                       rows * kRowStride<kDim> * sizeof(T), stream, a, dropout, plan);
}

// Short sequences among longer ones have a launch of their own: two of a block's four warps would
// have nothing to do, and the memory of long ones would lie idle.
template <class T, int kDim>
const char* forward(const AttentionArgs& a, const CudaDropout& dropout, cudaStream_t stream) {
  zero_slack<T>(a.out, a.cu_seqlens_q, a.batch, a.query_length, a.heads, a.head_dim, stream);
  constexpr int kShort = 2 * kSide;
  int above = -1;
  if (a.cu_seqlens_q != nullptr && (a.max_query_length > kShort || a.max_key_length > kShort)) {
    const char* const error = forward<T, kDim>(a, dropout, stream, above, kShort);
    if (error != nullptr) return error;
    above = kShort;
  }
  return forward<T, kDim>(a, dropout, stream, above, INT32_MAX);
}

// Sequences of up to 32, 64 and 128 keys, each in a launch with memory for as many and no more;
// blocks of the others return at once. What is longer takes two kernels, of which each makes the
// scores: one block for all keys of a sequence would leave no room for a second.
template <class T, int kDim>
const char* backward(const AttentionBackwardArgs& a, const CudaDropout& dropout,
                     cudaStream_t stream) {
  zero_slack<T>(a.grad_query, a.cu_seqlens_q, a.batch, a.query_length, a.heads, a.head_dim, stream);
  zero_slack<T>(a.grad_key, a.cu_seqlens_k, a.batch, a.key_length, a.kv_heads, a.head_dim, stream);
  zero_slack<T>(a.grad_value, a.cu_seqlens_k, a.batch, a.key_length, a.kv_heads, a.head_dim,
                stream);
  const size_t shared = most_shared();
  const auto bytes_of = [](int rows, bool whole) {
    const size_t elements =
        static_cast<size_t>(4 * rows * kRowStride<kDim> + (whole ? rows * (rows + 8) : 0));
    return 3 * sizeof(float) * static_cast<size_t>(rows) + elements * sizeof(T);
  };
  const int longest = static_cast<int>(a.max_key_length);
  const bool all_same = a.cu_seqlens_k == nullptr && a.key_lengths == nullptr;
  int above = -1;
  for (int warps = 2; warps <= kBackwardWarps && above < longest; warps *= 2) {
    const int rows = warps * kSide;
    if (bytes_of(rows, true) > shared) break;
    if (all_same && longest > rows) {
      above = rows;
      continue;
    }
    const char* const failed =
        launch_blocks(grad_key_value_kernel<T, kDim>, a.kv_heads * a.batch, warps,
                      bytes_of(rows, true), stream, a, dropout, BackwardPlan{1, above, rows, true});
    if (failed != nullptr) return failed;
    above = rows;
  }
  if (above >= longest) return nullptr;
  const int rows = kForwardWarps * kSide;
  const int query_tiles = tiles_of(a.max_query_length, rows);
  const size_t bytes =
      3 * sizeof(float) * static_cast<size_t>(rows) +
      static_cast<size_t>(2 * rows + 4 * kGradTile<kDim>) * kRowStride<kDim> * sizeof(T);
  const char* const failed =
      launch_blocks(grad_query_kernel<T, kDim>, query_tiles * a.heads * a.batch, kForwardWarps,
                    bytes, stream, a, dropout, BackwardPlan{query_tiles, above, INT32_MAX, false});
  if (failed != nullptr) return failed;
  const int key_tiles = tiles_of(longest, rows);
  return launch_blocks(grad_key_value_kernel<T, kDim>, key_tiles * a.kv_heads * a.batch,
                       kForwardWarps, bytes_of(rows, false), stream, a, dropout,
                       BackwardPlan{key_tiles, above, INT32_MAX, false});
}

// Whether the code that would run on this device was made for a GPU with these instructions.
bool has_instructions() {
  return of_this_device([] {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, forward_kernel<__nv_bfloat16, 64>) != cudaSuccess) {
      cudaGetLastError();
      return false;
    }
    return attributes.ptxVersion >= 80;
  });
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

bool attention_has_tensor_cores(const AttentionArgs& a, FloatType type) {
  if (type == FloatType::float32 || a.mask != nullptr || a.bias != nullptr) return false;
  if (a.head_dim != 32 && a.head_dim != 64 && a.head_dim != 128) return false;
  for (const AttentionTensor* x : {&a.query, &a.key, &a.value, &a.out}) {
    if (!aligned(*x)) return false;
  }
  return has_instructions();
}

bool attention_backward_has_tensor_cores(const AttentionBackwardArgs& a, FloatType type) {
  for (const AttentionTensor* x : {&a.grad_out, &a.grad_query, &a.grad_key, &a.grad_value}) {
    if (!aligned(*x)) return false;
  }
  return attention_has_tensor_cores(a, type);
}

const char* attention_forward_tensor_cuda(const AttentionArgs& a, FloatType type,
                                          const CudaDropout& dropout, void* stream) {
  return by_type(type, a.head_dim, [&](auto element, auto head_dim) {
    return forward<typename decltype(element)::type, decltype(head_dim)::value>(
        a, dropout, static_cast<cudaStream_t>(stream));
  });
}

const char* attention_backward_tensor_cuda(const AttentionBackwardArgs& a, FloatType type,
                                           const CudaDropout& dropout, void* stream) {
  return by_type(type, a.head_dim, [&](auto element, auto head_dim) {
    return backward<typename decltype(element)::type, decltype(head_dim)::value>(
        a, dropout, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace transformer_ext
