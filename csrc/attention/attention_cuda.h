// The kernels of attention.h on a GPU: all pointers are device pointers, `stream` is a
// cudaStream_t.
#pragma once

#include "attention/attention.h"
#include "common/float_type.h"
#include "dropout/dropout_cuda.h"

namespace transformer_ext {

constexpr int64_t kAttentionCudaMaxHeadDim = 256;

// Both launch and return at once: null, or the text of the CUDA error. `bfloat16` and `dropout` of
// the arguments are not read: the type and dropout come beside them, and so does what the tables of
// packed sequences must not exceed, which are read on the device alone: a wrong one gives wrong
// results, but stays within the tensors. `tensor_cores`: whether they may be used, where they fit.
const char* attention_forward_cuda(const AttentionArgs& arguments, FloatType type,
                                   const CudaDropout& dropout, bool tensor_cores, void* stream);
// `delta` is memory for one float for each head of each query row. There is no gradient of bias.
const char* attention_backward_cuda(const AttentionBackwardArgs& arguments, FloatType type,
                                    const CudaDropout& dropout, float* delta, bool tensor_cores,
                                    void* stream);

}  // namespace transformer_ext
