#include <tuple>

#include "activation/activation_check.h"
#include "activation/activation_cuda.h"
#include "common/torch_op.h"
#include "common/torch_op_cuda.h"

namespace transformer_ext {
namespace {

Tensor activation_forward(const Tensor& x, const std::optional<Tensor>& bias, int64_t kind,
                          double dropout_p, const std::optional<Tensor>& rng, int64_t site) {
  const CudaContext context(x);
  const ActivationShape shape = activation_shape(x, bias, kind);
  const FloatType type = float_type_of(x, "x");
  Tensor out = activation_result(x, shape);
  check_launch(activation_forward_cuda({x.const_data_ptr(), data_or_null<float>(bias, "bias", x),
                                        out.mutable_data_ptr(), shape.rows, shape.columns,
                                        shape.kind, cuda_dropout_argument(dropout_p, rng, site, x)},
                                       type, context.stream),
               "activation_forward");
  return out;
}

std::tuple<Tensor, Tensor> activation_backward(const Tensor& grad, const Tensor& saved,
                                               const std::optional<Tensor>& bias, int64_t kind,
                                               double dropout_p, const std::optional<Tensor>& rng,
                                               int64_t site) {
  const CudaContext context(saved);
  const ActivationShape shape = activation_shape(saved, bias, kind);
  const FloatType type = float_type_of(saved, "saved");
  check_device(grad, "grad", saved);
  check_type(grad, "grad", saved.scalar_type());
  check_activation_gradient(grad, saved, shape);
  Tensor grad_x = empty_like(saved);
  Tensor grad_bias = empty({bias ? shape.x_columns : 0}, ScalarType::Float, saved);
  Tensor scratch =
      empty({bias ? activation_backward_scratch(shape.rows, shape.columns, shape.kind) : 0},
            ScalarType::Float, saved);
  ActivationBackwardCuda a;
  a.grad = grad.const_data_ptr();
  a.x = saved.const_data_ptr();
  a.bias = data_or_null<float>(bias, "bias", saved);
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_bias = bias ? mutable_data<float>(grad_bias, "grad_bias") : nullptr;
  a.scratch = mutable_data<float>(scratch, "scratch");
  a.rows = shape.rows;
  a.columns = shape.columns;
  a.kind = shape.kind;
  a.dropout = cuda_dropout_argument(dropout_p, rng, site, saved);
  check_launch(activation_backward_cuda(a, type, context.stream), "activation_backward");
  return {grad_x, grad_bias};
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CUDA, m) {
  m.impl("activation_forward", TORCH_BOX(&transformer_ext::activation_forward));
  m.impl("activation_backward", TORCH_BOX(&transformer_ext::activation_backward));
}
