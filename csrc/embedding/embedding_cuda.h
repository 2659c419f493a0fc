// The kernels of embedding.h on a GPU: all pointers are device pointers, `stream` is a
// cudaStream_t. An id outside of its table cannot be told to the host without waiting for it: the
// token's row of the result is NaN, and it has no gradient.
#pragma once

#include <cstdint>

#include "common/float_type.h"
#include "dropout/dropout_cuda.h"
#include "embedding/indices.h"

namespace transformer_ext {

struct EmbeddingForwardCuda {
  Indices ids{};
  const float* weight = nullptr;  // [rows, columns]
  int64_t rows = 0;
  float scale = 1.0f;
  Indices positions{};
  const float* position_table = nullptr;  // [position_rows, columns]; null: no positions
  int64_t position_rows = 0;
  void* out = nullptr;  // [tokens, columns], of the type given
  int64_t tokens = 0;
  int64_t columns = 0;
  CudaDropout dropout;
};

struct EmbeddingBackwardCuda {
  const void* grad = nullptr;  // [tokens, columns], of the type given
  Indices ids{};
  float scale = 1.0f;
  float* grad_weight = nullptr;  // [rows, columns]: every row is written
  int32_t* scratch = nullptr;    // embedding_backward_scratch() elements
  int64_t tokens = 0;
  int64_t columns = 0;
  int64_t rows = 0;
  CudaDropout dropout;
};

int64_t embedding_backward_scratch(int64_t tokens, int64_t rows);

// They launch and return at once: null, or the text of the CUDA error.
const char* embedding_forward_cuda(const EmbeddingForwardCuda& a, FloatType type, void* stream);
const char* embedding_backward_cuda(const EmbeddingBackwardCuda& a, FloatType type, void* stream);

}  // namespace transformer_ext
