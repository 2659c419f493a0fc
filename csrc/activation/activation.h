// Bias, non-linearity (plain or gated) and dropout in one pass over memory.
#pragma once

#include <cstdint>

#include "activation/activation_kind.h"
#include "common/bfloat16.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "dropout/philox.h"

namespace transformer_ext {

// out[row, c] = dropout(act(x[row, c] + bias[c])), all [rows, columns], contiguous. Gated kinds: x
// is [rows, 2 * columns], the gate's columns first, bias likewise. Dropout: row = row, column = c.
template <class T>
struct ActivationForward {
  const T* x;
  const float* bias;  // nullptr: 0
  T* out;
  int64_t rows;
  int64_t columns;  // of out
  Activation kind;
  Dropout dropout;
};

// ReLU needs of the forward pass no more than where its output is 0: by x <= 0 or by dropout. The
// next product keeps the output anyway and has just read it, so x need not be kept, and no mask
// made again.
template <class T>
struct ActivationBackward {
  const T* grad;      // of out
  const T* x;         // ReLU: the forward's out
  const float* bias;  // nullptr: 0; ReLU: not read
  T* grad_x;
  float* grad_bias;  // of bias's size; nullptr: not wanted
  int64_t rows;
  int64_t columns;  // of out
  Activation kind;
  Dropout dropout;
};

struct ActivationKernels {
  void (*forward_f32)(const ActivationForward<float>&, Parallel&);
  void (*forward_bf16)(const ActivationForward<bfloat16>&, Parallel&);
  void (*backward_f32)(const ActivationBackward<float>&, Parallel&);
  void (*backward_bf16)(const ActivationBackward<bfloat16>&, Parallel&);
};

TRANSFORMER_EXT_KERNELS(ActivationKernels, activation_kernels)

}  // namespace transformer_ext
