#include "engine/stack.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "attention/attention.h"

namespace transformer_ext::engine {

namespace {

// Rows that one task rotates.
constexpr int64_t kRowsPerTask = 64;

// Moves the given rows, ascending, to the front.
void keep_rows(const std::vector<int32_t>& rows, int64_t width, float* x) {
  int64_t to = 0;
  for (const int32_t row : rows) {
    if (row != to) std::copy_n(x + row * width, width, x + to * width);
    ++to;
  }
}

}  // namespace

void PackedTokens::assign(const std::vector<std::vector<int32_t>>& sequences, int64_t vocabulary,
                          const char* name) {
  offsets_.assign(1, 0);
  ids_.clear();
  positions_.clear();
  longest_ = 0;
  for (const std::vector<int32_t>& sequence : sequences) {
    for (const int32_t id : sequence) {
      if (id < 0 || id >= vocabulary) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(id) +
                                    ", expected 0 to " + std::to_string(vocabulary - 1));
      }
    }
    ids_.insert(ids_.end(), sequence.begin(), sequence.end());
    const int64_t length = static_cast<int64_t>(sequence.size());
    for (int64_t i = 0; i < length; ++i) positions_.push_back(static_cast<int32_t>(i));
    offsets_.push_back(static_cast<int32_t>(ids_.size()));
    longest_ = std::max(longest_, length);
  }
}

float* StackRun::run(const Model& model, const Stack& stack, const PackedTokens& packed,
                     PositionTables& positions, Parallel& parallel, const Options& options) {
  const ModelConfig& config = model.config();
  int64_t tokens = packed.tokens();
  const int64_t longest = packed.longest();
  const int64_t width = config.width;
  const int64_t query_width = config.query_width();
  const int64_t kv_width = config.kv_width();
  const int64_t projected_width = query_width + 2 * kv_width;
  float* const x = x_.reserve(tokens * width);
  float* const normed = config.norm_first ? normed_.reserve(tokens * width) : x;
  float* const projected = projected_.reserve(tokens * projected_width);
  float* const attended = attended_.reserve(tokens * query_width);

  AttentionArgs attention;
  attention.batch = packed.sequences();
  attention.heads = config.heads;
  attention.kv_heads = config.kv_heads;
  attention.head_dim = config.head_dim;
  attention.query_length = tokens;
  attention.key_length = tokens;
  attention.max_query_length = longest;
  attention.max_key_length = longest;
  attention.cu_seqlens_q = packed.offsets();
  attention.cu_seqlens_k = packed.offsets();
  attention.scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim));
  attention.query = {projected, 0, projected_width, config.head_dim};
  attention.key = {projected + query_width, 0, projected_width, config.head_dim};
  attention.value = {projected + query_width + kv_width, 0, projected_width, config.head_dim};
  attention.out = {attended, 0, query_width, config.head_dim};

  model.embed(stack, packed.ids(), packed.positions(), positions.added(config, stack, longest),
              tokens, x, parallel, options.token_types);
  const float* const angles = positions.rotary(config, longest);
  const Epilogue onto_residual{GemmActivation::none, true};
  for (size_t i = 0; i < stack.layers.size(); ++i) {
    const Layer& layer = stack.layers[i];
    if (options.before_layer) options.before_layer();
    if (config.norm_first) layer.self_norm.apply(x, tokens, normed, parallel);
    layer.self_in.apply(normed, tokens, projected, {}, parallel);
    if (angles != nullptr) {
      parallel.for_each((tokens + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
        const int64_t end = std::min((task + 1) * kRowsPerTask, tokens);
        for (int64_t t = task * kRowsPerTask; t < end; ++t) {
          rotate(projected + t * projected_width, config.heads + config.kv_heads, config.head_dim,
                 angles + packed.positions()[t] * config.head_dim);
        }
      });
    }
    attention_kernels().forward(attention, parallel);
    if (options.wanted != nullptr && i + 1 == stack.layers.size()) {
      // From here on a token is for itself: three quarters of a usual layer's products are saved.
      keep_rows(*options.wanted, query_width, attended);
      keep_rows(*options.wanted, width, x);
      tokens = static_cast<int64_t>(options.wanted->size());
    }
    layer.self_out.apply(attended, tokens, x, onto_residual, parallel);
    if (!config.norm_first) layer.self_norm.apply(x, tokens, x, parallel);

    if (config.norm_first) layer.feed_forward_norm.apply(x, tokens, normed, parallel);
    model.add_feed_forward(layer.feed_forward, normed, tokens, x, inner_, parallel);
    if (!config.norm_first) layer.feed_forward_norm.apply(x, tokens, x, parallel);
  }
  if (options.wanted != nullptr && stack.layers.empty()) {
    keep_rows(*options.wanted, width, x);
    tokens = static_cast<int64_t>(options.wanted->size());
  }
  if (config.final_norm) stack.norm.apply(x, tokens, x, parallel);
  return x;
}

}  // namespace transformer_ext::engine
