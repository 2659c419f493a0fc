#include "engine/encoder.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "attention/attention.h"
#include "engine/cached_attention.h"

namespace transformer_ext::engine {

namespace {

// Rows that one task rotates or rounds.
constexpr int64_t kRowsPerTask = 64;

void check_ids(const std::vector<int32_t>& ids, int64_t vocabulary) {
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocabulary) {
      throw std::invalid_argument("source ids: got " + std::to_string(id) + ", expected 0 to " +
                                  std::to_string(vocabulary - 1));
    }
  }
}

}  // namespace

void EncodedSources::encode(const Model& model, const std::vector<std::vector<int32_t>>& sources,
                            PositionTables& positions, Parallel& parallel) {
  const ModelConfig& config = model.config();
  const int64_t width = config.width;
  const int64_t query_width = config.query_width();
  const int64_t kv_width = config.kv_width();
  offsets_.assign(1, 0);
  ids_.clear();
  token_positions_.clear();
  int64_t longest = 0;
  for (const std::vector<int32_t>& source : sources) {
    check_ids(source, config.source_vocabulary);
    ids_.insert(ids_.end(), source.begin(), source.end());
    const int64_t length = static_cast<int64_t>(source.size());
    for (int64_t i = 0; i < length; ++i) token_positions_.push_back(static_cast<int32_t>(i));
    offsets_.push_back(static_cast<int32_t>(ids_.size()));
    longest = std::max(longest, length);
  }
  const int64_t tokens = offsets_.back();
  const int64_t projected_width = query_width + 2 * kv_width;
  token_stride_ = 2 * kv_width;
  float* const x = x_.reserve(tokens * width);
  float* const normed = config.norm_first ? normed_.reserve(tokens * width) : x;
  float* const projected = projected_.reserve(tokens * projected_width);
  float* const attended = attended_.reserve(tokens * query_width);

  AttentionArgs attention;
  attention.batch = static_cast<int64_t>(sources.size());
  attention.heads = config.heads;
  attention.kv_heads = config.kv_heads;
  attention.head_dim = config.head_dim;
  attention.query_length = tokens;
  attention.key_length = tokens;
  attention.max_query_length = longest;
  attention.max_key_length = longest;
  attention.cu_seqlens_q = offsets_.data();
  attention.cu_seqlens_k = offsets_.data();
  attention.scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim));
  attention.query = {projected, 0, projected_width, config.head_dim};
  attention.key = {projected + query_width, 0, projected_width, config.head_dim};
  attention.value = {projected + query_width + kv_width, 0, projected_width, config.head_dim};
  attention.out = {attended, 0, query_width, config.head_dim};

  model.embed(model.encoder(), ids_.data(), token_positions_.data(),
              positions.added(config, model.encoder(), longest), tokens, x, parallel);
  const float* const angles = positions.rotary(config, longest);
  const Epilogue onto_residual{GemmActivation::none, true};
  for (const Layer& layer : model.encoder_layers()) {
    if (config.norm_first) layer.self_norm.apply(x, tokens, normed, parallel);
    layer.self_in.apply(normed, tokens, projected, {}, parallel);
    if (angles != nullptr) {
      parallel.for_each((tokens + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
        const int64_t end = std::min((task + 1) * kRowsPerTask, tokens);
        for (int64_t t = task * kRowsPerTask; t < end; ++t) {
          rotate(projected + t * projected_width, config.heads + config.kv_heads, config.head_dim,
                 angles + token_positions_[static_cast<size_t>(t)] * config.head_dim);
        }
      });
    }
    attention_kernels().forward(attention, parallel);
    layer.self_out.apply(attended, tokens, x, onto_residual, parallel);
    if (!config.norm_first) layer.self_norm.apply(x, tokens, x, parallel);

    if (config.norm_first) layer.feed_forward_norm.apply(x, tokens, normed, parallel);
    model.add_feed_forward(layer.feed_forward, normed, tokens, x, inner_, parallel);
    if (!config.norm_first) layer.feed_forward_norm.apply(x, tokens, x, parallel);
  }
  if (config.final_norm) model.encoder().norm.apply(x, tokens, x, parallel);

  element_bytes_ = config.cache_element_bytes();
  char* const key_values =
      key_values_.reserve(config.decoder_layers * tokens * token_stride_ * element_bytes_);
  for (int64_t i = 0; i < config.decoder_layers; ++i) {
    const Linear& linear = model.decoder_layers()[static_cast<size_t>(i)].cross_key_value;
    char* const layer = key_values + i * tokens * token_stride_ * element_bytes_;
    if (!config.bfloat16_cache()) {
      linear.apply(x, tokens, reinterpret_cast<float*>(layer), {}, parallel);
      continue;
    }
    float* const exact = projected_.reserve(tokens * token_stride_);
    linear.apply(x, tokens, exact, {}, parallel);
    parallel.for_each((tokens + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
      const int64_t begin = task * kRowsPerTask * token_stride_;
      const int64_t end = std::min((task + 1) * kRowsPerTask, tokens) * token_stride_;
      cached_attention_kernels().store(exact + begin, end - begin, true,
                                       layer + begin * element_bytes_);
    });
  }
}

}  // namespace transformer_ext::engine
