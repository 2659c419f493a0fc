// Embeddings, scaled, with positions added and dropout on the sum, in one pass; and the gradient of
// a table.
#pragma once

#include <cstdint>

#include "common/bfloat16.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "dropout/philox.h"
#include "embedding/indices.h"

namespace transformer_ext {

// out[t] = dropout(weight[ids[t]] * scale + position_table[positions[t]]), out [tokens, columns].
// Dropout: row = t.
template <class T>
struct EmbeddingForward {
  Indices ids;
  const float* weight;  // [.., columns]
  float scale;
  Indices positions;
  const float* position_table;  // [.., columns]; nullptr: no positions
  T* out;
  int64_t tokens;
  int64_t columns;
  Dropout dropout;
};

// grad_weight[i] = scale * sum of dropout(grad[t]) over the tokens with ids[t] == i, in ascending
// order of t; every row is written.
template <class T>
struct EmbeddingBackward {
  const T* grad;  // [tokens, columns]
  Indices ids;
  float scale;
  float* grad_weight;  // [rows, columns]
  int64_t tokens;
  int64_t columns;
  int64_t rows;
  Dropout dropout;
};

struct EmbeddingKernels {
  void (*forward_f32)(const EmbeddingForward<float>&, Parallel&);
  void (*forward_bf16)(const EmbeddingForward<bfloat16>&, Parallel&);
  void (*backward_f32)(const EmbeddingBackward<float>&, Parallel&);
  void (*backward_bf16)(const EmbeddingBackward<bfloat16>&, Parallel&);
};

TRANSFORMER_EXT_KERNELS(EmbeddingKernels, embedding_kernels)

}  // namespace transformer_ext
