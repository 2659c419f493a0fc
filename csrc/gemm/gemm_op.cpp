#include "common/torch_op.h"
#include "gemm/gemm.h"

namespace transformer_ext {
namespace {

Tensor gemm_pack_op(const Tensor& weight) {
  check_dim(weight, "weight", 2);
  const float* const w = data<float>(weight, "weight");
  const int64_t n = weight.size(0), k = weight.size(1);
  Tensor packed = empty({gemm_packed_size(n, k)}, ScalarType::Float, weight);
  TorchParallel parallel;
  gemm_pack(w, n, k, weight.stride(0), weight.stride(1), mutable_data<float>(packed, "packed"),
            parallel);
  return packed;
}

// The leading dimension of a matrix with its columns side by side.
int64_t leading_dimension(const Tensor& x, const char* argument) {
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1, argument, ": got a column stride of ",
                  x.stride(1), ", expected 1");
  return x.stride(0);
}

void gemm_linear_op(const Tensor& out, const Tensor& x, const Tensor& packed,
                    const std::optional<Tensor>& bias, bool accumulate) {
  check_dim(out, "out", 2);
  check_shape(x, "x", {out.size(0), -1});
  const int64_t n = out.size(1), k = x.size(1);
  check_shape(packed, "packed", {gemm_packed_size(n, k)});
  check_contiguous(packed, "packed");
  if (bias) {
    check_shape(*bias, "bias", {n});
    check_contiguous(*bias, "bias");
  }
  Epilogue epilogue;
  epilogue.accumulate = accumulate;
  TorchParallel parallel;
  gemm(GemmArguments{data<float>(x, "x"), x.size(0), x.stride(0), x.stride(1),
                     PackedView{data<float>(packed, "packed"), n, k}, nullptr, 0,
                     data_or_null<float>(bias, "bias"), mutable_data<float>(out, "out"),
                     leading_dimension(out, "out"), epilogue},
       parallel);
}

void gemm_matmul_op(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  check_dim(out, "out", 2);
  check_shape(a, "a", {out.size(0), -1});
  check_shape(b, "b", {a.size(1), out.size(1)});
  Epilogue epilogue;
  epilogue.accumulate = accumulate;
  TorchParallel parallel;
  gemm_matmul(data<float>(a, "a"), a.size(0), a.stride(0), a.stride(1), data<float>(b, "b"),
              b.size(1), a.size(1), leading_dimension(b, "b"), mutable_data<float>(out, "out"),
              leading_dimension(out, "out"), epilogue, parallel);
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CompositeExplicitAutograd, m) {
  m.impl("gemm_panel_columns", TORCH_BOX(&transformer_ext::gemm_panel_columns));
}

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CPU, m) {
  m.impl("gemm_pack", TORCH_BOX(&transformer_ext::gemm_pack_op));
  m.impl("gemm_linear_", TORCH_BOX(&transformer_ext::gemm_linear_op));
  m.impl("gemm_matmul_", TORCH_BOX(&transformer_ext::gemm_matmul_op));
}
