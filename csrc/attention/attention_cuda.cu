// Products on the ordinary units, not the tensor cores: one kernel for all lengths and masks.
// A block has kRows rows of one side (queries, or keys for the gradients of keys and values), kEach
// to a warp, and passes over the other side 32 rows at a time, a lane for each, from shared memory.
// Nothing is added up by atomics: results are the same bits in every run.
#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "attention/attention_cuda.cuh"
#include "attention/attention_tensor_cuda.h"

namespace transformer_ext {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kEach = 4;
constexpr int kRows = kWarps * kEach;

// What the kernels are told besides the problem.
struct Plan {
  int tiles;     // of kRows rows, for the longest sequence
  int padded;    // head_dim, rounded up to 4
  bool vectors;  // whether four neighbouring elements can be read at once
};

// Score times log2(e), and whether query i may attend to key j at all: -infinity where not.
__device__ inline float masked_score(const AttentionArgs& a, float product, int64_t b, int64_t h,
                                     int64_t i, int64_t j, bool inside) {
  if (!inside || (a.causal && j > i)) return minus_infinity();
  if (a.mask != nullptr && a.mask[b * a.mask_strides[0] + h * a.mask_strides[1] +
                                  i * a.mask_strides[2] + j * a.mask_strides[3]] == 0) {
    return minus_infinity();
  }
  float score = product * (a.scale * kLog2e);
  if (a.bias != nullptr) {
    const float bias = a.bias[b * a.bias_strides[0] + h * a.bias_strides[1] +
                              i * a.bias_strides[2] + j * a.bias_strides[3]];
    if (bias == minus_infinity()) return bias;
    score += bias * kLog2e;
  }
  return score;
}

// `count` of `rows` rows of head_dim elements into shared memory, zeros behind them; by all threads
// of the block. Returns whether this thread has read a NaN or an infinity.
template <class T>
__device__ inline bool load_rows(const T* from, int64_t token_stride, int count, int rows,
                                 int head_dim, const Plan& plan, int stride, float* to) {
  bool odd = false;
  if (plan.vectors) {
    const int groups = plan.padded / 4;
    for (int i = threadIdx.x; i < rows * groups; i += kThreads) {
      const int row = i / groups;
      const int column = (i - row * groups) * 4;
      float4 wide = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row < count) {
        const Vector<T, 4> x =
            *reinterpret_cast<const Vector<T, 4>*>(from + row * token_stride + column);
        wide = make_float4(to_float(x.values[0]), to_float(x.values[1]), to_float(x.values[2]),
                           to_float(x.values[3]));
      }
      odd = odd || !(fabsf(wide.x) <= FLT_MAX) || !(fabsf(wide.y) <= FLT_MAX) ||
            !(fabsf(wide.z) <= FLT_MAX) || !(fabsf(wide.w) <= FLT_MAX);
      *reinterpret_cast<float4*>(to + row * stride + column) = wide;
    }
  } else {
    for (int i = threadIdx.x; i < rows * plan.padded; i += kThreads) {
      const int row = i / plan.padded;
      const int column = i - row * plan.padded;
      const float x =
          row < count && column < head_dim ? to_float(from[row * token_stride + column]) : 0.0f;
      odd = odd || !(fabsf(x) <= FLT_MAX);
      to[row * stride + column] = x;
    }
  }
  return odd;
}

// Whether any thread of the block has come with true; all see what was stored before.
__device__ inline bool any_thread(bool mine, int* flags) {
  const int warp = threadIdx.x / kWarp;
  const int any = __any_sync(kAllLanes, mine);
  if (threadIdx.x % kWarp == 0) flags[warp] = any;
  __syncthreads();
  bool found = false;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) found = found || flags[i] != 0;
  return found;
}

// out[r] = the lane's row times row r.
__device__ inline void products(const float* mine, const float* rows, const Plan& plan,
                                float (&out)[kEach]) {
#pragma unroll
  for (int r = 0; r < kEach; ++r) out[r] = 0.0f;
  for (int d = 0; d < plan.padded; d += 4) {
    const float4 x = *reinterpret_cast<const float4*>(mine + d);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const float4 y = *reinterpret_cast<const float4*>(rows + r * plan.padded + d);
      out[r] = fmaf(x.x, y.x, out[r]);
      out[r] = fmaf(x.y, y.y, out[r]);
      out[r] = fmaf(x.z, y.z, out[r]);
      out[r] = fmaf(x.w, y.w, out[r]);
    }
  }
}

