// Scaled dot-product attention ("Attention Is All You Need", section 3.2.1), forward and backward,
// for packed and padded batches, without a [length, length] matrix in memory.
//
// Backward makes the weights again, tile by tile, from the scores and two saved numbers a row, as
// in FlashAttention (T. Dao et al., 2022, section 3.1): the maximum and the inverse of the sum of
// the exponentials. (One number, the logarithm of the sum, would be less exact: its own rounding
// error grows with the scores.)
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/parallel.h"
#include "dropout/philox.h"

namespace transformer_ext {

// [batch, length, heads, head_dim] (padded) or [rows, heads, head_dim] (packed; the batch stride is
// not used). Strides count elements; that of head_dim is 1.
struct AttentionTensor {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

struct AttentionArgs {
  bool bfloat16 = false;  // type of all AttentionTensors; else float32
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;  // divides heads
  int64_t head_dim = 0;
  int64_t query_length = 0;  // packed: number of rows, slack included
  int64_t key_length = 0;
  int64_t max_query_length = 0;  // bound on one sequence; padded: query_length
  int64_t max_key_length = 0;

  // Packed: both [batch + 1], ascending from 0. Padded: null.
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;

  // Padded only; each may be null. Strides by batch, head, query, key; 0 where broadcast.
  const int64_t* key_lengths = nullptr;
  const uint8_t* mask = nullptr;  // 0 = may not attend
  int64_t mask_strides[4] = {};
  const float* bias = nullptr;  // added to the scaled scores; -inf masks
  int64_t bias_strides[4] = {};

  bool causal = false;
  float scale = 1.0f;
  Dropout dropout;  // row = query token * heads + head, column = key in its sequence

  AttentionTensor query, key, value, out;
  // For backward; forward takes null where there will be none. Maximum, times log2(e), and inverse
  // sum, both 0 where a query may attend to nothing: [2, heads, rows] (packed) or [2, batch, heads,
  // query_length] (padded). Slack rows are left undefined.
  float* statistics = nullptr;
};

struct AttentionBackwardArgs : AttentionArgs {
  AttentionTensor grad_out, grad_query, grad_key, grad_value;
  // Null, or the gradient of bias: strides as bias_strides.
  float* grad_bias = nullptr;
};

struct AttentionKernels {
  void (*forward)(const AttentionArgs&, Parallel&);
  void (*backward)(const AttentionBackwardArgs&, Parallel&);
};

TRANSFORMER_EXT_KERNELS(AttentionKernels, attention_kernels)

}  // namespace transformer_ext
