// The checks that the CPU and the CUDA op share, and the kernels' arguments made from tensors: all
// but the values of tables, which lie on the device.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "attention/attention.h"
#include "common/torch_op.h"

namespace transformer_ext {

// What forward and backward share. `max_q` and `max_k` bound the sequences of a packed batch.
struct AttentionOptions {
  const std::optional<Tensor>& cu_seqlens_q;
  const std::optional<Tensor>& cu_seqlens_k;
  const std::optional<Tensor>& key_lengths;
  const std::optional<Tensor>& mask;
  const std::optional<Tensor>& bias;
  int64_t max_q;
  int64_t max_k;
  bool causal;
  double scale;
  double dropout_p;
  const std::optional<Tensor>& rng;
  int64_t site;
};

// Packed [rows, heads, head_dim], or padded [batch, heads, length, head_dim].
inline AttentionTensor attention_view(const Tensor& x, const char* argument, const Tensor& query,
                                      bool writable) {
  check_type(x, argument, query.scalar_type());
  check_device(x, argument, query);
  check_dim(x, argument, query.dim());
  const bool padded = x.dim() == 4;
  const int64_t last = x.dim() - 1;
  CHECK_ARGUMENT(x.size(last) <= 1 || x.numel() == 0 || x.stride(last) == 1, argument,
                 ": got strides ", shape_string({x.strides().data(), x.strides().size()}),
                 ", expected 1 for the last");
  AttentionTensor result;
  result.data = writable ? x.mutable_data_ptr() : const_cast<void*>(x.const_data_ptr());
  result.batch_stride = padded ? x.stride(0) : 0;
  result.head_stride = x.stride(1);
  result.token_stride = x.stride(padded ? 2 : 0);
  return result;
}

inline void check_shape_of(const Tensor& x, const char* argument, const Tensor& like) {
  bool same = x.dim() == like.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == like.size(i);
  CHECK_ARGUMENT(same, argument, ": got shape ", shape_string(sizes_of(x)), ", expected ",
                 shape_string(sizes_of(like)));
}

// Strides of a [1 or batch, 1 or heads, 1 or queries, 1 or keys] tensor, 0 where it is broadcast.
inline void broadcast_strides(const Tensor& x, const char* argument, const AttentionArgs& a,
                              int64_t (&strides)[4]) {
  check_dim(x, argument, 4);
  const int64_t sizes[4] = {a.batch, a.heads, a.query_length, a.key_length};
  for (int i = 0; i < 4; ++i) {
    CHECK_ARGUMENT(x.size(i) == sizes[i] || x.size(i) == 1, argument, ": got shape ",
                   shape_string(sizes_of(x)), ", expected one that broadcasts to ",
                   shape_string(sizes));
    strides[i] = x.size(i) == 1 ? 0 : x.stride(i);
  }
}

// Everything but the type, the dropout and the results.
inline void fill_attention(AttentionArgs& a, const Tensor& query, const Tensor& key,
                           const Tensor& value, const AttentionOptions& options) {
  const bool packed = options.cu_seqlens_q.has_value();
  const int64_t dim = packed ? 3 : 4;
  CHECK_ARGUMENT(packed == options.cu_seqlens_k.has_value(),
                 "cu_seqlens_q, cu_seqlens_k: expected both or neither");
  CHECK_ARGUMENT(!packed || !(options.key_lengths || options.mask || options.bias),
                 "key_lengths, mask, bias: expected none with packed sequences");
  check_dim(query, "query", dim);
  a.query = attention_view(query, "query", query, false);
  a.key = attention_view(key, "key", query, false);
  a.value = attention_view(value, "value", query, false);
  check_shape_of(value, "value", key);
  a.heads = query.size(1);
  a.kv_heads = key.size(1);
  a.head_dim = query.size(dim - 1);
  a.query_length = query.size(dim - 3 + (packed ? 0 : 1));
  a.key_length = key.size(dim - 3 + (packed ? 0 : 1));
  CHECK_ARGUMENT(key.size(dim - 1) == a.head_dim, "key: got shape ", shape_string(sizes_of(key)),
                 ", expected the query's head_dim ", a.head_dim);
  CHECK_ARGUMENT(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "key: got ", a.kv_heads,
                 " heads, expected a number that divides the query's ", a.heads);
  if (packed) {
    a.batch = options.cu_seqlens_q->numel() - 1;
    CHECK_ARGUMENT(a.batch >= 0, "cu_seqlens_q: expected at least one value");
    a.max_query_length = options.max_q;
    a.max_key_length = options.max_k;
    const auto table = [&](const Tensor& ends, const char* argument) {
      check_device(ends, argument, query);
      check_shape(ends, argument, {a.batch + 1});
      check_contiguous(ends, argument);
      return data<int32_t>(ends, argument);
    };
    a.cu_seqlens_q = table(*options.cu_seqlens_q, "cu_seqlens_q");
    a.cu_seqlens_k = table(*options.cu_seqlens_k, "cu_seqlens_k");
  } else {
    a.batch = query.size(0);
    CHECK_ARGUMENT(key.size(0) == a.batch, "key: got shape ", shape_string(sizes_of(key)),
                   ", expected the query's batch size ", a.batch);
    a.max_query_length = a.query_length;
    a.max_key_length = a.key_length;
  }
  for (const int64_t most : {a.max_query_length, a.max_key_length}) {
    CHECK_ARGUMENT(most >= 0 && most <= INT32_MAX, "max_q, max_k: got ", most,
                   ", expected 0 to 2147483647");
  }
  if (options.key_lengths) {
    check_device(*options.key_lengths, "key_lengths", query);
    check_shape(*options.key_lengths, "key_lengths", {a.batch});
    check_contiguous(*options.key_lengths, "key_lengths");
    a.key_lengths = data<int64_t>(*options.key_lengths, "key_lengths");
  }
  if (options.mask) {
    check_device(*options.mask, "mask", query);
    check_type(*options.mask, "mask", ScalarType::Bool);
    a.mask = static_cast<const uint8_t*>(options.mask->const_data_ptr());
    broadcast_strides(*options.mask, "mask", a, a.mask_strides);
  }
  if (options.bias) {
    check_device(*options.bias, "bias", query);
    a.bias = data<float>(*options.bias, "bias");
    broadcast_strides(*options.bias, "bias", a, a.bias_strides);
  }
  a.causal = options.causal;
  a.scale = static_cast<float>(options.scale);
}

// Output and statistics. The output has the packed query's shape, or [batch, length, heads,
// head_dim], so that the heads of a token lie together for the projection that follows.
inline std::tuple<Tensor, Tensor> attention_results(AttentionArgs& a, const Tensor& query) {
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
  return {std::move(out), std::move(statistics)};
}

// All tensors in the layout of query, key and value; the gradients may be slices of one buffer.
struct AttentionGradients {
  const Tensor& grad;
  const Tensor& out;
  const Tensor& statistics;
  const Tensor& grad_query;
  const Tensor& grad_key;
  const Tensor& grad_value;
  const std::optional<Tensor>& grad_bias;
};

// What backward takes besides what fill_attention() has filled.
inline void fill_attention_gradients(AttentionBackwardArgs& a, const Tensor& query,
                                     const Tensor& key, const std::optional<Tensor>& bias,
                                     const AttentionGradients& g) {
  check_shape_of(g.grad, "grad", query);
  check_shape_of(g.out, "out", query);
  check_shape_of(g.grad_query, "grad_query", query);
  check_shape_of(g.grad_key, "grad_key", key);
  check_shape_of(g.grad_value, "grad_value", key);
  if (a.cu_seqlens_q != nullptr) {
    check_shape(g.statistics, "statistics", {2, a.heads, a.query_length});
  } else {
    check_shape(g.statistics, "statistics", {2, a.batch, a.heads, a.query_length});
  }
  check_device(g.statistics, "statistics", query);
  check_contiguous(g.statistics, "statistics");
  check_type(g.statistics, "statistics", ScalarType::Float);
  a.grad_out = attention_view(g.grad, "grad", query, false);
  a.out = attention_view(g.out, "out", query, false);
  a.statistics = static_cast<float*>(const_cast<void*>(g.statistics.const_data_ptr()));
  a.grad_query = attention_view(g.grad_query, "grad_query", query, true);
  a.grad_key = attention_view(g.grad_key, "grad_key", query, true);
  a.grad_value = attention_view(g.grad_value, "grad_value", query, true);
  if (g.grad_bias) {
    CHECK_ARGUMENT(a.bias != nullptr, "grad_bias: expected none without bias");
    check_device(*g.grad_bias, "grad_bias", query);
    check_shape_of(*g.grad_bias, "grad_bias", *bias);
    int64_t strides[4];
    broadcast_strides(*g.grad_bias, "grad_bias", a, strides);
    for (int i = 0; i < 4; ++i) {
      CHECK_ARGUMENT(strides[i] == a.bias_strides[i], "grad_bias: expected the strides of bias");
    }
    a.grad_bias = mutable_data<float>(*g.grad_bias, "grad_bias");
  }
}

}  // namespace transformer_ext
