// Residual connection, dropout and normalisation (LayerNorm, RMSNorm) in one pass over memory.
//
// All matrices are [rows, columns], contiguous. Dropout: row = row, column = column.
#pragma once

#include <cstdint>

#include "common/bfloat16.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "dropout/philox.h"

namespace transformer_ext {

// out = residual + dropout(x); out may be x or residual.
template <class T>
struct ResidualDropout {
  const T* x;
  const T* residual;  // nullptr: 0
  T* out;
  int64_t rows;
  int64_t columns;
  Dropout dropout;
};

// sum = residual + dropout(x); normed = norm(sum as rounded to T) * weight + bias.
template <class T>
struct ResidualNormForward {
  const T* x;
  const T* residual;    // nullptr: 0
  const float* weight;  // nullptr: 1
  const float* bias;    // nullptr: 0
  T* sum;               // may be nullptr without residual and dropout, when it would be x
  T* normed;
  float* mean;  // [rows]; nullptr: not wanted
  float* rstd;  // [rows]; nullptr: not wanted
  int64_t rows;
  int64_t columns;
  bool rms;
  float eps;
  Dropout dropout;
};

template <class T>
struct ResidualNormBackward {
  const T* grad_normed;
  const T* grad_sum;  // nullptr: 0
  const T* sum;
  const float* mean;  // nullptr: 0, as RMSNorm has it
  const float* rstd;
  const float* weight;  // nullptr: 1
  T* grad_x;            // nullptr without dropout, when it would be grad_residual
  T* grad_residual;     // gradient of the sum; nullptr: not wanted (with dropout only)
  float* grad_weight;   // [columns]; nullptr: not wanted
  float* grad_bias;     // [columns]; nullptr: not wanted
  int64_t rows;
  int64_t columns;
  bool rms;
  Dropout dropout;
};

struct ResidualNormKernels {
  void (*dropout_f32)(const ResidualDropout<float>&, Parallel&);
  void (*dropout_bf16)(const ResidualDropout<bfloat16>&, Parallel&);
  void (*forward_f32)(const ResidualNormForward<float>&, Parallel&);
  void (*forward_bf16)(const ResidualNormForward<bfloat16>&, Parallel&);
  void (*backward_f32)(const ResidualNormBackward<float>&, Parallel&);
  void (*backward_bf16)(const ResidualNormBackward<bfloat16>&, Parallel&);
};

TRANSFORMER_EXT_KERNELS(ResidualNormKernels, residual_norm_kernels)

}  // namespace transformer_ext
