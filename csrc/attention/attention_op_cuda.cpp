#include "attention/attention_check.h"
#include "attention/attention_cuda.h"
#include "common/torch_op_cuda.h"

namespace transformer_ext {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr char kOtherKernels[] = "TRANSFORMER_EXT_CUDA_ATTENTION=simple takes simpler kernels, ";

void fill(AttentionArgs& a, const Tensor& query, const Tensor& key, const Tensor& value,
          const AttentionOptions& options) {
  fill_attention(a, query, key, value, options);
  CHECK_ARGUMENT(a.head_dim <= kAttentionCudaMaxHeadDim, "query: got head_dim ", a.head_dim,
                 ", expected at most ", kAttentionCudaMaxHeadDim, " on CUDA");
}

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
    const OptionalTensor& mask, const OptionalTensor& bias, int64_t max_q, int64_t max_k,
    bool causal, double scale, double dropout_p, const OptionalTensor& rng, int64_t site,
    bool tensor_cores) {
  const CudaContext context(query);
  AttentionArgs a;
  fill(a, query, key, value,
       {cu_seqlens_q, cu_seqlens_k, key_lengths, mask, bias, max_q, max_k, causal, scale, dropout_p,
        rng, site});
  auto results = attention_results(a, query);
  check_launch(attention_forward_cuda(a, float_type_of(query, "query"),
                                      cuda_dropout_argument(dropout_p, rng, site, query),
                                      tensor_cores, context.stream),
               "attention_forward", kOtherKernels);
  return results;
}

void attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                        const Tensor& value, const Tensor& out, const Tensor& statistics,
                        const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                        const OptionalTensor& key_lengths, const OptionalTensor& mask,
                        const OptionalTensor& bias, int64_t max_q, int64_t max_k, bool causal,
                        double scale, double dropout_p, const OptionalTensor& rng, int64_t site,
                        Tensor grad_query, Tensor grad_key, Tensor grad_value,
                        const OptionalTensor& grad_bias, bool tensor_cores) {
  CHECK_ARGUMENT(!grad_bias, "grad_bias: expected none on CUDA, where bias has no gradient");
  const CudaContext context(query);
  AttentionBackwardArgs a;
  fill(a, query, key, value,
       {cu_seqlens_q, cu_seqlens_k, key_lengths, mask, bias, max_q, max_k, causal, scale, dropout_p,
        rng, site});
  fill_attention_gradients(a, query, key, bias,
                           {grad, out, statistics, grad_query, grad_key, grad_value, grad_bias});
  // A float for each head of each query row.
  Tensor delta = empty({statistics.numel() / 2}, ScalarType::Float, query);
  check_launch(
      attention_backward_cuda(a, float_type_of(query, "query"),
                              cuda_dropout_argument(dropout_p, rng, site, query),
                              mutable_data<float>(delta, "delta"), tensor_cores, context.stream),
      "attention_backward", kOtherKernels);
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&transformer_ext::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&transformer_ext::attention_backward));
}
