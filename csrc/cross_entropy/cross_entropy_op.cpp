#include <tuple>

#include "common/torch_op.h"
#include "cross_entropy/cross_entropy.h"

namespace transformer_ext {
namespace {

double scalar(const std::optional<Tensor>& x, const char* argument, double otherwise) {
  if (!x) return otherwise;
  CHECK_ARGUMENT(x->numel() == 1, argument, ": got shape ", shape_string(sizes_of(*x)),
                 ", expected one element");
  return *data<float>(*x, argument);
}

template <class T>
void check_matrix(const Tensor& x, const char* argument) {
  check_dim(x, argument, 2);
  check_type(x, argument, scalar_type_of<T>());
  CHECK_ARGUMENT(x.stride(1) == 1 || x.size(1) <= 1, argument, ": got stride ", x.stride(1),
                 " in the last dimension, expected 1");
}

// [loss, nll, correct] of the rows, float64 [3]. grad: null, or where the gradient goes.
template <class T>
Tensor run(const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& targets,
           const std::optional<Tensor>& scale, double label_smoothing, int64_t ignore_index,
           T* grad, int64_t grad_stride) {
  check_matrix<T>(logits, "logits");
  check_shape(targets, "targets", {logits.size(0)});
  check_contiguous(targets, "targets");
  CrossEntropy<T> a;
  a.logits = data<T>(logits, "logits");
  a.logits_stride = logits.stride(0);
  a.grad = grad;
  a.grad_stride = grad_stride;
  a.targets = data<int64_t>(targets, "targets");
  a.rows = logits.size(0);
  a.columns = logits.size(1);
  a.ignore_index = ignore_index;
  a.label_smoothing = static_cast<float>(label_smoothing);
  a.scale = static_cast<float>(scalar(scale, "scale", 1.0));
  if (bias) {
    check_shape(*bias, "bias", {a.columns});
    check_contiguous(*bias, "bias");
    a.bias = data<float>(*bias, "bias");
  }
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t target = a.targets[r];
    CHECK_AS(std::out_of_range, target == ignore_index || (target >= 0 && target < a.columns),
             "targets: got ", target, " in row ", r, ", expected [0, ", a.columns,
             ") or ignore_index ", ignore_index);
  }
  TorchParallel parallel;
  CrossEntropySums sums;
  if constexpr (std::is_same_v<T, float>) {
    sums = cross_entropy_kernels().cross_entropy_float32(a, parallel);
  } else {
    sums = cross_entropy_kernels().cross_entropy_bfloat16(a, parallel);
  }
  Tensor out = empty({3}, ScalarType::Double, logits);
  double* const result = static_cast<double*>(out.mutable_data_ptr());
  result[0] = sums.loss;
  result[1] = sums.nll;
  result[2] = sums.correct;
  return out;
}

Tensor cross_entropy_(const Tensor& logits, const std::optional<Tensor>& bias,
                      const Tensor& targets, const std::optional<Tensor>& scale,
                      double label_smoothing, int64_t ignore_index, bool write_grad) {
  return dispatch_float(logits, "logits", [&](auto tag) {
    using T = typename decltype(tag)::type;
    return run<T>(logits, bias, targets, scale, label_smoothing, ignore_index,
                  write_grad ? mutable_data<T>(logits, "logits") : nullptr, logits.stride(0));
  });
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets,
                                         const std::optional<Tensor>& scale, double label_smoothing,
                                         int64_t ignore_index, bool write_grad) {
  return dispatch_float(logits, "logits", [&](auto tag) {
    using T = typename decltype(tag)::type;
    check_dim(logits, "logits", 2);
    const int64_t columns = logits.size(1);
    Tensor grad = empty({write_grad ? logits.size(0) : 0, columns}, logits.scalar_type(), logits);
    Tensor sums = run<T>(logits, std::nullopt, targets, scale, label_smoothing, ignore_index,
                         write_grad ? mutable_data<T>(grad, "grad") : nullptr, columns);
    return std::make_tuple(sums, grad);
  });
}

void column_sum_(const Tensor& out, const Tensor& x, bool accumulate) {
  dispatch_float(x, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    check_matrix<T>(x, "x");
    check_shape(out, "out", {x.size(1)});
    check_contiguous(out, "out");
    TorchParallel parallel;
    const CrossEntropyKernels& kernels = cross_entropy_kernels();
    if constexpr (std::is_same_v<T, float>) {
      kernels.column_sum_float32(data<T>(x, "x"), x.stride(0), x.size(0), x.size(1), accumulate,
                                 mutable_data<float>(out, "out"), parallel);
    } else {
      kernels.column_sum_bfloat16(data<T>(x, "x"), x.stride(0), x.size(0), x.size(1), accumulate,
                                  mutable_data<float>(out, "out"), parallel);
    }
  });
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CPU, m) {
  m.impl("cross_entropy_", TORCH_BOX(&transformer_ext::cross_entropy_));
  m.impl("cross_entropy", TORCH_BOX(&transformer_ext::cross_entropy));
  m.impl("column_sum_", TORCH_BOX(&transformer_ext::column_sum_));
}
