#include <tuple>

#include "common/torch_op.h"
#include "common/torch_op_cuda.h"
#include "cross_entropy/cross_entropy_cuda.h"

namespace transformer_ext {
namespace {

// [loss, nll, correct] of the rows, float64 [3]. grad: null, or where the gradient goes.
Tensor run(const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& targets,
           const std::optional<Tensor>& scale, double label_smoothing, int64_t ignore_index,
           void* grad, int64_t grad_stride) {
  const CudaContext context(logits);
  check_dim(logits, "logits", 2);
  CHECK_ARGUMENT(logits.stride(1) == 1 || logits.size(1) <= 1, "logits: got stride ",
                 logits.stride(1), " in the last dimension, expected 1");
  check_shape(targets, "targets", {logits.size(0)});
  check_contiguous(targets, "targets");
  check_device(targets, "targets", logits);
  if (bias) check_shape(*bias, "bias", {logits.size(1)});
  CHECK_ARGUMENT(!scale || scale->numel() == 1, "scale: got shape ",
                 shape_string(scale ? sizes_of(*scale) : sizes_of(logits)),
                 ", expected one element");
  CrossEntropyCuda a;
  a.logits = logits.const_data_ptr();
  a.logits_stride = logits.stride(0);
  a.grad = grad;
  a.grad_stride = grad_stride;
  a.bias = data_or_null<float>(bias, "bias", logits);
  a.targets = data<int64_t>(targets, "targets");
  a.rows = logits.size(0);
  a.columns = logits.size(1);
  a.ignore_index = ignore_index;
  a.label_smoothing = static_cast<float>(label_smoothing);
  a.scale = data_or_null<float>(scale, "scale", logits);
  Tensor row_sums = empty({3, a.rows}, ScalarType::Float, logits);
  Tensor sums = empty({3}, ScalarType::Double, logits);
  a.row_sums = mutable_data<float>(row_sums, "row_sums");
  a.sums = static_cast<double*>(sums.mutable_data_ptr());
  check_launch(cross_entropy_cuda(a, float_type_of(logits, "logits"), context.stream),
               "cross_entropy");
  return sums;
}

Tensor cross_entropy_(const Tensor& logits, const std::optional<Tensor>& bias,
                      const Tensor& targets, const std::optional<Tensor>& scale,
                      double label_smoothing, int64_t ignore_index, bool write_grad) {
  return run(logits, bias, targets, scale, label_smoothing, ignore_index,
             write_grad ? logits.mutable_data_ptr() : nullptr, logits.stride(0));
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets,
                                         const std::optional<Tensor>& scale, double label_smoothing,
                                         int64_t ignore_index, bool write_grad) {
  check_dim(logits, "logits", 2);
  const int64_t columns = logits.size(1);
  Tensor grad = empty({write_grad ? logits.size(0) : 0, columns}, logits.scalar_type(), logits);
  Tensor sums = run(logits, std::nullopt, targets, scale, label_smoothing, ignore_index,
                    write_grad ? grad.mutable_data_ptr() : nullptr, columns);
  return {sums, grad};
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CUDA, m) {
  m.impl("cross_entropy_", TORCH_BOX(&transformer_ext::cross_entropy_));
  m.impl("cross_entropy", TORCH_BOX(&transformer_ext::cross_entropy));
}
