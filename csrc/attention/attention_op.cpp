#include "attention/attention.h"
#include "common/torch_op.h"

namespace transformer_ext {
namespace {

using OptionalTensor = std::optional<Tensor>;

// What forward and backward share. `max_q` and `max_k` bound the sequences of a packed batch.
struct AttentionOptions {
  const OptionalTensor& cu_seqlens_q;
  const OptionalTensor& cu_seqlens_k;
  const OptionalTensor& key_lengths;
  const OptionalTensor& mask;
  const OptionalTensor& bias;
  int64_t max_q;
  int64_t max_k;
  bool causal;
  double scale;
  double dropout_p;
  const OptionalTensor& rng;
  int64_t site;
};

// Packed [rows, heads, head_dim], or padded [batch, heads, length, head_dim].
AttentionTensor view(const Tensor& x, const char* argument, const Tensor& query, bool writable) {
  check_type(x, argument, query.scalar_type());
  check_dim(x, argument, query.dim());
  const bool padded = x.dim() == 4;
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(x.size(last) <= 1 || x.numel() == 0 || x.stride(last) == 1, argument,
                  ": got strides ", shape_string({x.strides().data(), x.strides().size()}),
                  ", expected 1 for the last");
  AttentionTensor result;
  result.data = writable ? x.mutable_data_ptr() : const_cast<void*>(x.const_data_ptr());
  result.batch_stride = padded ? x.stride(0) : 0;
  result.head_stride = x.stride(1);
  result.token_stride = x.stride(padded ? 2 : 0);
  return result;
}

void check_like(const Tensor& x, const char* argument, const Tensor& like) {
  bool same = x.dim() == like.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == like.size(i);
  STD_TORCH_CHECK(same, argument, ": got shape ", shape_string(sizes_of(x)), ", expected ",
                  shape_string(sizes_of(like)));
}

// A wrong table of sequences would make the kernel read and write where nothing is allocated.
const int32_t* sequences(const Tensor& ends, const char* argument, int64_t batch, int64_t rows,
                         int64_t longest) {
  check_shape(ends, argument, {batch + 1});
  check_contiguous(ends, argument);
  const int32_t* x = data<int32_t>(ends, argument);
  bool ok = x[0] == 0 && x[batch] <= rows;
  for (int64_t b = 0; ok && b < batch; ++b) ok = x[b] <= x[b + 1] && x[b + 1] - x[b] <= longest;
  STD_TORCH_CHECK(ok, argument, ": expected ascending values from 0 to at most ", rows,
                  " (the rows), in steps of at most ", longest, " (the longest sequence)");
  return x;
}

// Strides of a [1 or batch, 1 or heads, 1 or queries, 1 or keys] tensor, 0 where it is broadcast.
void broadcast_strides(const Tensor& x, const char* argument, const AttentionArgs& a,
                       int64_t (&strides)[4]) {
  check_dim(x, argument, 4);
  const int64_t sizes[4] = {a.batch, a.heads, a.query_length, a.key_length};
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(x.size(i) == sizes[i] || x.size(i) == 1, argument, ": got shape ",
                    shape_string(sizes_of(x)), ", expected one that broadcasts to ",
                    shape_string(sizes));
    strides[i] = x.size(i) == 1 ? 0 : x.stride(i);
  }
}

void fill(AttentionArgs& a, const Tensor& query, const Tensor& key, const Tensor& value,
          const AttentionOptions& options) {
  const bool packed = options.cu_seqlens_q.has_value();
  const int64_t dim = packed ? 3 : 4;
  STD_TORCH_CHECK(packed == options.cu_seqlens_k.has_value(),
                  "cu_seqlens_q, cu_seqlens_k: expected both or neither");
  STD_TORCH_CHECK(!packed || !(options.key_lengths || options.mask || options.bias),
                  "key_lengths, mask, bias: expected none with packed sequences");
  check_dim(query, "query", dim);
  dispatch_float(query, "query", [&](auto tag) {
    a.bfloat16 = std::is_same_v<typename decltype(tag)::type, bfloat16>;
  });
  a.query = view(query, "query", query, false);
  a.key = view(key, "key", query, false);
  a.value = view(value, "value", query, false);
  check_like(value, "value", key);
  a.heads = query.size(1);
  a.kv_heads = key.size(1);
  a.head_dim = query.size(dim - 1);
  a.query_length = query.size(dim - 3 + (packed ? 0 : 1));
  a.key_length = key.size(dim - 3 + (packed ? 0 : 1));
  STD_TORCH_CHECK(key.size(dim - 1) == a.head_dim, "key: got shape ", shape_string(sizes_of(key)),
                  ", expected the query's head_dim ", a.head_dim);
  STD_TORCH_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "key: got ", a.kv_heads,
                  " heads, expected a number that divides the query's ", a.heads);
  if (packed) {
    a.batch = options.cu_seqlens_q->numel() - 1;
    STD_TORCH_CHECK(a.batch >= 0, "cu_seqlens_q: expected at least one value");
    a.max_query_length = options.max_q;
    a.max_key_length = options.max_k;
    a.cu_seqlens_q = sequences(*options.cu_seqlens_q, "cu_seqlens_q", a.batch, a.query_length,
                               a.max_query_length);
    a.cu_seqlens_k =
        sequences(*options.cu_seqlens_k, "cu_seqlens_k", a.batch, a.key_length, a.max_key_length);
  } else {
    a.batch = query.size(0);
    STD_TORCH_CHECK(key.size(0) == a.batch, "key: got shape ", shape_string(sizes_of(key)),
                    ", expected the query's batch size ", a.batch);
    a.max_query_length = a.query_length;
    a.max_key_length = a.key_length;
  }
  if (options.key_lengths) {
    check_shape(*options.key_lengths, "key_lengths", {a.batch});
    check_contiguous(*options.key_lengths, "key_lengths");
    a.key_lengths = data<int64_t>(*options.key_lengths, "key_lengths");
    for (int64_t b = 0; b < a.batch; ++b) {
      STD_TORCH_CHECK(a.key_lengths[b] >= 0 && a.key_lengths[b] <= a.key_length,
                      "key_lengths: got ", a.key_lengths[b], ", expected 0 to ", a.key_length);
    }
  }
  if (options.mask) {
    check_type(*options.mask, "mask", ScalarType::Bool);
    a.mask = static_cast<const uint8_t*>(options.mask->const_data_ptr());
    broadcast_strides(*options.mask, "mask", a, a.mask_strides);
  }
  if (options.bias) {
    a.bias = data<float>(*options.bias, "bias");
    broadcast_strides(*options.bias, "bias", a, a.bias_strides);
  }
  a.causal = options.causal;
  a.scale = static_cast<float>(options.scale);
  if (options.rng) {
    check_shape(*options.rng, "rng", {3});
    check_contiguous(*options.rng, "rng");
    a.dropout = make_dropout(data<int64_t>(*options.rng, "rng"), options.site, options.dropout_p);
  }
}

