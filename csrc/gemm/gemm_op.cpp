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

Tensor gemm_linear_op(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                      int64_t out_features) {
  check_dim(x, "x", 2);
  STD_TORCH_CHECK(out_features >= 0, "out_features: got ", out_features, ", expected >= 0");
  const int64_t m = x.size(0), k = x.size(1);
  check_shape(packed, "packed", {gemm_packed_size(out_features, k)});
  check_contiguous(packed, "packed");
  if (bias) {
    check_shape(*bias, "bias", {out_features});
    check_contiguous(*bias, "bias");
  }
  Tensor y = empty({m, out_features}, ScalarType::Float, x);
  TorchParallel parallel;
  gemm(GemmArguments{data<float>(x, "x"), m, x.stride(0), x.stride(1),
                     PackedView{data<float>(packed, "packed"), out_features, k}, nullptr, 0,
                     data_or_null<float>(bias, "bias"), mutable_data<float>(y, "y"), out_features,
                     Epilogue{}},
       parallel);
  return y;
}

Tensor gemm_matmul_op(const Tensor& a, const Tensor& b) {
  check_dim(a, "a", 2);
  const int64_t m = a.size(0), k = a.size(1);
  check_shape(b, "b", {k, -1});
  const int64_t n = b.size(1);
  STD_TORCH_CHECK(n <= 1 || b.stride(1) == 1, "b: got a column stride of ", b.stride(1),
                  ", expected 1");
  Tensor y = empty({m, n}, ScalarType::Float, a);
  TorchParallel parallel;
  gemm_matmul(data<float>(a, "a"), m, a.stride(0), a.stride(1), data<float>(b, "b"), n, k,
              b.stride(0), mutable_data<float>(y, "y"), n, Epilogue{}, parallel);
  return y;
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CPU, m) {
  m.impl("gemm_pack", TORCH_BOX(&transformer_ext::gemm_pack_op));
  m.impl("gemm_linear", TORCH_BOX(&transformer_ext::gemm_linear_op));
  m.impl("gemm_matmul", TORCH_BOX(&transformer_ext::gemm_matmul_op));
}
