// The kernels of residual_norm.h on a GPU: all pointers are device pointers, `stream` is a
// cudaStream_t. x, residual, sum, normed and their gradients are of the type given.
#pragma once

#include <cstdint>

#include "common/float_type.h"
#include "dropout/dropout_cuda.h"

namespace transformer_ext {

struct ResidualDropoutCuda {
  const void* x = nullptr;
  const void* residual = nullptr;  // null: 0
  void* out = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  CudaDropout dropout;
};

struct ResidualNormForwardCuda {
  const void* x = nullptr;
  const void* residual = nullptr;  // null: 0
  const float* weight = nullptr;   // null: 1
  const float* bias = nullptr;     // null: 0
  void* sum = nullptr;             // null: without residual and dropout, when it would be x
  void* normed = nullptr;
  float* mean = nullptr;  // [rows]; null: not wanted
  float* rstd = nullptr;  // [rows]; null: not wanted
  int64_t rows = 0;
  int64_t columns = 0;
  bool rms = false;
  float eps = 0.0f;
  CudaDropout dropout;
};

struct ResidualNormBackwardCuda {
  const void* grad_normed = nullptr;
  const void* grad_sum = nullptr;  // null: 0
  const void* sum = nullptr;
  const float* mean = nullptr;  // null: 0, as RMSNorm has it
  const float* rstd = nullptr;
  const float* weight = nullptr;  // null: 1
  void* grad_x = nullptr;         // null: without dropout, when it would be grad_residual
  void* grad_residual = nullptr;
  float* grad_weight = nullptr;  // [columns]; null: not wanted
  float* grad_bias = nullptr;    // [columns]; null: not wanted
  float* scratch = nullptr;      // residual_norm_backward_scratch() elements
  int64_t rows = 0;
  int64_t columns = 0;
  bool rms = false;
  CudaDropout dropout;
};

int64_t residual_norm_backward_scratch(int64_t rows, int64_t columns);

// They launch and return at once: null, or the text of the CUDA error.
const char* residual_dropout_cuda(const ResidualDropoutCuda& a, FloatType type, void* stream);
const char* residual_norm_forward_cuda(const ResidualNormForwardCuda& a, FloatType type,
                                       void* stream);
const char* residual_norm_backward_cuda(const ResidualNormBackwardCuda& a, FloatType type,
                                        void* stream);

}  // namespace transformer_ext
