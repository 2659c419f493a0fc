#include <tuple>
#include <vector>

#include "activation/activation.h"
#include "common/torch_op.h"
#include "dropout/dropout_op.h"

namespace transformer_ext {
namespace {

struct Shape {
  Activation kind;
  int64_t rows;
  int64_t columns;  // of the result
  int64_t x_columns;
};

Shape shape_of(const Tensor& x, const std::optional<Tensor>& bias, int64_t kind) {
  STD_TORCH_CHECK(kind >= 0 && kind < kActivations, "kind: got ", kind, ", expected 0 to ",
                  kActivations - 1);
  const Activation activation = static_cast<Activation>(kind);
  STD_TORCH_CHECK(x.dim() >= 1, "x: got a scalar, expected at least one dimension");
  check_contiguous(x, "x");
  const int64_t x_columns = x.size(x.dim() - 1);
  STD_TORCH_CHECK(!is_gated(activation) || x_columns % 2 == 0, "x: got shape ",
                  shape_string(sizes_of(x)), ", expected an even number of columns");
  if (bias) {
    check_shape(*bias, "bias", {x_columns});
    check_contiguous(*bias, "bias");
  }
  return {activation, x_columns == 0 ? 0 : x.numel() / x_columns,
          is_gated(activation) ? x_columns / 2 : x_columns, x_columns};
}

Tensor activation_forward(const Tensor& x, const std::optional<Tensor>& bias, int64_t kind,
                          double dropout_p, const std::optional<Tensor>& rng, int64_t site) {
  const Shape shape = shape_of(x, bias, kind);
  const Dropout dropout = dropout_argument(dropout_p, rng, site);
  std::vector<int64_t> sizes(sizes_of(x).begin(), sizes_of(x).end());
  sizes.back() = shape.columns;
  Tensor out = empty(sizes, x.scalar_type(), x);
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
  const Shape shape = shape_of(saved, bias, kind);
  check_contiguous(grad, "grad");
  STD_TORCH_CHECK(grad.numel() == shape.rows * shape.columns, "grad: got shape ",
                  shape_string(sizes_of(grad)), ", expected that of the result for saved of shape ",
                  shape_string(sizes_of(saved)));
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
