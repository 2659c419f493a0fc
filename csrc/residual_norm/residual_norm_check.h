// The checks that the CPU and the CUDA op share.
#pragma once

#include "common/torch_op.h"

namespace transformer_ext {

struct Matrix {
  int64_t rows;
  int64_t columns;
};

inline Matrix matrix_of(const Tensor& x, const char* argument) {
  CHECK_ARGUMENT(x.dim() >= 1, argument, ": got a scalar, expected at least one dimension");
  check_contiguous(x, argument);
  const int64_t columns = x.size(x.dim() - 1);
  return {columns == 0 ? 0 : x.numel() / columns, columns};
}

inline void check_like(const Tensor& x, const char* argument, const Tensor& like) {
  check_type(x, argument, like.scalar_type());
  check_contiguous(x, argument);
  const auto sizes = sizes_of(x);
  const auto expected = sizes_of(like);
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == expected[i];
  CHECK_ARGUMENT(same, argument, ": got shape ", shape_string(sizes), ", expected ",
                 shape_string(expected));
}

inline const float* parameter(const std::optional<Tensor>& x, const char* argument,
                              int64_t columns) {
  if (!x) return nullptr;
  check_shape(*x, argument, {columns});
  check_contiguous(*x, argument);
  return data<float>(*x, argument);
}

}  // namespace transformer_ext