// out[r][c] += sum over the first `count` j of factors[r][j] * rows[j][lane + 32 c]. With kSkip
// factors of 0 take no part, whatever the row holds.
template <int kChunks, bool kSkip>
__device__ inline void add_rows(const float* factors, const float* rows, int stride, int count,
                                const Plan& plan, float (&out)[kEach][kChunks]) {
  const int lane = threadIdx.x % kWarp;
  for (int j = 0; j < count; j += 4) {
    float4 f[kEach];
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      f[r] = *reinterpret_cast<const float4*>(factors + r * kWarp + j);
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int column = lane + kWarp * c;
        const float x = column < plan.padded ? rows[(j + t) * stride + column] : 0.0f;
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
          const float factor = t == 0 ? f[r].x : t == 1 ? f[r].y : t == 2 ? f[r].z : f[r].w;
          if (!kSkip || factor != 0.0f) out[r][c] = fmaf(factor, x, out[r][c]);
        }
      }
    }
  }
}

template <int kChunks>
__device__ inline void add_rows(bool skip, const float* factors, const float* rows, int stride,
                                int count, const Plan& plan, float (&out)[kEach][kChunks]) {
  if (skip) {
    add_rows<kChunks, true>(factors, rows, stride, count, plan, out);
  } else {
    add_rows<kChunks, false>(factors, rows, stride, count, plan, out);
  }
}

template <class T, int kChunks>
__device__ inline void store_row(const float (&x)[kChunks], float factor, int head_dim, T* to) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int column = threadIdx.x % kWarp + kWarp * c;
    if (column < head_dim) to[column] = from_float<T>(x[c] * factor);
  }
}

// Of kEach query rows against the 32 keys from `first_key` on: bit r of the lane's result says
// whether its key is kept in row r. One lane in two makes eight bits of a row, all share them.
__device__ inline unsigned kept_of_rows(const Dropout& dropout, int64_t first_token, int64_t heads,
                                        int64_t head, int first_key) {
  const int lane = threadIdx.x % kWarp;
  unsigned mine = 0;
  if (lane < kEach * 4) {
    mine = kept_bits(dropout, (first_token + lane / 4) * heads + head, first_key / 8 + lane % 4);
  }
  unsigned kept = 0;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const unsigned bits = __shfl_sync(kAllLanes, mine, r * 4 + lane / 8);
    kept |= ((bits >> (lane % 8)) & 1u) << r;
  }
  return kept;
}

// Shared memory, in floats. A lane reads its own row by float4: rows a multiple of 4 but not of 32
// floats apart would still meet in a bank, hence 4 more.
__host__ __device__ inline int row_stride(int padded) { return padded + 4; }

