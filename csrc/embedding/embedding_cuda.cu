// Forward: 4 bytes of the table (from the cache where ids repeat) and 2 of the result a bfloat16
// element. Expected of copy bandwidth on these bytes, not measured: 85 %.
//
// Backward: the tokens are sorted by id, stably, by 8 bits at a time (3 kernels for each 8 bits of
// the table's size: 2 times for up to 65,536 ids), then a block for each row of the table adds up
// its tokens in their order. So no sum depends on which thread comes first, as atomics would have
// it. Bytes: 4 a table element, 2 a token element. Expected, not measured: 60 % of copy bandwidth
// at 25,000 tokens and 37,000 ids, where the 8 small kernels take about as long as the rows do.
#include <cstdint>

#include "common/cuda_chunks.cuh"
#include "embedding/embedding_cuda.h"

namespace transformer_ext {
namespace {

__device__ inline int64_t index_of(const Indices& indices, int64_t i) {
  return indices.wide != nullptr ? indices.wide[i] : indices.narrow[i];
}

__device__ inline float not_a_number() { return __int_as_float(0x7fffffff); }

template <class T, bool kVector>
__global__ void __launch_bounds__(kFlatThreads) forward_chunks(EmbeddingForwardCuda a) {
  const uint32_t across = static_cast<uint32_t>((a.columns + kChunk - 1) / kChunk);
  const uint32_t index = blockIdx.x * kFlatThreads + threadIdx.x;
  const int64_t token = index / across;
  if (token >= a.tokens) return;
  const uint32_t chunk = index % across;
  const int64_t column = static_cast<int64_t>(chunk) * kChunk;
  const int64_t n = a.columns - column;
  const int64_t id = index_of(a.ids, token);
  const int64_t place = a.position_table == nullptr ? 0 : index_of(a.positions, token);
  bool inside = id >= 0 && id < a.rows;
  if (a.position_table != nullptr) inside = inside && place >= 0 && place < a.position_rows;
  float v[kChunk];
  if (inside) {
    load_chunk<kVector>(a.weight + id * a.columns + column, n, v);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] *= a.scale;
    if (a.position_table != nullptr) {
      float position[kChunk];
      load_chunk<kVector>(a.position_table + place * a.columns + column, n, position);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] += position[i];
    }
    if (a.dropout.threshold != 0) drop_chunk(read_dropout(a.dropout), token, chunk, v);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = not_a_number();
  }
  store_chunk<kVector>(static_cast<T*>(a.out) + token * a.columns + column, n, v);
}

// ---- Sorting the tokens by id -------------------------------------------------------------------

constexpr int kDigits = 256;
constexpr int kSortThreads = 256;  // tokens of a block, and one for each digit
constexpr int kSortWarps = kSortThreads / kWarp;
static_assert(kSortThreads == kDigits, "a thread a digit");

// Ids and tokens in one order or the other; the first pass reads the ids as they came.
struct SortArguments {
  Indices ids;  // of the first pass only
  const int32_t* keys_in;
  const int32_t* tokens_in;
  int32_t* keys_out;
  int32_t* tokens_out;
  int32_t* counts;  // [kDigits][blocks]: how often, then: how often in earlier blocks
  int32_t* totals;  // [kDigits]
  int64_t count;    // tokens
  int64_t rows;
  int64_t blocks;
  int shift;
  bool first;
};

// Ids outside of the table come after all others, as `rows`.
__device__ inline int32_t sort_key(const SortArguments& a, int64_t i) {
  if (!a.first) return a.keys_in[i];
  const int64_t id = index_of(a.ids, i);
  return static_cast<int32_t>(id >= 0 && id < a.rows ? id : a.rows);
}

__global__ void __launch_bounds__(kSortThreads) count_digits(SortArguments a) {
  TRANSFORMER_EXT_SHARED(int, count, kDigits);
  count[threadIdx.x] = 0;
  __syncthreads();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  if (i < a.count) atomicAdd(&count[sort_key(a, i) >> a.shift & (kDigits - 1)], 1);
  __syncthreads();
  a.counts[threadIdx.x * a.blocks + blockIdx.x] = count[threadIdx.x];
}

// v becomes the sum of the v of all threads before; returns the sum of all. 256 threads.
__device__ inline int exclusive_sum(int& v) {
  TRANSFORMER_EXT_SHARED(int, warp_sums, kSortWarps);
  const int lane = threadIdx.x % kWarp;
  int inclusive = v;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int before = __shfl_up_sync(kAllLanes, inclusive, offset);
    if (lane >= offset) inclusive += before;
  }
  __syncthreads();  // the last use of `warp_sums` is over
  if (lane == kWarp - 1) warp_sums[threadIdx.x / kWarp] = inclusive;
  __syncthreads();
  int total = 0;
  int before = 0;
