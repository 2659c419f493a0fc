#include "engine/encoder.h"

#include <algorithm>

#include "engine/cached_attention.h"

namespace transformer_ext::engine {

namespace {

// Rows that one task rounds.
constexpr int64_t kRowsPerTask = 64;

}  // namespace

void EncodedSources::encode(const Model& model, const std::vector<std::vector<int32_t>>& sources,
                            PositionTables& positions, Parallel& parallel) {
  const ModelConfig& config = model.config();
  tokens_.assign(sources, config.source_vocabulary, "source ids");
  const int64_t tokens = tokens_.tokens();
  const float* const x = stack_.run(model, model.encoder(), tokens_, positions, parallel);
  token_stride_ = 2 * config.kv_width();
  element_bytes_ = config.cache_element_bytes();
  char* const key_values =
      key_values_.reserve(config.decoder_layers * tokens * token_stride_ * element_bytes_);
  for (int64_t i = 0; i < config.decoder_layers; ++i) {
    const Linear& linear = model.decoder().layers[static_cast<size_t>(i)].cross->key_value;
    char* const layer = key_values + i * tokens * token_stride_ * element_bytes_;
    if (!config.bfloat16_cache()) {
      linear.apply(x, tokens, reinterpret_cast<float*>(layer), {}, parallel);
      continue;
    }
    float* const exact = stack_.scratch(tokens * token_stride_);
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