template <class T, int kChunks>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(AttentionArgs a, CudaDropout dropout_argument, Plan plan) {
  TRANSFORMER_EXT_DYNAMIC_SHARED(memory);
  TRANSFORMER_EXT_SHARED(int, flags, kWarps);
  const int stride = row_stride(plan.padded);
  float* const queries = reinterpret_cast<float*>(memory);
  float* const keys = queries + kRows * plan.padded;
  float* const values = keys + kWarp * stride;
  float* const all_weights = values + kWarp * stride;

  const Place place = place_of(plan.tiles, a.heads);
  const Sequence s = sequence_of(a, place.b);
  const int first = place.tile * kRows;
  if (first >= s.queries) return;
  const bool packed = a.cu_seqlens_q != nullptr;
  const int64_t h = place.head;
  const int64_t kv_head = h / (a.heads / a.kv_heads);
  const int head_dim = static_cast<int>(a.head_dim);
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const Dropout dropout = read_dropout(dropout_argument);
  const int rows = s.queries - first < kRows ? s.queries - first : kRows;
  load_rows(row_of<const T>(a.query, packed, place.b, s.query_row + first, h), a.query.token_stride,
            rows, kRows, head_dim, plan, plan.padded, queries);
  float* const weights = all_weights + warp * kEach * kWarp;
  const int mine = first + warp * kEach;

  float out[kEach][kChunks] = {};
  float top[kEach];
  float sum[kEach];
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    top[r] = minus_infinity();
    sum[r] = 0.0f;
  }
  const int last = a.causal && first + rows < s.keys ? first + rows : s.keys;
  for (int begin = 0; begin < last; begin += kWarp) {
    const int count = last - begin < kWarp ? last - begin : kWarp;
    __syncthreads();  // the former keys and values are done with
    load_rows(row_of<const T>(a.key, packed, place.b, s.key_row + begin, kv_head),
              a.key.token_stride, count, kWarp, head_dim, plan, stride, keys);
    const bool odd =
        any_thread(load_rows(row_of<const T>(a.value, packed, place.b, s.key_row + begin, kv_head),
                             a.value.token_stride, count, kWarp, head_dim, plan, stride, values),
                   flags);
    float scores[kEach];
    products(keys + lane * stride, queries + warp * kEach * plan.padded, plan, scores);
    const unsigned kept =
        dropout.threshold == 0
            ? ~0u
            : kept_of_rows(dropout, token_of(a, s, place.b, mine), a.heads, h, begin);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const float score = masked_score(a, scores[r], place.b, h, mine + r, begin + lane,
                                       lane < count && mine + r < s.queries);
      const float higher = fmaxf(top[r], warp_reduce(score, Max{}));
      // Without a maximum (only masked keys and NaN) 0 lets a NaN through.
      const float shift = higher == minus_infinity() ? 0.0f : higher;
      const float former = top[r] == minus_infinity() ? 0.0f : exp2f(top[r] - shift);
      const float weight = exp2f(score - shift);
      // Where there was no maximum yet, the sum holds nothing but NaN.
      sum[r] = (top[r] == minus_infinity() ? sum[r] : sum[r] * former) + weight;
      top[r] = higher;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) out[r][c] *= former;
      weights[r * kWarp + lane] = (kept >> r) & 1u ? weight : 0.0f;
    }
    __syncwarp();
    add_rows(odd, weights, values, stride, count, plan, out);
    __syncwarp();
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const float total = warp_reduce(sum[r], Sum{});
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const int query = mine + r;
    if (query >= s.queries) continue;
    store_row(out[r], inverse * (dropout.threshold == 0 ? 1.0f : dropout.scale), head_dim,
              row_of<T>(a.out, packed, place.b, s.query_row + query, h));
    if (lane == 0 && a.statistics != nullptr) {
      const int64_t index = statistics_index(a, s, place.b, h, query);
      a.statistics[index] = top[r] == minus_infinity() ? 0.0f : top[r];
      a.statistics[index + statistics_half(a)] = inverse;
    }
  }
}

