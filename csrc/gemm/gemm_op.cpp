#include "common/torch_op.h"
#include "gemm/gemm.h"

namespace transformer_ext {
namespace {

GemmType type_of(const Tensor& x, const char* argument) {
  const GemmType type = dispatch_float(x, argument, [](auto tag) {
    using T = typename decltype(tag)::type;
    return std::is_same_v<T, float> ? GemmType::float32 : GemmType::bfloat16;
  });
  CHECK_ARGUMENT(gemm_has(type), argument, ": got bfloat16, which the instruction set in use (",
                 isa_name(active_isa()), ") cannot multiply");
  return type;
}

void check_type_is(GemmType type, GemmType expected, const char* argument) {
  CHECK_ARGUMENT(type == expected, argument, ": got ",
                 type == GemmType::float32 ? "float32" : "bfloat16", ", expected ",
                 expected == GemmType::float32 ? "float32" : "bfloat16");
}

int64_t gemm_packed_elements(int64_t n, int64_t k, bool bfloat16) {
  return static_cast<int64_t>(
      bfloat16 ? gemm_packed_bytes(n, k, GemmType::bfloat16) / sizeof(transformer_ext::bfloat16)
               : gemm_packed_bytes(n, k, GemmType::float32) / sizeof(float));
}

void check_packed(const Tensor& packed, const char* argument, int64_t n, int64_t k, GemmType type) {
  check_shape(packed, argument, {gemm_packed_elements(n, k, type == GemmType::bfloat16)});
  check_contiguous(packed, argument);
}

void gemm_pack_op(const Tensor& out, const Tensor& weight, bool transposed) {
  check_dim(weight, "weight", 2);
  const float* const w = data<float>(weight, "weight");
  const int64_t n = weight.size(transposed ? 1 : 0), k = weight.size(transposed ? 0 : 1);
  const GemmType type = type_of(out, "out");
  check_packed(out, "out", n, k, type);
  TorchParallel parallel;
  gemm_pack(w, n, k, weight.stride(transposed ? 1 : 0), weight.stride(transposed ? 0 : 1), type,
            out.mutable_data_ptr(), parallel);
}

// The leading dimension of a matrix with its columns side by side.
int64_t leading_dimension(const Tensor& x, const char* argument) {
  CHECK_ARGUMENT(x.size(1) <= 1 || x.stride(1) == 1, argument, ": got a column stride of ",
                 x.stride(1), ", expected 1");
  return x.stride(0);
}

void gemm_linear_op(const Tensor& out, const Tensor& x, const Tensor& packed,
                    const std::optional<Tensor>& bias, bool accumulate) {
  check_dim(out, "out", 2);
  check_shape(x, "x", {out.size(0), -1});
  const int64_t n = out.size(1), k = x.size(1);
  const GemmType type = type_of(packed, "packed");
  check_packed(packed, "packed", n, k, type);
  if (bias) {
    check_shape(*bias, "bias", {n});
    check_contiguous(*bias, "bias");
  }
  const GemmType x_type = type_of(x, "x"), out_type = type_of(out, "out");
  if (type == GemmType::float32) {
    check_type_is(x_type, type, "x");
    check_type_is(out_type, type, "out");
  }
  if (accumulate) check_type_is(out_type, GemmType::float32, "out");
  Epilogue epilogue;
  epilogue.accumulate = accumulate;
  TorchParallel parallel;
  gemm(GemmArguments{x.size(0), GemmInput{x.const_data_ptr(), x_type, x.stride(0), x.stride(1)},
                     PackedView{packed.const_data_ptr(), n, k, type}, nullptr, 0,
                     data_or_null<float>(bias, "bias"), out.mutable_data_ptr(), out_type,
                     leading_dimension(out, "out"), epilogue},
       parallel);
}

void gemm_matmul_op(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  check_dim(out, "out", 2);
  check_shape(a, "a", {out.size(0), -1});
  check_shape(b, "b", {a.size(1), out.size(1)});
  const GemmType type = type_of(a, "a");
  check_type_is(type_of(b, "b"), type, "b");
  Epilogue epilogue;
  epilogue.accumulate = accumulate;
  TorchParallel parallel;
  gemm_matmul(GemmInput{a.const_data_ptr(), type, a.stride(0), a.stride(1)}, a.size(0),
              b.const_data_ptr(), b.size(1), a.size(1), leading_dimension(b, "b"),
              mutable_data<float>(out, "out"), leading_dimension(out, "out"), epilogue, parallel);
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CompositeExplicitAutograd, m) {
  m.impl("gemm_packed_elements", TORCH_BOX(&transformer_ext::gemm_packed_elements));
}

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CPU, m) {
  m.impl("gemm_pack_", TORCH_BOX(&transformer_ext::gemm_pack_op));
  m.impl("gemm_linear_", TORCH_BOX(&transformer_ext::gemm_linear_op));
  m.impl("gemm_matmul_", TORCH_BOX(&transformer_ext::gemm_matmul_op));
}
