// What a CUDA op needs besides torch_op.h. For `*_op_cuda.cpp` only, which the C++ compiler
// compiles, without CUDA's headers; the kernels' launchers, declared in
// csrc/<subject>/<subject>_cuda.h and defined in the .cu, take the stream as a void*.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "common/torch_op.h"

// Lives in libtorch_cuda.so. Weak, so that the library loads (and is of no use) in a CPU-only
// torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace transformer_ext {

// While it lives, the device of `x` is the current one (else a kernel for a tensor on cuda:1 would
// be launched on cuda:0), and `stream` is torch's current stream there: a cudaStream_t.
struct CudaContext {
  explicit CudaContext(const Tensor& x) : guard(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }

  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

// The launchers return cudaGetLastError()'s text, or nullptr where all is well.
inline void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, op, ": ", error);
}

}  // namespace transformer_ext
