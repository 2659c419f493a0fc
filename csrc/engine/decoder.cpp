#include "engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/cached_attention.h"

namespace transformer_ext::engine {

namespace {

// Rows of one attention task: about 20 microseconds of work.
constexpr int64_t kRowsPerTask = 4;

// A slot of thread_scratch that no kernel called within these tasks uses.
constexpr int kAttentionSlot = 14;

float* scratch(int64_t floats, int slot) {
  return static_cast<float*>(thread_scratch(static_cast<size_t>(floats) * sizeof(float), slot));
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

void Decoder::start(const Model& model, const EncodedSources& sources, int64_t attention_layer) {
  model_ = &model;
  sources_ = &sources;
  attention_layer_ = attention_layer;
  longest_source_ = 0;
  position_ = 0;
  const ModelConfig& config = model.config();
  block_stride_ = config.decoder_layers * 2 * config.kv_width();
  source_keys_.clear();
  source_keys_begin_.clear();
  for (int64_t sentence = 0; sentence < sources.sentences(); ++sentence) {
    source_keys_begin_.push_back(static_cast<int64_t>(source_keys_.size()));
    longest_source_ = std::max(longest_source_, sources.length(sentence));
    for (int64_t i = 0; i < sources.length(sentence); ++i) {
      source_keys_.push_back(sources.keys(sentence) + i * sources.token_stride());
    }
  }
}

void Decoder::advance_paths(const std::vector<Row>& rows) {
  const int64_t length = position_ + 1;
  const int64_t count = static_cast<int64_t>(rows.size());
  if (static_cast<int64_t>(blocks_.size()) < length) blocks_.emplace_back();
  const float* const block = blocks_[static_cast<size_t>(position_)].reserve(count * block_stride_);
  std::swap(paths_, earlier_paths_);
  const float** const paths = paths_.reserve(count * length);
  for (int64_t r = 0; r < count; ++r) {
    const float** const path = paths + r * length;
    if (position_ > 0) {
      std::copy_n(earlier_paths_.data() + rows[static_cast<size_t>(r)].parent * position_,
                  position_, path);
    }
    path[position_] = block + r * block_stride_;
  }
}

const float* Decoder::step(const std::vector<Row>& rows, PositionTables& positions,
                           Parallel& parallel) {
  const ModelConfig& config = model_->config();
  const int64_t count = static_cast<int64_t>(rows.size());
  const int64_t length = position_ + 1;
  const int64_t width = config.width;
  const int64_t head_dim = config.head_dim;
  const int64_t query_width = config.query_width();
  const int64_t kv_width = config.kv_width();
  const int64_t projected_width = query_width + 2 * kv_width;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  advance_paths(rows);
  float* const block = blocks_[static_cast<size_t>(position_)].data();
  float* const x = x_.reserve(count * width);
  float* const normed = config.norm_first ? normed_.reserve(count * width) : x;
  float* const projected = projected_.reserve(count * projected_width);
  float* const attended = attended_.reserve(count * query_width);
  float* const kept_attention =
      attention_layer_ < 0 ? nullptr : attention_.reserve(count * longest_source_);

  ids_.clear();
  for (const Row& row : rows) ids_.push_back(row.token);
  row_positions_.assign(rows.size(), static_cast<int32_t>(position_));
  model_->embed(model_->decoder(), ids_.data(), row_positions_.data(),
                positions.added(config, model_->decoder(), length), count, x, parallel);
  const float* const rotary = positions.rotary(config, length);
  const float* const angles = rotary == nullptr ? nullptr : rotary + position_ * head_dim;

  const int64_t tasks = (count + kRowsPerTask - 1) / kRowsPerTask;
  const Epilogue onto_residual{GemmActivation::none, true};
  for (int64_t i = 0; i < config.decoder_layers; ++i) {
    const DecoderLayer& layer = model_->decoder_layers()[static_cast<size_t>(i)];
    if (config.norm_first) layer.self_norm.apply(x, count, normed, parallel);
    layer.self_in.apply(normed, count, projected, {}, parallel);
    parallel.for_each(tasks, [&](int64_t task) {
      float* const scores = scratch(round_up(length, 16), kAttentionSlot);
      const int64_t end = std::min((task + 1) * kRowsPerTask, count);
      for (int64_t r = task * kRowsPerTask; r < end; ++r) {
        float* const row = projected + r * projected_width;
        if (angles != nullptr) rotate(row, config.heads + config.kv_heads, head_dim, angles);
        const int64_t key_offset = i * 2 * kv_width;
        std::copy_n(row + query_width, 2 * kv_width, block + r * block_stride_ + key_offset);
        cached_attention_kernels().attend(
            {row, paths_.data() + r * length, key_offset, key_offset + kv_width, length,
             config.heads, config.kv_heads, head_dim, scale, scores, attended + r * query_width});
      }
    });
    layer.self_out.apply(attended, count, x, onto_residual, parallel);
    if (!config.norm_first) layer.self_norm.apply(x, count, x, parallel);

    if (config.norm_first) layer.cross_norm.apply(x, count, normed, parallel);
    layer.cross_query.apply(normed, count, projected, {}, parallel);
    parallel.for_each(tasks, [&](int64_t task) {
      const int64_t end = std::min((task + 1) * kRowsPerTask, count);
      for (int64_t r = task * kRowsPerTask; r < end; ++r) {
        const int32_t sentence = rows[static_cast<size_t>(r)].sentence;
        const int64_t source_length = sources_->length(sentence);
        const int64_t key_offset = i * sources_->layer_stride();
        float* weights = nullptr;
        if (i == attention_layer_) {
          weights = kept_attention + r * longest_source_;
          std::fill_n(weights, source_length, 0.0f);
        }
        cached_attention_kernels().attend(
            {projected + r * query_width,
             source_keys_.data() + source_keys_begin_[static_cast<size_t>(sentence)], key_offset,
             key_offset + kv_width, source_length, config.heads, config.kv_heads, head_dim, scale,
             scratch(round_up(source_length, 16), kAttentionSlot), attended + r * query_width,
             weights});
      }
    });
    layer.cross_out.apply(attended, count, x, onto_residual, parallel);
    if (!config.norm_first) layer.cross_norm.apply(x, count, x, parallel);

    if (config.norm_first) layer.feed_forward_norm.apply(x, count, normed, parallel);
    model_->add_feed_forward(layer.feed_forward, normed, count, x, inner_, parallel);
    if (!config.norm_first) layer.feed_forward_norm.apply(x, count, x, parallel);
  }
  if (config.final_norm) model_->decoder().norm.apply(x, count, x, parallel);
  ++position_;
  return x;
}

int64_t Decoder::bytes() const {
  int64_t bytes = paths_.bytes() + earlier_paths_.bytes() + x_.bytes() + normed_.bytes() +
                  projected_.bytes() + attended_.bytes() + inner_.bytes() + attention_.bytes();
  for (const Buffer<float>& block : blocks_) bytes += block.bytes();
  return bytes;
}

}  // namespace transformer_ext::engine
