// What the two kinds of attention kernels share: attention_cuda.cu, on the ordinary units, and
// attention_tensor_cuda.cu. For *.cu only.
#pragma once

#include <cstdint>

#include "attention/attention_cuda.h"
#include "common/cuda.cuh"

namespace transformer_ext {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

// Where a sequence lies. In a packed batch `query_row` and `key_row` count rows of the batch.
struct Sequence {
  int64_t query_row = 0;
  int64_t key_row = 0;
  int queries = 0;
  int keys = 0;
};

__device__ inline int64_t clamped(int64_t x, int64_t least, int64_t most) {
  return x < least ? least : x > most ? most : x;
}

__device__ inline Sequence sequence_of(const AttentionArgs& a, int64_t b) {
  Sequence s;
  if (a.cu_seqlens_q != nullptr) {
    s.query_row = clamped(a.cu_seqlens_q[b], 0, a.query_length);
    s.key_row = clamped(a.cu_seqlens_k[b], 0, a.key_length);
    s.queries =
        static_cast<int>(clamped(a.cu_seqlens_q[b + 1], s.query_row, a.query_length) - s.query_row);
    s.keys = static_cast<int>(clamped(a.cu_seqlens_k[b + 1], s.key_row, a.key_length) - s.key_row);
  } else {
    s.queries = static_cast<int>(a.query_length);
    s.keys = static_cast<int>(
        a.key_lengths == nullptr ? a.key_length : clamped(a.key_lengths[b], 0, a.key_length));
  }
  return s;
}

// The head_dim elements of a token's head; batch strides are not used in a packed batch.
template <class T>
__device__ inline T* row_of(const AttentionTensor& x, bool packed, int64_t b, int64_t token,
                            int64_t head) {
  return static_cast<T*>(x.data) + (packed ? 0 : b * x.batch_stride) + token * x.token_stride +
         head * x.head_stride;
}

// Which of columns 8 block .. 8 block + 7 dropout keeps, as bits.
__device__ inline unsigned kept_bits(const Dropout& dropout, int64_t row, int block) {
  const PhiloxWords words =
      dropout_words(dropout, static_cast<uint32_t>(row), static_cast<uint32_t>(block));
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    bits |= (dropout_value(words, i) >= dropout.threshold ? 1u : 0u) << i;
  }
  return bits;
}

// The place of a block's work: a tile of rows of a head of a sequence.
struct Place {
  int tile;
  int64_t head;
  int64_t b;
};

__device__ inline Place place_of(int tiles, int64_t heads) {
  const unsigned rest = blockIdx.x / static_cast<unsigned>(tiles);
  return {static_cast<int>(blockIdx.x % static_cast<unsigned>(tiles)),
          static_cast<int64_t>(rest % static_cast<unsigned>(heads)),
          static_cast<int64_t>(rest / static_cast<unsigned>(heads))};
}

// Where the statistics of a query row are; the inverse sums are `statistics_half` further.
__device__ inline int64_t statistics_index(const AttentionArgs& a, const Sequence& s, int64_t b,
                                           int64_t head, int64_t query) {
  return a.cu_seqlens_q != nullptr ? head * a.query_length + s.query_row + query
                                   : (b * a.heads + head) * a.query_length + query;
}
__device__ inline int64_t statistics_half(const AttentionArgs& a) {
  return (a.cu_seqlens_q != nullptr ? 1 : a.batch) * a.heads * a.query_length;
}

// Of a query, in the numbering of dropout.
__device__ inline int64_t token_of(const AttentionArgs& a, const Sequence& s, int64_t b,
                                   int64_t query) {
  return a.cu_seqlens_q != nullptr ? s.query_row + query : b * a.query_length + query;
}

constexpr int kZeroRows = 4;
constexpr int kZeroThreads = kZeroRows * kWarp;

// 0 into the rows behind the last sequence; a warp for each row.
template <class T>
__global__ void __launch_bounds__(kZeroThreads)
    zero_slack_kernel(AttentionTensor x, const int32_t* end, int64_t rows, int64_t heads,
                      int64_t head_dim) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kZeroRows + threadIdx.x / kWarp;
  if (row >= rows || row < *end) return;
  for (int64_t i = threadIdx.x % kWarp; i < heads * head_dim; i += kWarp) {
    const int64_t head = i / head_dim;
    static_cast<T*>(x.data)[row * x.token_stride + head * x.head_stride + (i - head * head_dim)] =
        from_float<T>(0.0f);
  }
}

template <class T>
void zero_slack(const AttentionTensor& x, const int32_t* ends, int64_t batch, int64_t rows,
                int64_t heads, int64_t head_dim, cudaStream_t stream) {
  if (ends == nullptr || rows == 0) return;
  launch(zero_slack_kernel<T>, static_cast<unsigned>((rows + kZeroRows - 1) / kZeroRows),
         kZeroThreads, 0, stream, x, ends + batch, rows, heads, head_dim);
}

}  // namespace
}  // namespace transformer_ext