#pragma unroll
  for (int warp = 0; warp < kSortWarps; ++warp) {
    if (warp == static_cast<int>(threadIdx.x) / kWarp) before = total;
    total += warp_sums[warp];
  }
  v = before + inclusive - v;
  return total;
}

// One block a digit: its counts become those of the blocks before.
__global__ void __launch_bounds__(kSortThreads) sum_counts(SortArguments a) {
  int32_t* const counts = a.counts + blockIdx.x * a.blocks;
  int before = 0;
  for (int64_t first = 0; first < a.blocks; first += kSortThreads) {
    const int64_t i = first + threadIdx.x;
    int v = i < a.blocks ? counts[i] : 0;
    const int total = exclusive_sum(v);
    if (i < a.blocks) counts[i] = before + v;
    before += total;
  }
  if (threadIdx.x == 0) a.totals[blockIdx.x] = before;
}

// A token goes behind all of lower digits, those of its digit in earlier blocks, in earlier warps
// and in lower lanes.
__global__ void __launch_bounds__(kSortThreads) place_tokens(SortArguments a) {
  TRANSFORMER_EXT_SHARED(int, starts, kDigits);
  TRANSFORMER_EXT_SHARED(int, of_warps, kSortWarps* kDigits);
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  int start = a.totals[threadIdx.x];
  exclusive_sum(start);
  starts[threadIdx.x] = start + a.counts[threadIdx.x * a.blocks + blockIdx.x];
  for (int w = 0; w < kSortWarps; ++w) of_warps[w * kDigits + threadIdx.x] = 0;
  __syncthreads();

  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  const bool inside = i < a.count;
  const int32_t key = inside ? sort_key(a, i) : 0;
  const int digit = inside ? key >> a.shift & (kDigits - 1) : -1;
  const unsigned same = __match_any_sync(kAllLanes, digit);
  const int rank = __popc(same & ((1u << lane) - 1u));
  if (inside && rank == 0) of_warps[warp * kDigits + digit] = __popc(same);
  __syncthreads();
  int before = starts[threadIdx.x];
  for (int w = 0; w < kSortWarps; ++w) {
    const int count = of_warps[w * kDigits + threadIdx.x];
    of_warps[w * kDigits + threadIdx.x] = before;
    before += count;
  }
  __syncthreads();
  if (!inside) return;
  const int to = of_warps[warp * kDigits + digit] + rank;
  a.keys_out[to] = key;
  a.tokens_out[to] = a.first ? static_cast<int32_t>(i) : a.tokens_in[i];
}

// Where each id's tokens begin and end in the sorted order; both are 0 where it has none.
__global__ void __launch_bounds__(kFlatThreads)
    find_segments(const int32_t* keys, int64_t count, int64_t rows, int32_t* begins,
                  int32_t* ends) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (i >= count) return;
  const int32_t key = keys[i];
  if (key >= rows) return;
  if (i == 0 || keys[i - 1] != key) begins[key] = static_cast<int32_t>(i);
  if (i + 1 == count || keys[i + 1] != key) ends[key] = static_cast<int32_t>(i) + 1;
}

// ---- The sums -----------------------------------------------------------------------------------

constexpr int kSumThreads = 128;
constexpr int kSumWarps = kSumThreads / kWarp;

