// Label-smoothed cross-entropy of rows of logits (Attention Is All You Need, section 5.4), with the
// gradient written in the same visit: while a row is in the cache its maximum, its sums and its
// gradient are computed.
//
// Row loss: log sum exp(x) - (1 - s) x[target] - s / V sum(x) for smoothing s and V columns; its
// gradient: softmax(x) - s / V - (1 - s) [column = target]. Rows whose target is ignore_index have
// loss 0 and gradient 0.
#pragma once

#include <cstdint>

#include "common/bfloat16.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace transformer_ext {

struct CrossEntropySums {
  double loss = 0;     // smoothed, nats
  double nll = 0;      // without smoothing, nats
  double correct = 0;  // rows whose target is the first of the greatest logits
};

template <class T>
struct CrossEntropy {
  const T* logits = nullptr;  // [rows, columns]
  int64_t logits_stride = 0;  // elements from row to row
  T* grad = nullptr;          // [rows, columns], may be logits; null: no gradient
  int64_t grad_stride = 0;
  const float* bias = nullptr;       // [columns], added to each row of logits, or null
  const int64_t* targets = nullptr;  // [rows], in [0, columns) or ignore_index
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t ignore_index = -100;
  float label_smoothing = 0;
  float scale = 1;  // multiplies the gradient, not the sums
};

struct CrossEntropyKernels {
  // The sums over the rows, added in ascending order.
  CrossEntropySums (*cross_entropy_float32)(const CrossEntropy<float>&, Parallel&);
  CrossEntropySums (*cross_entropy_bfloat16)(const CrossEntropy<bfloat16>&, Parallel&);

  // out[j] (+)= sum over rows of x[row, j], rows in ascending order. x: [rows, columns] with the
  // given stride in elements; accumulate: add to out rather than write it.
  void (*column_sum_float32)(const float* x, int64_t stride, int64_t rows, int64_t columns,
                             bool accumulate, float* out, Parallel&);
  void (*column_sum_bfloat16)(const bfloat16* x, int64_t stride, int64_t rows, int64_t columns,
                              bool accumulate, float* out, Parallel&);
};

TRANSFORMER_EXT_KERNELS(CrossEntropyKernels, cross_entropy_kernels)

}  // namespace transformer_ext
