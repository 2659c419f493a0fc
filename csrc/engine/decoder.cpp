#include "engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "engine/cached_attention.h"

namespace transformer_ext::engine {

namespace {

// Rows of one attention task: about 20 microseconds of work.
constexpr int64_t kRowsPerTask = 4;

// The vocabulary is cut into at most kParts parts, a task each, of chunks whose scores for a block
// of rows stay in the second-level cache. The cut depends on the vocabulary alone: the sum over a
// row is the same in any batch.
constexpr int64_t kParts = 16;
constexpr int64_t kChunkColumns = 512;
constexpr int64_t kChunkRows = 128;

// Slots of thread_scratch that no kernel called within these tasks uses.
constexpr int kAttentionSlot = 14;
constexpr int kScoresSlot = 15;

float* scratch(int64_t floats, int slot) {
  return static_cast<float*>(thread_scratch(static_cast<size_t>(floats) * sizeof(float), slot));
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

void Decoder::start(const Model& model, const EncodedSources& sources) {
  model_ = &model;
  sources_ = &sources;
  position_ = 0;
  const ModelConfig& config = model.config();
  block_stride_ = config.decoder_layers * 2 * config.kv_width();
  source_keys_.clear();
  source_keys_begin_.clear();
  for (int64_t sentence = 0; sentence < sources.sentences(); ++sentence) {
    source_keys_begin_.push_back(static_cast<int64_t>(source_keys_.size()));
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
        cached_attention_kernels().attend(
            {projected + r * query_width,
             source_keys_.data() + source_keys_begin_[static_cast<size_t>(sentence)], key_offset,
             key_offset + kv_width, source_length, config.heads, config.kv_heads, head_dim, scale,
             scratch(round_up(source_length, 16), kAttentionSlot), attended + r * query_width});
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

void NextTokens::scan(const Model& model, const float* states, int64_t rows, const int32_t* tokens,
                      Parallel& parallel) {
  const Linear& generator = model.generator();
  const PackedView weight = generator.weight;
  const int64_t width = weight.k;
  const int64_t chunk = round_up(kChunkColumns, gemm_panel_columns());
  const int64_t part_columns = round_up((weight.n + kParts - 1) / kParts, chunk);
  rows_ = rows;
  parts_ = (weight.n + part_columns - 1) / part_columns;
  TopScores* const tops = tops_.reserve(parts_ * rows);
  float* const top_scores = top_scores_.reserve(parts_ * rows * count_);
  int32_t* const top_ids = top_ids_.reserve(parts_ * rows * count_);
  float* const wanted = wanted_.reserve(rows);
  parallel.for_each(parts_, [&](int64_t part) {
    float* const scores = scratch(std::min(rows, kChunkRows) * chunk, kScoresSlot);
    const int64_t end = std::min((part + 1) * part_columns, weight.n);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = part * rows + r;
      tops[at] = {-std::numeric_limits<float>::infinity(),
                  0.0f,
                  0,
                  static_cast<int32_t>(count_),
                  top_scores + at * count_,
                  top_ids + at * count_};
    }
    Serial serial;
    for (int64_t column = part * part_columns; column < end; column += chunk) {
      const int64_t columns = std::min(chunk, end - column);
      const PackedView view{weight.data + column * width, columns, width};
      const float* const bias = generator.bias.empty() ? nullptr : generator.bias.data() + column;
      for (int64_t first = 0; first < rows; first += kChunkRows) {
        const int64_t block = std::min(kChunkRows, rows - first);
        gemm(states + first * width, block, width, view, bias, scores, chunk, {}, serial);
        for (int64_t r = 0; r < block; ++r) {
          const float* const row = scores + r * chunk;
          top_scores_kernels().scan(row, columns, static_cast<int32_t>(column),
                                    tops + part * rows + first + r);
          if (tokens == nullptr) continue;
          const int64_t token = tokens[first + r] - column;
          if (token >= 0 && token < columns) wanted[first + r] = row[token];
        }
      }
    }
  });
}

double NextTokens::log_sum(int64_t row) const {
  double maximum = -std::numeric_limits<double>::infinity();
  for (int64_t part = 0; part < parts_; ++part) {
    maximum = std::max(maximum, static_cast<double>(tops_.data()[part * rows_ + row].maximum));
  }
  double sum = 0.0;
  for (int64_t part = 0; part < parts_; ++part) {
    const TopScores& top = tops_.data()[part * rows_ + row];
    sum += static_cast<double>(top.sum) * std::exp(static_cast<double>(top.maximum) - maximum);
  }
  const double result = maximum + std::log(sum);
  if (!std::isfinite(result)) {
    throw std::domain_error("the model's scores are not finite numbers (NaN or infinity)");
  }
  return result;
}

void NextTokens::find(const Model& model, const float* states, int64_t rows, int64_t count,
                      Parallel& parallel) {
  count_ = std::min(count, model.config().target_vocabulary);
  scan(model, states, rows, nullptr, parallel);
  int32_t* const ids = ids_.reserve(rows * count_);
  double* const log_probs = log_probs_.reserve(rows * count_);
  constexpr int64_t kRows = 16;
  parallel.for_each((rows + kRows - 1) / kRows, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kRows, rows);
    for (int64_t r = task * kRows; r < end; ++r) {
      const double denominator = log_sum(r);
      // Parts and their entries come in ascending order of ids among equal scores: an entry goes
      // behind those that are not lower.
      int64_t found = 0;
      int32_t* const row_ids = ids + r * count_;
      double* const row_scores = log_probs + r * count_;
      for (int64_t part = 0; part < parts_; ++part) {
        const TopScores& top = tops_.data()[part * rows_ + r];
        for (int32_t i = 0; i < top.count; ++i) {
          const double score = static_cast<double>(top.scores[i]) - denominator;
          if (found == count_ && !(score > row_scores[found - 1])) break;
          int64_t at = found < count_ ? found++ : count_ - 1;
          for (; at > 0 && row_scores[at - 1] < score; --at) {
            row_scores[at] = row_scores[at - 1];
            row_ids[at] = row_ids[at - 1];
          }
          row_scores[at] = score;
          row_ids[at] = top.ids[i];
        }
      }
      // Scores of minus infinity are not candidates.
      for (; found < count_; ++found) {
        row_scores[found] = -std::numeric_limits<double>::infinity();
        row_ids[found] = 0;
      }
    }
  });
}

void NextTokens::score(const Model& model, const float* states, int64_t rows, const int32_t* tokens,
                       double* log_probs, Parallel& parallel) {
  count_ = 1;
  scan(model, states, rows, tokens, parallel);
  for (int64_t r = 0; r < rows; ++r) {
    log_probs[r] = static_cast<double>(wanted_.data()[r]) - log_sum(r);
  }
}

}  // namespace transformer_ext::engine