// delta = sum of grad_out * out for each query row; then the gradient of the queries.
template <class T, int kChunks>
__global__ void __launch_bounds__(kThreads, 2)
    grad_query_kernel(AttentionBackwardArgs a, CudaDropout dropout_argument, float* delta,
                      Plan plan) {
  TRANSFORMER_EXT_DYNAMIC_SHARED(memory);
  TRANSFORMER_EXT_SHARED(int, flags, kWarps);
  const int stride = row_stride(plan.padded);
  float* const queries = reinterpret_cast<float*>(memory);
  float* const grads = queries + kRows * plan.padded;
  float* const keys = grads + kRows * plan.padded;
  float* const values = keys + kWarp * stride;
  float* const all_factors = values + kWarp * stride;

  const Place place = place_of(plan.tiles, a.heads);
  const Sequence s = sequence_of(a, place.b);
  const int first = place.tile * kRows;
  if (first >= s.queries) return;
  const bool packed = a.cu_seqlens_q != nullptr;
  const int64_t h = place.head;
  const int64_t kv_head = h / (a.heads / a.kv_heads);
  const int head_dim = static_cast<int>(a.head_dim);
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const Dropout dropout = read_dropout(dropout_argument);
  const int rows = s.queries - first < kRows ? s.queries - first : kRows;
  const int64_t token = s.query_row + first;
  load_rows(row_of<const T>(a.query, packed, place.b, token, h), a.query.token_stride, rows, kRows,
            head_dim, plan, plan.padded, queries);
  load_rows(row_of<const T>(a.grad_out, packed, place.b, token, h), a.grad_out.token_stride, rows,
            kRows, head_dim, plan, plan.padded, grads);
  __syncthreads();
  float* const factors = all_factors + warp * kEach * kWarp;
  const int mine = first + warp * kEach;

  float deltas[kEach];
  float tops[kEach];
  float inverses[kEach];
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    deltas[r] = tops[r] = inverses[r] = 0.0f;
    if (mine + r >= s.queries) continue;
    const int64_t index = statistics_index(a, s, place.b, h, mine + r);
    tops[r] = a.statistics[index];
    inverses[r] = a.statistics[index + statistics_half(a)];
    // A query that attends to nothing has no gradient, whatever comes from above.
    float sum = 0.0f;
    if (inverses[r] != 0.0f) {
      const T* const out = row_of<const T>(a.out, packed, place.b, s.query_row + mine + r, h);
      const float* const grad = grads + (warp * kEach + r) * plan.padded;
      for (int d = lane; d < head_dim; d += kWarp) sum = fmaf(to_float(out[d]), grad[d], sum);
    }
    deltas[r] = warp_reduce(sum, Sum{});
    if (lane == 0) delta[index] = deltas[r];
  }

  float out[kEach][kChunks] = {};
  const int last = a.causal && first + rows < s.keys ? first + rows : s.keys;
  for (int begin = 0; begin < last; begin += kWarp) {
    const int count = last - begin < kWarp ? last - begin : kWarp;
    __syncthreads();
    load_rows(row_of<const T>(a.value, packed, place.b, s.key_row + begin, kv_head),
              a.value.token_stride, count, kWarp, head_dim, plan, stride, values);
    const bool odd =
        any_thread(load_rows(row_of<const T>(a.key, packed, place.b, s.key_row + begin, kv_head),
                             a.key.token_stride, count, kWarp, head_dim, plan, stride, keys),
                   flags);
    float scores[kEach];
    float grad_weights[kEach];
    products(keys + lane * stride, queries + warp * kEach * plan.padded, plan, scores);
    products(values + lane * stride, grads + warp * kEach * plan.padded, plan, grad_weights);
    const unsigned kept =
        dropout.threshold == 0
            ? ~0u
            : kept_of_rows(dropout, token_of(a, s, place.b, mine), a.heads, h, begin);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const float score = masked_score(a, scores[r], place.b, h, mine + r, begin + lane,
                                       lane < count && mine + r < s.queries);
      const float weight = exp2f(score - tops[r]) * inverses[r];
      const float grad = (kept >> r) & 1u
                             ? grad_weights[r] * (dropout.threshold == 0 ? 1.0f : dropout.scale)
                             : 0.0f;
      factors[r * kWarp + lane] =
          score == minus_infinity() ? 0.0f : weight * (grad - deltas[r]) * a.scale;
    }
    __syncwarp();
    add_rows(odd, factors, keys, stride, count, plan, out);
    __syncwarp();
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    if (mine + r >= s.queries) continue;
    store_row(out[r], 1.0f, head_dim,
              row_of<T>(a.grad_query, packed, place.b, s.query_row + mine + r, h));
  }
}

