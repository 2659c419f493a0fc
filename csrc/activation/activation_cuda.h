// The kernels of activation.h on a GPU: all pointers are device pointers, `stream` is a
// cudaStream_t. x, out and the gradients of both are of the type given.
#pragma once

#include <cstdint>

#include "activation/activation_kind.h"
#include "common/float_type.h"
#include "dropout/dropout_cuda.h"

namespace transformer_ext {

struct ActivationForwardCuda {
  const void* x = nullptr;
  const float* bias = nullptr;  // null: 0
  void* out = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;  // of out
  Activation kind = Activation::relu;
  CudaDropout dropout;
};

struct ActivationBackwardCuda {
  const void* grad = nullptr;   // of out
  const void* x = nullptr;      // ReLU: the forward's out
  const float* bias = nullptr;  // null: 0; ReLU: not read
  void* grad_x = nullptr;
  float* grad_bias = nullptr;  // of bias's size; null: not wanted
  float* scratch = nullptr;    // activation_backward_scratch() elements, where grad_bias is wanted
  int64_t rows = 0;
  int64_t columns = 0;  // of out
  Activation kind = Activation::relu;
  CudaDropout dropout;
};

int64_t activation_backward_scratch(int64_t rows, int64_t columns, Activation kind);

// They launch and return at once: null, or the text of the CUDA error.
const char* activation_forward_cuda(const ActivationForwardCuda& a, FloatType type, void* stream);
const char* activation_backward_cuda(const ActivationBackwardCuda& a, FloatType type, void* stream);

}  // namespace transformer_ext
