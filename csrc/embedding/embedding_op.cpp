#include <vector>

#include "common/torch_op.h"
#include "dropout/dropout_op.h"
#include "embedding/embedding.h"

namespace transformer_ext {
namespace {

// Pointers to `x`, after a look at each value: rows is the number of rows in the table.
Indices indices_of(const Tensor& x, const char* argument, int64_t rows) {
  check_contiguous(x, argument);
  const bool wide = x.scalar_type() == ScalarType::Long;
  CHECK_ARGUMENT(wide || x.scalar_type() == ScalarType::Int, argument, ": got ",
                 torch::headeronly::toString(x.scalar_type()), ", expected int64 or int32");
  const Indices indices{wide ? data<int64_t>(x, argument) : nullptr,
                        wide ? nullptr : data<int32_t>(x, argument)};
  const int64_t count = x.numel();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t value = wide ? indices.wide[i] : indices.narrow[i];
    CHECK_AS(std::out_of_range, value >= 0 && value < rows, argument, ": got ", value,
             " at position ", i, ", expected 0 to ", rows - 1);
  }
  return indices;
}

Tensor embedding_forward(const Tensor& ids, const Tensor& weight, double scale,
                         const std::optional<Tensor>& positions,
                         const std::optional<Tensor>& position_table, double dropout_p,
                         const std::optional<Tensor>& rng, int64_t site, int64_t type) {
  check_shape(weight, "weight", {-1, -1});
  check_contiguous(weight, "weight");
  const int64_t columns = weight.size(1);
  const Indices id_data = indices_of(ids, "ids", weight.size(0));
  Indices position_data{};
  if (position_table) {
    check_shape(*position_table, "position_table", {-1, columns});
    check_contiguous(*position_table, "position_table");
    CHECK_ARGUMENT(positions && positions->numel() == ids.numel(),
                   "positions: expected as many as ids");
    position_data = indices_of(*positions, "positions", position_table->size(0));
  }
  const Dropout dropout = dropout_argument(dropout_p, rng, site);
  std::vector<int64_t> sizes(sizes_of(ids).begin(), sizes_of(ids).end());
  sizes.push_back(columns);
  CHECK_ARGUMENT(type == 0 || type == 1, "type: got ", type, ", expected 0 or 1 on a CPU");
  Tensor out = empty(sizes, type == 1 ? ScalarType::BFloat16 : ScalarType::Float, weight);
  TorchParallel parallel;
  dispatch_float(out, "out", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const EmbeddingForward<T> args{id_data,
                                   data<float>(weight, "weight"),
                                   static_cast<float>(scale),
                                   position_data,
                                   data_or_null<float>(position_table, "position_table"),
                                   mutable_data<T>(out, "out"),
                                   ids.numel(),
                                   columns,
                                   dropout};
    if constexpr (std::is_same_v<T, float>) {
      embedding_kernels().forward_f32(args, parallel);
    } else {
      embedding_kernels().forward_bf16(args, parallel);
    }
  });
  return out;
}

Tensor embedding_backward(const Tensor& grad, const Tensor& ids, int64_t rows, double scale,
                          double dropout_p, const std::optional<Tensor>& rng, int64_t site) {
  CHECK_ARGUMENT(grad.dim() >= 1, "grad: got a scalar, expected at least one dimension");
  check_contiguous(grad, "grad");
  const int64_t columns = grad.size(grad.dim() - 1);
  CHECK_ARGUMENT(grad.numel() == ids.numel() * columns, "grad: got shape ",
                 shape_string(sizes_of(grad)), ", expected one row for each id of shape ",
                 shape_string(sizes_of(ids)));
  const Indices id_data = indices_of(ids, "ids", rows);
  const Dropout dropout = dropout_argument(dropout_p, rng, site);
  Tensor grad_weight = empty({rows, columns}, ScalarType::Float, grad);
  TorchParallel parallel;
  dispatch_float(grad, "grad", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const EmbeddingBackward<T> args{data<T>(grad, "grad"),
                                    id_data,
                                    static_cast<float>(scale),
                                    mutable_data<float>(grad_weight, "grad_weight"),
                                    ids.numel(),
                                    columns,
                                    rows,
                                    dropout};
    if constexpr (std::is_same_v<T, float>) {
      embedding_kernels().backward_f32(args, parallel);
    } else {
      embedding_kernels().backward_bf16(args, parallel);
    }
  });
  return grad_weight;
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CPU, m) {
  m.impl("embedding_forward", TORCH_BOX(&transformer_ext::embedding_forward));
  m.impl("embedding_backward", TORCH_BOX(&transformer_ext::embedding_backward));
}