// A block has kRows keys of a key/value head, and passes over the queries of all its query heads.
template <class T, int kChunks>
__global__ void __launch_bounds__(kThreads, 2)
    grad_key_value_kernel(AttentionBackwardArgs a, CudaDropout dropout_argument, const float* delta,
                          Plan plan) {
  TRANSFORMER_EXT_DYNAMIC_SHARED(memory);
  TRANSFORMER_EXT_SHARED(int, flags, kWarps);
  const int stride = row_stride(plan.padded);
  float* const keys = reinterpret_cast<float*>(memory);
  float* const values = keys + kRows * plan.padded;
  float* const queries = values + kRows * plan.padded;
  float* const grads = queries + kWarp * stride;
  float* const all_factors = grads + kWarp * stride;

  const Place place = place_of(plan.tiles, a.kv_heads);
  const Sequence s = sequence_of(a, place.b);
  const bool packed = a.cu_seqlens_q != nullptr;
  const int first = place.tile * kRows;
  // Keys that are padding have a gradient too, of 0.
  const int written = packed ? s.keys : static_cast<int>(a.key_length);
  if (first >= written) return;
  const int64_t kv_head = place.head;
  const int64_t group = a.heads / a.kv_heads;
  const int head_dim = static_cast<int>(a.head_dim);
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const Dropout dropout = read_dropout(dropout_argument);
  const int inside = s.keys - first;
  const int rows = inside < 0 ? 0 : inside < kRows ? inside : kRows;
  load_rows(row_of<const T>(a.key, packed, place.b, s.key_row + first, kv_head), a.key.token_stride,
            rows, kRows, head_dim, plan, plan.padded, keys);
  load_rows(row_of<const T>(a.value, packed, place.b, s.key_row + first, kv_head),
            a.value.token_stride, rows, kRows, head_dim, plan, plan.padded, values);
  float* const weights = all_factors + warp * 2 * kEach * kWarp;
  float* const factors = weights + kEach * kWarp;
  const int mine = first + warp * kEach;

  float grad_key[kEach][kChunks] = {};
  float grad_value[kEach][kChunks] = {};
  const int start = a.causal ? first / kWarp * kWarp : 0;
  for (int64_t h = kv_head * group; rows > 0 && h < (kv_head + 1) * group; ++h) {
    for (int begin = start; begin < s.queries; begin += kWarp) {
      const int count = s.queries - begin < kWarp ? s.queries - begin : kWarp;
      const int64_t token = s.query_row + begin;
      __syncthreads();
      const bool odd_query =
          load_rows(row_of<const T>(a.query, packed, place.b, token, h), a.query.token_stride,
                    count, kWarp, head_dim, plan, stride, queries);
      const bool odd_grad =
          load_rows(row_of<const T>(a.grad_out, packed, place.b, token, h), a.grad_out.token_stride,
                    count, kWarp, head_dim, plan, stride, grads);
      const bool odd = any_thread(odd_query || odd_grad, flags);
      float scores[kEach];
      float grad_weights[kEach];
      products(queries + lane * stride, keys + warp * kEach * plan.padded, plan, scores);
      products(grads + lane * stride, values + warp * kEach * plan.padded, plan, grad_weights);
      float top = 0.0f;
      float inverse = 0.0f;
      float row_delta = 0.0f;
      unsigned kept = ~0u;
      if (lane < count) {
        const int64_t index = statistics_index(a, s, place.b, h, begin + lane);
        top = a.statistics[index];
        inverse = a.statistics[index + statistics_half(a)];
        row_delta = delta[index];
        if (dropout.threshold != 0) {
          // The warp's keys are within eight neighbours.
          const int64_t row = token_of(a, s, place.b, begin + lane) * a.heads + h;
          kept = kept_bits(dropout, row, mine / 8) >> (mine % 8);
        }
      }
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        const float score = masked_score(a, scores[r], place.b, h, begin + lane, mine + r,
                                         lane < count && mine + r < s.keys);
        const float scale = !((kept >> r) & 1u)      ? 0.0f
                            : dropout.threshold == 0 ? 1.0f
                                                     : dropout.scale;
        const bool none = score == minus_infinity() || inverse == 0.0f;
        const float weight = none ? 0.0f : exp2f(score - top) * inverse;
        const float grad = scale == 0.0f ? 0.0f : grad_weights[r] * scale;
        weights[r * kWarp + lane] = weight * scale;
        factors[r * kWarp + lane] = none ? 0.0f : weight * (grad - row_delta) * a.scale;
      }
      __syncwarp();
      add_rows(odd, weights, grads, stride, count, plan, grad_value);
      add_rows(odd, factors, queries, stride, count, plan, grad_key);
      __syncwarp();
    }
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    if (mine + r >= written) continue;
    const int64_t token = s.key_row + mine + r;
    store_row(grad_key[r], 1.0f, head_dim, row_of<T>(a.grad_key, packed, place.b, token, kv_head));
    store_row(grad_value[r], 1.0f, head_dim,
              row_of<T>(a.grad_value, packed, place.b, token, kv_head));
  }
}

bool aligned(const AttentionTensor& x, uintptr_t bytes) {
  return x.data == nullptr ||
         (reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && x.batch_stride % 4 == 0 &&
          x.token_stride % 4 == 0 && x.head_stride % 4 == 0);
}

template <class T>
Plan plan_of(const AttentionArgs& a, int64_t longest, const AttentionTensor& grad_out) {
  Plan plan{};
  plan.tiles = static_cast<int>((longest + kRows - 1) / kRows);
  plan.padded = static_cast<int>((a.head_dim + 3) / 4 * 4);
  const uintptr_t bytes = 4 * sizeof(T);
  plan.vectors = a.head_dim % 4 == 0 && aligned(a.query, bytes) && aligned(a.key, bytes) &&
                 aligned(a.value, bytes) && aligned(grad_out, bytes);
  return plan;
}

