// Sums of columns on a GPU: all pointers are device pointers, `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "common/float_type.h"

namespace transformer_ext {

struct ColumnSumCuda {
  const void* x = nullptr;  // [rows, columns] of the type given, rows `stride` elements apart
  int64_t stride = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  bool accumulate = false;
  float* out = nullptr;      // [columns]
  float* scratch = nullptr;  // column_sum_scratch() elements
};

int64_t column_sum_scratch(int64_t rows, int64_t columns);

// Launches and returns at once: null, or the text of the CUDA error.
const char* column_sum_cuda(const ColumnSumCuda& a, FloatType type, void* stream);

}  // namespace transformer_ext
