#include <tuple>

#include "common/torch_op.h"
#include "common/torch_op_cuda.h"
#include "residual_norm/residual_norm_check.h"
#include "residual_norm/residual_norm_cuda.h"

namespace transformer_ext {
namespace {

// What the kernels get: of the type, shape and device of `like`.
const void* matrix_data(const std::optional<Tensor>& x, const char* argument, const Tensor& like) {
  if (!x) return nullptr;
  check_device(*x, argument, like);
  check_like(*x, argument, like);
  return x->const_data_ptr();
}

const float* parameter_data(const std::optional<Tensor>& x, const char* argument, int64_t columns,
                            const Tensor& like) {
  if (x) check_device(*x, argument, like);
  return parameter(x, argument, columns);
}

float* float_data_if(const Tensor& x, bool wanted) {
  return wanted ? mutable_data<float>(x, "result") : nullptr;
}

Tensor residual_dropout(const Tensor& x, const std::optional<Tensor>& residual, double dropout_p,
                        const std::optional<Tensor>& rng, int64_t site) {
  const CudaContext context(x);
  const Matrix shape = matrix_of(x, "x");
  const FloatType type = float_type_of(x, "x");
  Tensor out = empty_like(x);
  check_launch(residual_dropout_cuda({x.const_data_ptr(), matrix_data(residual, "residual", x),
                                      out.mutable_data_ptr(), shape.rows, shape.columns,
                                      cuda_dropout_argument(dropout_p, rng, site, x)},
                                     type, context.stream),
               "residual_dropout");
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_forward(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, bool rms, double eps, double dropout_p,
    const std::optional<Tensor>& rng, int64_t site) {
  const CudaContext context(x);
  const Matrix shape = matrix_of(x, "x");
  const FloatType type = float_type_of(x, "x");
  ResidualNormForwardCuda a;
  a.x = x.const_data_ptr();
  a.residual = matrix_data(residual, "residual", x);
  a.weight = parameter_data(weight, "weight", shape.columns, x);
  a.bias = parameter_data(bias, "bias", shape.columns, x);
  a.rows = shape.rows;
  a.columns = shape.columns;
  a.rms = rms;
  a.eps = static_cast<float>(eps);
  a.dropout = cuda_dropout_argument(dropout_p, rng, site, x);
  const bool has_sum = residual.has_value() || a.dropout.threshold != 0;
  Tensor sum = has_sum ? empty_like(x) : empty({0}, x.scalar_type(), x);
  Tensor normed = empty_like(x);
  Tensor mean = empty({rms ? 0 : shape.rows}, ScalarType::Float, x);
  Tensor rstd = empty({shape.rows}, ScalarType::Float, x);
  a.sum = has_sum ? sum.mutable_data_ptr() : nullptr;
  a.normed = normed.mutable_data_ptr();
  a.mean = float_data_if(mean, !rms);
  a.rstd = float_data_if(rstd, true);
  check_launch(residual_norm_forward_cuda(a, type, context.stream), "residual_norm_forward");
  return {sum, normed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_backward(
    const Tensor& grad_normed, const std::optional<Tensor>& grad_sum, const Tensor& sum,
    const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& weight, bool has_bias,
    bool rms, double dropout_p, const std::optional<Tensor>& rng, int64_t site) {
  const CudaContext context(sum);
  const Matrix shape = matrix_of(sum, "sum");
  const FloatType type = float_type_of(sum, "sum");
  check_device(mean, "mean", sum);
  check_device(rstd, "rstd", sum);
  check_shape(mean, "mean", {rms ? 0 : shape.rows});
  check_shape(rstd, "rstd", {shape.rows});
  ResidualNormBackwardCuda a;
  a.grad_normed = matrix_data(grad_normed, "grad_normed", sum);
  a.grad_sum = matrix_data(grad_sum, "grad_sum", sum);
  a.sum = sum.const_data_ptr();
  a.mean = rms ? nullptr : data<float>(mean, "mean");
  a.rstd = data<float>(rstd, "rstd");
  a.weight = parameter_data(weight, "weight", shape.columns, sum);
  a.rows = shape.rows;
  a.columns = shape.columns;
  a.rms = rms;
  a.dropout = cuda_dropout_argument(dropout_p, rng, site, sum);
  const bool drop = a.dropout.threshold != 0;
  Tensor grad_x = drop ? empty_like(sum) : empty({0}, sum.scalar_type(), sum);
  Tensor grad_residual = empty_like(sum);
  Tensor grad_weight = empty({weight ? shape.columns : 0}, ScalarType::Float, sum);
  Tensor grad_bias = empty({has_bias ? shape.columns : 0}, ScalarType::Float, sum);
  Tensor scratch =
      empty({residual_norm_backward_scratch(shape.rows, shape.columns)}, ScalarType::Float, sum);
  a.grad_x = drop ? grad_x.mutable_data_ptr() : nullptr;
  a.grad_residual = grad_residual.mutable_data_ptr();
  a.grad_weight = float_data_if(grad_weight, weight.has_value());
  a.grad_bias = float_data_if(grad_bias, has_bias);
  a.scratch = float_data_if(scratch, true);
  check_launch(residual_norm_backward_cuda(a, type, context.stream), "residual_norm_backward");
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CUDA, m) {
  m.impl("residual_dropout", TORCH_BOX(&transformer_ext::residual_dropout));
  m.impl("residual_norm_forward", TORCH_BOX(&transformer_ext::residual_norm_forward));
  m.impl("residual_norm_backward", TORCH_BOX(&transformer_ext::residual_norm_backward));
}
