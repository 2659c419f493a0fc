// What a CUDA op needs besides torch_op.h. For `*_op_cuda.cpp` only, which the C++ compiler
// compiles, without CUDA's headers; the kernels' launchers, declared in
// csrc/<subject>/<subject>_cuda.h and defined in the .cu, take the stream as a void*.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "common/float_type.h"
#include "common/torch_op.h"
#include "dropout/dropout_cuda.h"

// Lives in libtorch_cuda.so. Weak, so that the library loads (and is of no use) in a CPU-only
// torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace transformer_ext {

// While it lives, the device of `x` is the current one (else a kernel for a tensor on cuda:1 would
// be launched on cuda:0), and `stream` is torch's current stream there: a cudaStream_t.
struct CudaContext {
  explicit CudaContext(const Tensor& x) : guard(checked_index(x)) {
    CHECK_AS(std::runtime_error, aoti_torch_get_current_cuda_stream != nullptr,
             "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }

  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

 private:
  // The dispatcher comes here with any tensor on a GPU.
  static int32_t checked_index(const Tensor& x) {
    CHECK_ARGUMENT(x.is_cuda(), "got tensors on ", device_string(x),
                   " and on a GPU, expected one device");
    return x.get_device_index();
  }
};

inline FloatType float_type_of(const Tensor& x, const char* argument) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return FloatType::float32;
    case ScalarType::BFloat16:
      return FloatType::bfloat16;
    case ScalarType::Half:
      return FloatType::float16;
    default:
      CHECK_ARGUMENT(false, argument, ": got ", torch::headeronly::toString(x.scalar_type()),
                     ", expected float32, bfloat16 or float16");
  }
}

// The same tensor's pointer, on the device of `like`; null without one.
template <class T>
const T* data_or_null(const std::optional<Tensor>& x, const char* argument, const Tensor& like) {
  if (!x) return nullptr;
  check_device(*x, argument, like);
  check_contiguous(*x, argument);
  return data<T>(*x, argument);
}

// Off without rng, or when p rounds to 0. rng is on the device of `like` and is read there.
inline CudaDropout cuda_dropout_argument(double p, const std::optional<Tensor>& rng, int64_t site,
                                         const Tensor& like) {
  CHECK_ARGUMENT(p >= 0.0 && p <= 1.0, "dropout_p: got ", p, ", expected a number from 0 to 1");
  CHECK_ARGUMENT(site >= 0 && site < 65536, "site: got ", site,
                 ", expected a number from 0 to 65535");
  if (rng) check_shape(*rng, "rng", {3});
  return cuda_dropout(data_or_null<int64_t>(rng, "rng", like), site, p);
}

// The launchers return an error's text, or nullptr where all is well.
inline void check_launch(const char* error, const char* op, const char* others = "") {
  CHECK_AS(std::runtime_error, error == nullptr, op, ": ", error, ". ", others,
           "TRANSFORMER_EXT_BACKEND=reference computes it in plain PyTorch");
}

}  // namespace transformer_ext
