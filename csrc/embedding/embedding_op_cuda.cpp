#include <vector>

#include "common/torch_op.h"
#include "common/torch_op_cuda.h"
#include "embedding/embedding_cuda.h"

namespace transformer_ext {
namespace {

// The values are looked at by the kernels: reading them here would stop the GPU.
Indices indices_of(const Tensor& x, const char* argument, const Tensor& like) {
  check_contiguous(x, argument);
  check_device(x, argument, like);
  const bool wide = x.scalar_type() == ScalarType::Long;
  CHECK_ARGUMENT(wide || x.scalar_type() == ScalarType::Int, argument, ": got ",
                 torch::headeronly::toString(x.scalar_type()), ", expected int64 or int32");
  return {wide ? data<int64_t>(x, argument) : nullptr, wide ? nullptr : data<int32_t>(x, argument)};
}

Tensor embedding_forward(const Tensor& ids, const Tensor& weight, double scale,
                         const std::optional<Tensor>& positions,
                         const std::optional<Tensor>& position_table, double dropout_p,
                         const std::optional<Tensor>& rng, int64_t site, int64_t type) {
  const CudaContext context(weight);
  check_shape(weight, "weight", {-1, -1});
  check_contiguous(weight, "weight");
  EmbeddingForwardCuda a;
  a.ids = indices_of(ids, "ids", weight);
  a.weight = data<float>(weight, "weight");
  a.rows = weight.size(0);
  a.columns = weight.size(1);
  a.tokens = ids.numel();
  a.scale = static_cast<float>(scale);
  if (position_table) {
    check_shape(*position_table, "position_table", {-1, a.columns});
    CHECK_ARGUMENT(positions && positions->numel() == ids.numel(),
                   "positions: expected as many as ids");
    a.positions = indices_of(*positions, "positions", weight);
    a.position_table = data_or_null<float>(position_table, "position_table", weight);
    a.position_rows = position_table->size(0);
  }
  a.dropout = cuda_dropout_argument(dropout_p, rng, site, weight);
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  CHECK_ARGUMENT(type >= 0 && type < 3, "type: got ", type, ", expected 0 to 2");
  std::vector<int64_t> sizes(sizes_of(ids).begin(), sizes_of(ids).end());
  sizes.push_back(a.columns);
  Tensor out = empty(sizes, kTypes[type], weight);
  a.out = out.mutable_data_ptr();
  check_launch(embedding_forward_cuda(a, float_type_of(out, "out"), context.stream),
               "embedding_forward");
  return out;
}

Tensor embedding_backward(const Tensor& grad, const Tensor& ids, int64_t rows, double scale,
                          double dropout_p, const std::optional<Tensor>& rng, int64_t site) {
  const CudaContext context(grad);
  CHECK_ARGUMENT(grad.dim() >= 1, "grad: got a scalar, expected at least one dimension");
  check_contiguous(grad, "grad");
  const FloatType type = float_type_of(grad, "grad");
  EmbeddingBackwardCuda a;
  a.columns = grad.size(grad.dim() - 1);
  a.tokens = ids.numel();
  CHECK_ARGUMENT(grad.numel() == a.tokens * a.columns, "grad: got shape ",
                 shape_string(sizes_of(grad)), ", expected one row for each id of shape ",
                 shape_string(sizes_of(ids)));
  a.grad = grad.const_data_ptr();
  a.ids = indices_of(ids, "ids", grad);
  a.scale = static_cast<float>(scale);
  a.rows = rows;
  a.dropout = cuda_dropout_argument(dropout_p, rng, site, grad);
  Tensor grad_weight = empty({rows, a.columns}, ScalarType::Float, grad);
  Tensor scratch = empty({embedding_backward_scratch(a.tokens, rows)}, ScalarType::Int, grad);
  a.grad_weight = mutable_data<float>(grad_weight, "grad_weight");
  a.scratch = mutable_data<int32_t>(scratch, "scratch");
  check_launch(embedding_backward_cuda(a, type, context.stream), "embedding_backward");
  return grad_weight;
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CUDA, m) {
  m.impl("embedding_forward", TORCH_BOX(&transformer_ext::embedding_forward));
  m.impl("embedding_backward", TORCH_BOX(&transformer_ext::embedding_backward));
}