// The output has the packed query's shape, or [batch, length, heads, head_dim], so that the heads
// of a token lie together for the projection that follows.
std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
    const OptionalTensor& mask, const OptionalTensor& bias, int64_t max_q, int64_t max_k,
    bool causal, double scale, double dropout_p, const OptionalTensor& rng, int64_t site) {
  AttentionArgs a;
  fill(a, query, key, value,
       {cu_seqlens_q, cu_seqlens_k, key_lengths, mask, bias, max_q, max_k, causal, scale, dropout_p,
        rng, site});
  const bool packed = a.cu_seqlens_q != nullptr;
  Tensor out =
      packed ? empty({a.query_length, a.heads, a.head_dim}, query.scalar_type(), query)
             : empty({a.batch, a.query_length, a.heads, a.head_dim}, query.scalar_type(), query);
  Tensor statistics = packed
                          ? empty({2, a.heads, a.query_length}, ScalarType::Float, query)
                          : empty({2, a.batch, a.heads, a.query_length}, ScalarType::Float, query);
  a.out.data = out.mutable_data_ptr();
  a.out.batch_stride = a.query_length * a.heads * a.head_dim;
  a.out.token_stride = a.heads * a.head_dim;
  a.out.head_stride = a.head_dim;
  a.statistics = mutable_data<float>(statistics, "statistics");
  TorchParallel parallel;
  attention_kernels().forward(a, parallel);
  return {std::move(out), std::move(statistics)};
}

// All tensors in the layout of query, key and value; the gradients may be slices of one buffer.
void attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                        const Tensor& value, const Tensor& out, const Tensor& statistics,
                        const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                        const OptionalTensor& key_lengths, const OptionalTensor& mask,
                        const OptionalTensor& bias, int64_t max_q, int64_t max_k, bool causal,
                        double scale, double dropout_p, const OptionalTensor& rng, int64_t site,
                        Tensor grad_query, Tensor grad_key, Tensor grad_value,
                        const OptionalTensor& grad_bias) {
  AttentionBackwardArgs a;
  fill(a, query, key, value,
       {cu_seqlens_q, cu_seqlens_k, key_lengths, mask, bias, max_q, max_k, causal, scale, dropout_p,
        rng, site});
  const bool packed = a.cu_seqlens_q != nullptr;
  check_like(grad, "grad", query);
  check_like(out, "out", query);
  check_like(grad_query, "grad_query", query);
  check_like(grad_key, "grad_key", key);
  check_like(grad_value, "grad_value", value);
  if (packed) {
    check_shape(statistics, "statistics", {2, a.heads, a.query_length});
  } else {
    check_shape(statistics, "statistics", {2, a.batch, a.heads, a.query_length});
  }
  check_contiguous(statistics, "statistics");
  check_type(statistics, "statistics", ScalarType::Float);
  a.grad_out = view(grad, "grad", query, false);
  a.out = view(out, "out", query, false);
  a.statistics = static_cast<float*>(const_cast<void*>(statistics.const_data_ptr()));
  a.grad_query = view(grad_query, "grad_query", query, true);
  a.grad_key = view(grad_key, "grad_key", query, true);
  a.grad_value = view(grad_value, "grad_value", query, true);
  if (grad_bias) {
    STD_TORCH_CHECK(a.bias != nullptr, "grad_bias: expected none without bias");
    check_like(*grad_bias, "grad_bias", *bias);
    int64_t strides[4];
    broadcast_strides(*grad_bias, "grad_bias", a, strides);
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(strides[i] == a.bias_strides[i], "grad_bias: expected the strides of bias");
    }
    a.grad_bias = mutable_data<float>(*grad_bias, "grad_bias");
  }
  TorchParallel parallel;
  attention_kernels().backward(a, parallel);
}

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&transformer_ext::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&transformer_ext::attention_backward));
}
