#include <tuple>

#include "common/torch_op.h"
#include "dropout/dropout_op.h"
#include "residual_norm/residual_norm.h"
#include "residual_norm/residual_norm_check.h"

namespace transformer_ext {
namespace {

template <class T>
T* data_if(const Tensor& x, bool wanted, const char* argument) {
  return wanted ? mutable_data<T>(x, argument) : nullptr;
}

Tensor residual_dropout(const Tensor& x, const std::optional<Tensor>& residual, double dropout_p,
                        const std::optional<Tensor>& rng, int64_t site) {
  const Matrix shape = matrix_of(x, "x");
  const int64_t rows = shape.rows;
  const int64_t columns = shape.columns;
  if (residual) check_like(*residual, "residual", x);
  const Dropout dropout = dropout_argument(dropout_p, rng, site);
  Tensor out = empty_like(x);
  TorchParallel parallel;
  dispatch_float(x, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ResidualDropout<T> args{data<T>(x, "x"),
                                  data_or_null<T>(residual, "residual"),
                                  mutable_data<T>(out, "out"),
                                  rows,
                                  columns,
                                  dropout};
    if constexpr (std::is_same_v<T, float>) {
      residual_norm_kernels().dropout_f32(args, parallel);
    } else {
      residual_norm_kernels().dropout_bf16(args, parallel);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_forward(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, bool rms, double eps, double dropout_p,
    const std::optional<Tensor>& rng, int64_t site) {
  const Matrix shape = matrix_of(x, "x");
  const int64_t rows = shape.rows;
  const int64_t columns = shape.columns;
  if (residual) check_like(*residual, "residual", x);
  const float* const weight_data = parameter(weight, "weight", columns);
  const float* const bias_data = parameter(bias, "bias", columns);
  const Dropout dropout = dropout_argument(dropout_p, rng, site);
  const bool has_sum = residual.has_value() || dropout.threshold != 0;
  Tensor sum = has_sum ? empty_like(x) : empty({0}, x.scalar_type(), x);
  Tensor normed = empty_like(x);
  Tensor mean = empty({rms ? 0 : rows}, ScalarType::Float, x);
  Tensor rstd = empty({rows}, ScalarType::Float, x);
  TorchParallel parallel;
  dispatch_float(x, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ResidualNormForward<T> args{data<T>(x, "x"),
                                      data_or_null<T>(residual, "residual"),
                                      weight_data,
                                      bias_data,
                                      data_if<T>(sum, has_sum, "sum"),
                                      mutable_data<T>(normed, "normed"),
                                      data_if<float>(mean, !rms, "mean"),
                                      mutable_data<float>(rstd, "rstd"),
                                      rows,
                                      columns,
                                      rms,
                                      static_cast<float>(eps),
                                      dropout};
    if constexpr (std::is_same_v<T, float>) {
      residual_norm_kernels().forward_f32(args, parallel);
    } else {
      residual_norm_kernels().forward_bf16(args, parallel);
    }
  });
  return {sum, normed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_backward(
    const Tensor& grad_normed, const std::optional<Tensor>& grad_sum, const Tensor& sum,
    const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& weight, bool has_bias,
    bool rms, double dropout_p, const std::optional<Tensor>& rng, int64_t site) {
  const Matrix shape = matrix_of(sum, "sum");
  const int64_t rows = shape.rows;
  const int64_t columns = shape.columns;
  check_like(grad_normed, "grad_normed", sum);
  if (grad_sum) check_like(*grad_sum, "grad_sum", sum);
  check_shape(mean, "mean", {rms ? 0 : rows});
  check_shape(rstd, "rstd", {rows});
  const float* const weight_data = parameter(weight, "weight", columns);
  const Dropout dropout = dropout_argument(dropout_p, rng, site);
  const bool drop = dropout.threshold != 0;
  Tensor grad_x = drop ? empty_like(sum) : empty({0}, sum.scalar_type(), sum);
  Tensor grad_residual = empty_like(sum);
  Tensor grad_weight = empty({weight ? columns : 0}, ScalarType::Float, sum);
  Tensor grad_bias = empty({has_bias ? columns : 0}, ScalarType::Float, sum);
  TorchParallel parallel;
  dispatch_float(sum, "sum", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ResidualNormBackward<T> args{
        data<T>(grad_normed, "grad_normed"),
        data_or_null<T>(grad_sum, "grad_sum"),
        data<T>(sum, "sum"),
        rms ? nullptr : data<float>(mean, "mean"),
        data<float>(rstd, "rstd"),
        weight_data,
        data_if<T>(grad_x, drop, "grad_x"),
        mutable_data<T>(grad_residual, "grad_residual"),
        data_if<float>(grad_weight, weight.has_value(), "grad_weight"),
        data_if<float>(grad_bias, has_bias, "grad_bias"),
        rows,
        columns,
        rms,
        dropout};
    if constexpr (std::is_same_v<T, float>) {
      residual_norm_kernels().backward_f32(args, parallel);
    } else {
      residual_norm_kernels().backward_bf16(args, parallel);
    }
  });
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CPU, m) {
  m.impl("residual_dropout", TORCH_BOX(&transformer_ext::residual_dropout));
  m.impl("residual_norm_forward", TORCH_BOX(&transformer_ext::residual_norm_forward));
  m.impl("residual_norm_backward", TORCH_BOX(&transformer_ext::residual_norm_backward));
}