// Launches `kernel` for `heads` heads of the batch; `own` and `other` are tensors of which a block
// holds kRows and 32 rows, `factors` arrays of [kEach][32] a warp.
template <class... Parameters, class... Arguments>
const char* launch_tiles(void (*kernel)(Parameters...), const AttentionArgs& a, const Plan& plan,
                         int64_t heads, int own, int other, int factors, cudaStream_t stream,
                         const Arguments&... arguments) {
  const int64_t blocks = plan.tiles * heads * a.batch;
  if (blocks > INT32_MAX) fail("more than 2^31 - 1 tiles of rows");
  const size_t bytes = sizeof(float) * static_cast<size_t>(own * kRows * plan.padded +
                                                           other * kWarp * row_stride(plan.padded) +
                                                           factors * kWarps * kEach * kWarp);
  if (blocks > 0) {
    launch(kernel, static_cast<unsigned>(blocks), kThreads, bytes, stream, arguments..., plan);
  }
  return launch_error();
}

template <class T, int kChunks>
const char* forward(const AttentionArgs& a, const CudaDropout& dropout, cudaStream_t stream) {
  zero_slack<T>(a.out, a.cu_seqlens_q, a.batch, a.query_length, a.heads, a.head_dim, stream);
  return launch_tiles(forward_kernel<T, kChunks>, a, plan_of<T>(a, a.max_query_length, {}), a.heads,
                      1, 2, 1, stream, a, dropout);
}

template <class T, int kChunks>
const char* backward(const AttentionBackwardArgs& a, const CudaDropout& dropout, float* delta,
                     cudaStream_t stream) {
  zero_slack<T>(a.grad_query, a.cu_seqlens_q, a.batch, a.query_length, a.heads, a.head_dim, stream);
  zero_slack<T>(a.grad_key, a.cu_seqlens_k, a.batch, a.key_length, a.kv_heads, a.head_dim, stream);
  zero_slack<T>(a.grad_value, a.cu_seqlens_k, a.batch, a.key_length, a.kv_heads, a.head_dim,
                stream);
  const char* const error =
      launch_tiles(grad_query_kernel<T, kChunks>, a, plan_of<T>(a, a.max_query_length, a.grad_out),
                   a.heads, 2, 2, 1, stream, a, dropout, delta);
  if (error != nullptr) return error;
  return launch_tiles(grad_key_value_kernel<T, kChunks>, a,
                      plan_of<T>(a, a.max_key_length, a.grad_out), a.kv_heads, 2, 2, 2, stream, a,
                      dropout, static_cast<const float*>(delta));
}

// Calls run(type, chunks) with the type of the elements and how many of them a lane has in a row.
template <class T, class F>
const char* by_width(int64_t head_dim, F&& run) {
  if (head_dim <= 32) return run(Same<T>{}, std::integral_constant<int, 1>{});
  if (head_dim <= 64) return run(Same<T>{}, std::integral_constant<int, 2>{});
  if (head_dim <= 128) return run(Same<T>{}, std::integral_constant<int, 4>{});
  return run(Same<T>{}, std::integral_constant<int, 8>{});
}

template <class F>
const char* by_type(FloatType type, int64_t head_dim, F&& run) {
  if (head_dim > kAttentionCudaMaxHeadDim) return "head_dim: expected at most 256";
  switch (type) {
    case FloatType::float32:
      return by_width<float>(head_dim, run);
    case FloatType::bfloat16:
      return by_width<__nv_bfloat16>(head_dim, run);
    case FloatType::float16:
      return by_width<__half>(head_dim, run);
  }
  return "an unknown type";
}

}  // namespace

const char* attention_forward_cuda(const AttentionArgs& a, FloatType type,
                                   const CudaDropout& dropout, bool tensor_cores, void* stream) {
  if (tensor_cores && attention_has_tensor_cores(a, type)) {
    return attention_forward_tensor_cuda(a, type, dropout, stream);
  }
  return by_type(type, a.head_dim, [&](auto element, auto chunks) {
    return forward<typename decltype(element)::type, decltype(chunks)::value>(
        a, dropout, static_cast<cudaStream_t>(stream));
  });
}

const char* attention_backward_cuda(const AttentionBackwardArgs& a, FloatType type,
                                    const CudaDropout& dropout, float* delta, bool tensor_cores,
                                    void* stream) {
  if (tensor_cores && attention_backward_has_tensor_cores(a, type)) {
    return attention_backward_tensor_cuda(a, type, dropout, stream);
  }
  return by_type(type, a.head_dim, [&](auto element, auto chunks) {
    return backward<typename decltype(element)::type, decltype(chunks)::value>(
        a, dropout, delta, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace transformer_ext
