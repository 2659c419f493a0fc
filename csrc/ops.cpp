// The schemas of all ops, in one place. An op's implementation is registered beside its code, in
// csrc/<subject>/<subject>_op.cpp (CPU) and csrc/<subject>/<subject>_op_cuda.cpp (CUDA).
// Tensor(a!) marks an argument that the op writes to.
#include "common/isa.h"
#include "common/torch_op.h"

namespace transformer_ext {
namespace {

std::string isa() { return isa_name(active_isa()); }

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY(transformer_ext, m) {
  m.def("isa() -> str");

  // The product of csrc/gemm, with weights in the order of its kernel or as they lie. A weight [n,
  // k] is packed for x W^T; transposed, for dy W. The type of the packed tensor decides that of the
  // factors.
  m.def("gemm_packed_elements(int n, int k, bool bfloat16) -> int");
  m.def("gemm_pack_(Tensor(a!) out, Tensor weight, bool transposed) -> ()");
  m.def(
      "gemm_linear_(Tensor(a!) out, Tensor x, Tensor packed, Tensor? bias, bool accumulate) -> ()");
  m.def("gemm_matmul_(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()");

  // Packed: query [rows, heads, head_dim], output alike, statistics [2, heads, rows]. Padded: query
  // [batch, heads, length, head_dim], output [batch, length, heads, head_dim], statistics [2,
  // batch, heads, length]. mask and bias (float32) have 4 dimensions, 1 where broadcast. max_q,
  // max_k: see Packed. tensor_cores: whether a GPU's may be used, where they fit.
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? key_lengths, Tensor? mask, Tensor? bias, int max_q, "
      "int max_k, bool causal, float scale, float dropout_p, Tensor? rng, int site, "
      "bool tensor_cores=False) -> (Tensor, Tensor)");
  // grad and out in the layout of query. grad_bias is added to.
  m.def(
      "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor statistics, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_lengths, Tensor? "
      "mask, "
      "Tensor? bias, int max_q, int max_k, bool causal, float scale, float dropout_p, "
      "Tensor? rng, int site, Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, "
      "Tensor(d!)? grad_bias, bool tensor_cores=False) -> ()");

  m.def(
      "masked_softmax(Tensor x, Tensor? mask, Tensor? key_lengths, bool causal, bool log) -> "
      "Tensor");
  m.def("masked_softmax_backward(Tensor grad, Tensor output, bool log) -> Tensor");

  // The gradient replaces the logits if write_grad. Returns float64 [3]: loss, nll, correct.
  m.def(
      "cross_entropy_(Tensor(a!) logits, Tensor? bias, Tensor targets, Tensor? scale, "
      "float label_smoothing, int ignore_index, bool write_grad) -> Tensor");
  // The same sums, and the gradient (without rows unless write_grad).
  m.def(
      "cross_entropy(Tensor logits, Tensor targets, Tensor? scale, float label_smoothing, "
      "int ignore_index, bool write_grad) -> (Tensor, Tensor)");
  m.def("column_sum_(Tensor(a!) out, Tensor x, bool accumulate) -> ()");

  // A result that would be a copy of an argument, or that has nothing to hold, comes back empty.
  m.def(
      "residual_dropout(Tensor x, Tensor? residual, float dropout_p, Tensor? rng, int site) -> "
      "Tensor");
  // Returns sum, normed, mean, rstd.
  m.def(
      "residual_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool rms, "
      "float eps, float dropout_p, Tensor? rng, int site) -> (Tensor, Tensor, Tensor, Tensor)");
  // Returns the gradients of x (empty without dropout: that of residual), residual, weight, bias.
  m.def(
      "residual_norm_backward(Tensor grad_normed, Tensor? grad_sum, Tensor sum, Tensor mean, "
      "Tensor rstd, Tensor? weight, bool has_bias, bool rms, float dropout_p, Tensor? rng, "
      "int site) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "activation_forward(Tensor x, Tensor? bias, int kind, float dropout_p, Tensor? rng, "
      "int site) -> Tensor");
  // Returns the gradients of x and bias.
  m.def(
      "activation_backward(Tensor grad, Tensor saved, Tensor? bias, int kind, float dropout_p, "
      "Tensor? rng, int site) -> (Tensor, Tensor)");
  // type: of the result, 0: float32, 1: bfloat16, 2: float16 (CUDA only).
  m.def(
      "embedding_forward(Tensor ids, Tensor weight, float scale, Tensor? positions, "
      "Tensor? position_table, float dropout_p, Tensor? rng, int site, int type) -> Tensor");
  m.def(
      "embedding_backward(Tensor grad, Tensor ids, int rows, float scale, float dropout_p, "
      "Tensor? rng, int site) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&transformer_ext::isa));
}
