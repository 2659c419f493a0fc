// Attention of single queries to keys and values that lie anywhere in memory: the decoder's, to its
// cache of earlier positions and to the encoder's output (section 3.2.1 of the paper).
//
// Positions are named by pointers, so that hypotheses that share a beginning share its cache, and
// reordering the beam moves pointers and not keys.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace transformer_ext {

struct CachedAttention {
  const float* query;        // [heads, head_dim]
  const float* const* keys;  // [length]: the key of a position is keys[i] + key_offset,
  int64_t key_offset;        //   [kv_heads, head_dim]
  int64_t value_offset;      // its value is keys[i] + value_offset
  int64_t length;            // at least 1
  int64_t heads;
  int64_t kv_heads;  // divides heads
  int64_t head_dim;
  float scale;
  float* scores;  // scratch, [length rounded up to 16]
  float* out;     // [heads, head_dim]
  // Null, or [length]: the attention probabilities, averaged over the heads, are added here.
  float* weights = nullptr;
};

struct CachedAttentionKernels {
  // One query, on the calling thread; its result depends on nothing but its own arguments.
  void (*attend)(const CachedAttention&);
};

TRANSFORMER_EXT_KERNELS(CachedAttentionKernels, cached_attention_kernels)

}  // namespace transformer_ext
