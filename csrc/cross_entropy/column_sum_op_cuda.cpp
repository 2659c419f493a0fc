#include "common/torch_op.h"
#include "common/torch_op_cuda.h"
#include "cross_entropy/column_sum_cuda.h"

namespace transformer_ext {
namespace {

void column_sum_(const Tensor& out, const Tensor& x, bool accumulate) {
  const CudaContext context(x);
  check_dim(x, "x", 2);
  CHECK_ARGUMENT(x.size(1) <= 1 || x.stride(1) == 1, "x: got stride ", x.stride(1),
                 " in the last dimension, expected 1");
  check_device(out, "out", x);
  check_shape(out, "out", {x.size(1)});
  check_contiguous(out, "out");
  Tensor scratch = empty({column_sum_scratch(x.size(0), x.size(1))}, ScalarType::Float, x);
  check_launch(
      column_sum_cuda({x.const_data_ptr(), x.stride(0), x.size(0), x.size(1), accumulate,
                       mutable_data<float>(out, "out"), mutable_data<float>(scratch, "scratch")},
                      float_type_of(x, "x"), context.stream),
      "column_sum_");
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CUDA, m) {
  m.impl("column_sum_", TORCH_BOX(&transformer_ext::column_sum_));
}
