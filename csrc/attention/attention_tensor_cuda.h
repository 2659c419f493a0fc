// Attention on the tensor cores: bfloat16 and float16, heads of 32, 64 and 128, causal or not, with
// dropout, in packed batches and in padded ones that have key_lengths alone. attention_cuda.cu asks
// for it; `stream` is a cudaStream_t.
#pragma once

#include "attention/attention_cuda.h"

namespace transformer_ext {

// Whether the arguments, the GPU and the build have them.
bool attention_has_tensor_cores(const AttentionArgs& arguments, FloatType type);
bool attention_backward_has_tensor_cores(const AttentionBackwardArgs& arguments, FloatType type);

const char* attention_forward_tensor_cuda(const AttentionArgs& arguments, FloatType type,
                                          const CudaDropout& dropout, void* stream);
const char* attention_backward_tensor_cuda(const AttentionBackwardArgs& arguments, FloatType type,
                                           const CudaDropout& dropout, void* stream);

}  // namespace transformer_ext
