// The checks that the CPU and the CUDA op share, and the kernels' arguments made from tensors.
#pragma once

#include "common/torch_op.h"
#include "softmax/softmax.h"

namespace transformer_ext {

// `mask` has the shape of x (its strides may be 0); the caller keeps all tensors alive.
inline SoftmaxForward softmax_forward_arguments(const Tensor& x, const std::optional<Tensor>& mask,
                                                const std::optional<Tensor>& key_lengths,
                                                bool causal, bool log, const Tensor& out) {
  check_contiguous(x, "x");
  const int64_t dims = x.dim() - 1;
  CHECK_ARGUMENT(dims >= (causal || key_lengths ? 1 : 0) && dims <= kSoftmaxMaxDims,
                 "x: got shape ", shape_string(sizes_of(x)), ", expected 1 to ",
                 kSoftmaxMaxDims + 1, " dimensions (2 with causal or key_lengths)");
  SoftmaxForward a;
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.columns = x.size(dims);
  a.rows = 1;
  for (int64_t d = 0; d < dims; ++d) a.rows *= x.size(d);
  a.log = log;
  a.keep.dims = static_cast<int>(dims);
  for (int64_t d = 0; d < dims; ++d) a.keep.sizes[d] = x.size(d);
  a.keep.causal = causal;
  if (mask) {
    check_device(*mask, "mask", x);
    bool same = mask->dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = mask->size(d) == x.size(d);
    CHECK_ARGUMENT(same, "mask: got shape ", shape_string(sizes_of(*mask)),
                   ", expected that of x, ", shape_string(sizes_of(x)));
    a.keep.mask = reinterpret_cast<const uint8_t*>(data<bool>(*mask, "mask"));
    for (int64_t d = 0; d < dims; ++d) a.keep.strides[d] = mask->stride(d);
    a.keep.column_stride = mask->stride(dims);
    CHECK_ARGUMENT(a.columns <= 1 || a.keep.column_stride == 0 || a.keep.column_stride == 1,
                   "mask: got stride ", a.keep.column_stride,
                   " in the last dimension, expected 0 or 1");
  }
  if (key_lengths) {
    check_device(*key_lengths, "key_lengths", x);
    check_shape(*key_lengths, "key_lengths", {x.size(0)});
    check_contiguous(*key_lengths, "key_lengths");
    a.keep.key_lengths = data<int64_t>(*key_lengths, "key_lengths");
  }
  return a;
}

inline SoftmaxBackward softmax_backward_arguments(const Tensor& grad, const Tensor& output,
                                                  bool log, const Tensor& grad_x) {
  check_contiguous(grad, "grad");
  check_contiguous(output, "output");
  check_type(output, "output", grad.scalar_type());
  check_device(output, "output", grad);
  bool same = grad.dim() == output.dim() && grad.dim() >= 1;
  for (int64_t d = 0; same && d < grad.dim(); ++d) same = grad.size(d) == output.size(d);
  CHECK_ARGUMENT(same, "grad: got shape ", shape_string(sizes_of(grad)),
                 ", expected that of output, ", shape_string(sizes_of(output)));
  SoftmaxBackward a;
  a.grad = grad.const_data_ptr();
  a.output = output.const_data_ptr();
  a.grad_x = grad_x.mutable_data_ptr();
  a.columns = grad.size(grad.dim() - 1);
  a.rows = 1;
  for (int64_t d = 0; d + 1 < grad.dim(); ++d) a.rows *= grad.size(d);
  a.log = log;
  return a;
}

}  // namespace transformer_ext
