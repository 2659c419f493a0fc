// Attention of single queries to keys and values that lie anywhere in memory: the decoder's, to its
// cache of earlier positions and to the encoder's output (section 3.2.1 of the paper).
//
// Positions are named by pointers, so that hypotheses that share a beginning share its cache, and
// reordering the beam moves pointers and not keys.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace transformer_ext {

// The rows of one sentence, which have most or all of their positions in common. What a row gives
// depends on its own query and positions alone, bit for bit, whatever rows stand beside it.
struct CachedAttention {
  const float* query;  // [rows][heads, head_dim]
  int64_t query_stride;
  float* out;  // as query
  int64_t out_stride;
  int64_t rows;
  // Position i of a row is at paths[row * path_stride + i]; its key [kv_heads, head_dim] begins
  // key_offset elements from there, its value value_offset. Elements are bfloat16 or float32.
  const void* const* paths;
  int64_t path_stride;
  int64_t shared;  // in so many positions, from the first on, all rows have the same pointers
  int64_t length;  // at least 1
  // The rows are the last positions themselves, one after the other: each attends to those before
  // it and to itself, and not to those behind it. All have the same pointers.
  bool causal = false;
  int64_t key_offset;
  int64_t value_offset;
  bool bfloat16;
  int64_t heads;
  int64_t kv_heads;  // divides heads
  int64_t head_dim;
  int64_t kv_begin;  // only the queries of kv heads [kv_begin, kv_end) attend
  int64_t kv_end;
  float scale;
  // Null, or [rows][length], rows weights_stride apart: the attention probabilities, averaged over
  // the heads, are added here.
  float* weights = nullptr;
  int64_t weights_stride = 0;
};

struct CachedAttentionKernels {
  // On the calling thread.
  void (*attend)(const CachedAttention&);
  // A row of keys and values as attend() reads them.
  void (*store)(const float* x, int64_t n, bool bfloat16, void* out);
};

TRANSFORMER_EXT_KERNELS(CachedAttentionKernels, cached_attention_kernels)

}  // namespace transformer_ext
