// The checks that the CPU and the CUDA op share.
#pragma once

#include <vector>

#include "activation/activation_kind.h"
#include "common/torch_op.h"

namespace transformer_ext {

struct ActivationShape {
  Activation kind;
  int64_t rows;
  int64_t columns;  // of the result
  int64_t x_columns;
};

inline ActivationShape activation_shape(const Tensor& x, const std::optional<Tensor>& bias,
                                        int64_t kind) {
  CHECK_ARGUMENT(kind >= 0 && kind < kActivations, "kind: got ", kind, ", expected 0 to ",
                 kActivations - 1);
  const Activation activation = static_cast<Activation>(kind);
  CHECK_ARGUMENT(x.dim() >= 1, "x: got a scalar, expected at least one dimension");
  check_contiguous(x, "x");
  const int64_t x_columns = x.size(x.dim() - 1);
  CHECK_ARGUMENT(!is_gated(activation) || x_columns % 2 == 0, "x: got shape ",
                 shape_string(sizes_of(x)), ", expected an even number of columns");
  if (bias) {
    check_shape(*bias, "bias", {x_columns});
    check_contiguous(*bias, "bias");
  }
  return {activation, x_columns == 0 ? 0 : x.numel() / x_columns,
          is_gated(activation) ? x_columns / 2 : x_columns, x_columns};
}

inline Tensor activation_result(const Tensor& x, const ActivationShape& shape) {
  std::vector<int64_t> sizes(sizes_of(x).begin(), sizes_of(x).end());
  sizes.back() = shape.columns;
  return empty(sizes, x.scalar_type(), x);
}

inline void check_activation_gradient(const Tensor& grad, const Tensor& saved,
                                      const ActivationShape& shape) {
  check_contiguous(grad, "grad");
  CHECK_ARGUMENT(grad.numel() == shape.rows * shape.columns, "grad: got shape ",
                 shape_string(sizes_of(grad)), ", expected that of the result for saved of shape ",
                 shape_string(sizes_of(saved)));
}

}  // namespace transformer_ext
