#include "common/torch_op.h"
#include "common/torch_op_cuda.h"
#include "softmax/softmax_check.h"
#include "softmax/softmax_cuda.h"

namespace transformer_ext {
namespace {

SoftmaxType type_of(const Tensor& x, const char* argument) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return SoftmaxType::float32;
    case ScalarType::BFloat16:
      return SoftmaxType::bfloat16;
    case ScalarType::Half:
      return SoftmaxType::float16;
    default:
      CHECK_ARGUMENT(false, argument, ": got ", torch::headeronly::toString(x.scalar_type()),
                     ", expected float32, bfloat16 or float16");
  }
}

Tensor masked_softmax(const Tensor& x, const std::optional<Tensor>& mask,
                      const std::optional<Tensor>& key_lengths, bool causal, bool log) {
  const CudaContext context(x);
  const SoftmaxType type = type_of(x, "x");
  Tensor out = empty_like(x);
  check_launch(
      softmax_forward_cuda(softmax_forward_arguments(x, mask, key_lengths, causal, log, out), type,
                           context.stream),
      "masked_softmax");
  return out;
}

Tensor masked_softmax_backward(const Tensor& grad, const Tensor& output, bool log) {
  const CudaContext context(grad);
  const SoftmaxType type = type_of(grad, "grad");
  Tensor grad_x = empty_like(output);
  check_launch(softmax_backward_cuda(softmax_backward_arguments(grad, output, log, grad_x), type,
                                     context.stream),
               "masked_softmax_backward");
  return grad_x;
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CUDA, m) {
  m.impl("masked_softmax", TORCH_BOX(&transformer_ext::masked_softmax));
  m.impl("masked_softmax_backward", TORCH_BOX(&transformer_ext::masked_softmax_backward));
}
