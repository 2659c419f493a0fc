// The kernels of softmax.h on a GPU: all pointers are device pointers, `stream` is a cudaStream_t.
#pragma once

#include "softmax/softmax.h"

namespace transformer_ext {

// Both launch and return at once: null, or the text of the CUDA error. At most 2^31 - 1 rows.
const char* softmax_forward_cuda(const SoftmaxForward& arguments, SoftmaxType type, void* stream);
const char* softmax_backward_cuda(const SoftmaxBackward& arguments, SoftmaxType type, void* stream);

}  // namespace transformer_ext
