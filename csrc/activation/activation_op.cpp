#include <tuple>

#include "activation/activation.h"
#include "activation/activation_check.h"
#include "common/torch_op.h"
#include "dropout/dropout_op.h"

namespace transformer_ext {
namespace {

Tensor activation_forward(const Tensor& x, const std::optional<Tensor>& bias, int64_t kind,
                          double dropout_p, const std::optional<Tensor>& rng, int64_t site) {
  const ActivationShape shape = activation_shape(x, bias, kind);
  const Dropout dropout = dropout_argument(dropout_p, rng, site);
  Tensor out = activation_result(x, shape);
  TorchParallel parallel;
  dispatch_float(x, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ActivationForward<T> args{data<T>(x, "x"),
                                    data_or_null<float>(bias, "bias"),
                                    mutable_data<T>(out, "out"),
                                    shape.rows,
                                    shape.columns,
                                    shape.kind,
                                    dropout};
    if constexpr (std::is_same_v<T, float>) {
      activation_kernels().forward_f32(args, parallel);
    } else {
      activation_kernels().forward_bf16(args, parallel);
    }
  });
  return out;
}

// `saved` is x, for ReLU the result; then `bias` says only that its gradient is wanted.
std::tuple<Tensor, Tensor> activation_backward(const Tensor& grad, const Tensor& saved,
                                               const std::optional<Tensor>& bias, int64_t kind,
                                               double dropout_p, const std::optional<Tensor>& rng,
                                               int64_t site) {
  const ActivationShape shape = activation_shape(saved, bias, kind);
  check_activation_gradient(grad, saved, shape);
  const Dropout dropout = dropout_argument(dropout_p, rng, site);
  Tensor grad_x = empty_like(saved);
  Tensor grad_bias = empty({bias ? shape.x_columns : 0}, ScalarType::Float, saved);
  TorchParallel parallel;
  dispatch_float(saved, "saved", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ActivationBackward<T> args{data<T>(grad, "grad"),
                                     data<T>(saved, "saved"),
                                     data_or_null<float>(bias, "bias"),
                                     mutable_data<T>(grad_x, "grad_x"),
                                     bias ? mutable_data<float>(grad_bias, "grad_bias") : nullptr,
                                     shape.rows,
                                     shape.columns,
                                     shape.kind,
                                     dropout};
    if constexpr (std::is_same_v<T, float>) {
      activation_kernels().backward_f32(args, parallel);
    } else {
      activation_kernels().backward_bf16(args, parallel);
    }
  });
  return {grad_x, grad_bias};
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CPU, m) {
  m.impl("activation_forward", TORCH_BOX(&transformer_ext::activation_forward));
  m.impl("activation_backward", TORCH_BOX(&transformer_ext::activation_backward));
}
