// Masked softmax and log-softmax over rows (Attention Is All You Need, equation 1, section 3.2.3).
//
// A slot is kept if every given mask keeps it; a slot of -inf is masked. Masked slots hold 0
// (log: -inf) and have no effect, whatever stands in them; a row without a kept slot is 0, forward
// and backward.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/parallel.h"

namespace transformer_ext {

constexpr int kSoftmaxMaxDims = 8;

// Element type of x, out and the gradients: the row pointers below are of this type.
enum class SoftmaxType { float32, bfloat16, float16 };

// Which slots of a row are kept. Rows are numbered in row-major order of the leading dimensions.
struct SoftmaxMask {
  const uint8_t* mask = nullptr;  // keep-mask (0 or 1), or null
  int dims = 0;                   // leading dimensions of x: all but the last
  int64_t sizes[kSoftmaxMaxDims] = {};
  int64_t strides[kSoftmaxMaxDims] = {};  // of the mask, 0 where it is broadcast
  int64_t column_stride = 0;              // of the mask: 1, or 0 where it is broadcast
  const int64_t* key_lengths = nullptr;   // [sizes[0]], slots at or after it are masked, or null
  bool causal = false;                    // row i of the dimension before the last keeps j <= i
};

struct SoftmaxForward {
  const void* x = nullptr;  // [rows, columns], contiguous
  void* out = nullptr;      // [rows, columns], contiguous
  int64_t rows = 0;
  int64_t columns = 0;
  SoftmaxMask keep;
  bool log = false;
};

struct SoftmaxBackward {
  const void* grad = nullptr;    // [rows, columns], contiguous
  const void* output = nullptr;  // the forward's out
  void* grad_x = nullptr;        // [rows, columns], contiguous; may be grad
  int64_t rows = 0;
  int64_t columns = 0;
  bool log = false;
};

struct SoftmaxKernels {
  void (*forward)(const SoftmaxForward&, SoftmaxType, Parallel&);    // float32 or bfloat16
  void (*backward)(const SoftmaxBackward&, SoftmaxType, Parallel&);  // float32 or bfloat16
};

TRANSFORMER_EXT_KERNELS(SoftmaxKernels, softmax_kernels)

}  // namespace transformer_ext
