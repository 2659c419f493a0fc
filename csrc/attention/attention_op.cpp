#include "attention/attention_check.h"

namespace transformer_ext {
namespace {

using OptionalTensor = std::optional<Tensor>;

// A wrong table of sequences would make the kernel read and write where nothing is allocated.
void check_sequences(const int32_t* ends, const char* argument, int64_t batch, int64_t rows,
                     int64_t longest) {
  bool ok = ends[0] == 0 && ends[batch] <= rows;
  for (int64_t b = 0; ok && b < batch; ++b) {
    ok = ends[b] <= ends[b + 1] && ends[b + 1] - ends[b] <= longest;
  }
  CHECK_AS(std::out_of_range, ok, argument, ": expected ascending values from 0 to at most ", rows,
           " (the rows), in steps of at most ", longest, " (the longest sequence)");
}

void fill(AttentionArgs& a, const Tensor& query, const Tensor& key, const Tensor& value,
          const AttentionOptions& options) {
  dispatch_float(query, "query", [&](auto tag) {
    a.bfloat16 = std::is_same_v<typename decltype(tag)::type, bfloat16>;
  });
  fill_attention(a, query, key, value, options);
  if (a.cu_seqlens_q != nullptr) {
    check_sequences(a.cu_seqlens_q, "cu_seqlens_q", a.batch, a.query_length, a.max_query_length);
    check_sequences(a.cu_seqlens_k, "cu_seqlens_k", a.batch, a.key_length, a.max_key_length);
  }
  check_lengths(a.key_lengths, "key_lengths", a.batch, a.key_length);
  if (options.rng) {
    check_shape(*options.rng, "rng", {3});
    check_contiguous(*options.rng, "rng");
    a.dropout = make_dropout(data<int64_t>(*options.rng, "rng"), options.site, options.dropout_p);
  }
}

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
    const OptionalTensor& mask, const OptionalTensor& bias, int64_t max_q, int64_t max_k,
    bool causal, double scale, double dropout_p, const OptionalTensor& rng, int64_t site, bool) {
  AttentionArgs a;
  fill(a, query, key, value,
       {cu_seqlens_q, cu_seqlens_k, key_lengths, mask, bias, max_q, max_k, causal, scale, dropout_p,
        rng, site});
  auto results = attention_results(a, query);
  TorchParallel parallel;
  attention_kernels().forward(a, parallel);
  return results;
}

void attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                        const Tensor& value, const Tensor& out, const Tensor& statistics,
                        const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                        const OptionalTensor& key_lengths, const OptionalTensor& mask,
                        const OptionalTensor& bias, int64_t max_q, int64_t max_k, bool causal,
                        double scale, double dropout_p, const OptionalTensor& rng, int64_t site,
                        Tensor grad_query, Tensor grad_key, Tensor grad_value,
                        const OptionalTensor& grad_bias, bool) {
  AttentionBackwardArgs a;
  fill(a, query, key, value,
       {cu_seqlens_q, cu_seqlens_k, key_lengths, mask, bias, max_q, max_k, causal, scale, dropout_p,
        rng, site});
  fill_attention_gradients(a, query, key, bias,
                           {grad, out, statistics, grad_query, grad_key, grad_value, grad_bias});
  TorchParallel parallel;
  attention_kernels().backward(a, parallel);
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&transformer_ext::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&transformer_ext::attention_backward));
}
