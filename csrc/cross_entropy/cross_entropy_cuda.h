// The loss of cross_entropy.h on a GPU: all pointers are device pointers, `stream` is a
// cudaStream_t.
#pragma once

#include <cstdint>

#include "common/float_type.h"

namespace transformer_ext {

// The fields of CrossEntropy (cross_entropy.h). A target outside of [0, columns) that is not
// ignore_index cannot be an error here, as nobody reads it on the host: the loss is NaN, and the
// gradient of its row 0.
struct CrossEntropyCuda {
  const void* logits = nullptr;
  int64_t logits_stride = 0;
  void* grad = nullptr;
  int64_t grad_stride = 0;
  const float* bias = nullptr;
  const int64_t* targets = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t ignore_index = -100;
  float label_smoothing = 0;
  const float* scale = nullptr;  // one number, or null for 1
  float* row_sums = nullptr;     // [3, rows], for the kernels
  double* sums = nullptr;        // [3]: loss, nll, correct
};

// Launches and returns at once: null, or the text of the CUDA error.
const char* cross_entropy_cuda(const CrossEntropyCuda& arguments, FloatType type, void* stream);

}  // namespace transformer_ext