// One block a row of the table: 256 columns at a time, each warp a quarter of the row's tokens in
// their order, then the warps in their order.
template <class T, bool kVector>
__global__ void __launch_bounds__(kSumThreads)
    sum_tokens(EmbeddingBackwardCuda a, const int32_t* tokens, const int32_t* begins,
               const int32_t* ends) {
  TRANSFORMER_EXT_SHARED(float, sums, kSumWarps* kTileColumns);
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int begin = begins[row];
  const int end = ends[row];
  const int share = (end - begin + kSumWarps - 1) / kSumWarps;
  const int from = begin + warp * share;
  const int to = from + share < end ? from + share : end;
  const Dropout dropout = read_dropout(a.dropout);
  const float scale = a.scale * (dropout.threshold != 0 ? dropout.scale : 1.0f);
  float* const out = a.grad_weight + row * a.columns;
  for (int64_t first = 0; first < a.columns; first += kTileColumns) {
    const int64_t column = first + lane * kChunk;
    const int64_t n = a.columns - column;
    float sum[kChunk] = {};
    if (n > 0) {
      for (int k = from; k < to; ++k) {
        const int64_t token = tokens[k];
        float v[kChunk];
        load_chunk<kVector>(static_cast<const T*>(a.grad) + token * a.columns + column, n, v);
        if (dropout.threshold != 0) {
          const PhiloxWords words = dropout_words(dropout, static_cast<uint32_t>(token),
                                                  static_cast<uint32_t>(column / kChunk));
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            if (dropout_value(words, i) < dropout.threshold) v[i] = 0.0f;
          }
        }
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum[i] += v[i] * scale;
      }
    }
    if (end - begin <= 1) {
      // All of most rows: no token, or one, which is the first warp's.
      if (warp == 0 && n > 0) store_chunk<kVector>(out + column, n, sum);
      continue;
    }
    __syncthreads();  // the last use of `sums` is over
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      sums[warp * kTileColumns + lane * kChunk + i] = sum[i];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < kTileColumns && first + c < a.columns; c += kSumThreads) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kSumWarps; ++w) total += sums[w * kTileColumns + c];
      out[first + c] = total;
    }
  }
}

// scratch: keys and tokens twice (int32 [tokens] each), begins and ends (int32 [rows] each),
// counts, totals.
int64_t sort_blocks(int64_t tokens) { return divide_up(tokens, kSortThreads); }

}  // namespace

int64_t embedding_backward_scratch(int64_t tokens, int64_t rows) {
  return 4 * tokens + 2 * rows + kDigits * sort_blocks(tokens) + kDigits;
}

const char* embedding_forward_cuda(const EmbeddingForwardCuda& a, FloatType type, void* stream) {
  if (a.tokens == 0 || a.columns == 0) return nullptr;
  if (!fits_flat(a.tokens, a.columns)) return "more than 2^35 elements or 2^31 - 1 tokens";
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    launch(vectors_fit(a.columns, a.weight, a.position_table, a.out) ? forward_chunks<T, true>
                                                                     : forward_chunks<T, false>,
           flat_blocks(a.tokens, a.columns), kFlatThreads, 0, on, a);
  });
  return launch_error();
}

const char* embedding_backward_cuda(const EmbeddingBackwardCuda& a, FloatType type, void* stream) {
  if (a.rows == 0 || a.columns == 0) return nullptr;
  if (a.tokens > INT32_MAX - kSortThreads || a.rows >= INT32_MAX) {
    return "more than 2^31 tokens or ids";
  }
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  int32_t* const keys[2] = {a.scratch, a.scratch + 2 * a.tokens};
  int32_t* const tokens[2] = {keys[0] + a.tokens, keys[1] + a.tokens};
  int32_t* const begins = a.scratch + 4 * a.tokens;
  int32_t* const ends = begins + a.rows;
  SortArguments sort{};
  sort.ids = a.ids;
  sort.counts = ends + a.rows;
  sort.blocks = sort_blocks(a.tokens);
  sort.totals = sort.counts + kDigits * sort.blocks;
  sort.count = a.tokens;
  sort.rows = a.rows;
  sort.first = true;
  set_to_zero(begins, static_cast<size_t>(2 * a.rows) * sizeof(int32_t), on);
  int at = 0;
  if (a.tokens > 0) {
    const unsigned blocks = static_cast<unsigned>(sort.blocks);
    // Keys go up to and including `rows`.
    for (; sort.first || (a.rows >> sort.shift) != 0; sort.shift += 8) {
      sort.keys_in = keys[at];
      sort.tokens_in = tokens[at];
      at = 1 - at;
      sort.keys_out = keys[at];
      sort.tokens_out = tokens[at];
      launch(count_digits, blocks, kSortThreads, 0, on, sort);
      launch(sum_counts, kDigits, kSortThreads, 0, on, sort);
      launch(place_tokens, blocks, kSortThreads, 0, on, sort);
      sort.first = false;
    }
    launch(find_segments, static_cast<unsigned>(divide_up(a.tokens, kFlatThreads)), kFlatThreads, 0,
           on, keys[at], a.tokens, a.rows, begins, ends);
  }
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    launch(
        vectors_fit(a.columns, a.grad, a.grad_weight) ? sum_tokens<T, true> : sum_tokens<T, false>,
        static_cast<unsigned>(a.rows), kSumThreads, 0, on, a,
        static_cast<const int32_t*>(tokens[at]), static_cast<const int32_t*>(begins),
        static_cast<const int32_t*>(ends));
  });
  return launch_error();
}

}  // namespace transformer_ext
