#include "common/torch_op.h"
#include "softmax/softmax.h"
#include "softmax/softmax_check.h"

namespace transformer_ext {
namespace {

template <class F>
auto with_type(const Tensor& x, const char* argument, F&& f) {
  return dispatch_float(x, argument, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return f(std::is_same_v<T, float> ? SoftmaxType::float32 : SoftmaxType::bfloat16);
  });
}

Tensor masked_softmax(const Tensor& x, const std::optional<Tensor>& mask,
                      const std::optional<Tensor>& key_lengths, bool causal, bool log) {
  Tensor out = empty_like(x);
  const SoftmaxForward arguments =
      softmax_forward_arguments(x, mask, key_lengths, causal, log, out);
  check_lengths(arguments.keep.key_lengths, "key_lengths", x.size(0), arguments.columns);
  TorchParallel parallel;
  with_type(x, "x",
            [&](SoftmaxType type) { softmax_kernels().forward(arguments, type, parallel); });
  return out;
}

Tensor masked_softmax_backward(const Tensor& grad, const Tensor& output, bool log) {
  Tensor grad_x = empty_like(output);
  const SoftmaxBackward arguments = softmax_backward_arguments(grad, output, log, grad_x);
  TorchParallel parallel;
  with_type(grad, "grad",
            [&](SoftmaxType type) { softmax_kernels().backward(arguments, type, parallel); });
  return grad_x;
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CPU, m) {
  m.impl("masked_softmax", TORCH_BOX(&transformer_ext::masked_softmax));
  m.impl("masked_softmax_backward", TORCH_BOX(&transformer_ext::masked_softmax_backward));
}
