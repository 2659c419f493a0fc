#include "engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/cached_attention.h"

namespace transformer_ext::engine {

namespace {

// Few groups are cut into parts, of heads: tasks of at least so many elements of keys and values,
// about a microsecond of work, until there are kTasks. For one sentence without a beam the
// attention of a step on two threads takes 25 microseconds instead of 32.
constexpr int64_t kTaskElements = 4096;
constexpr int64_t kTasks = 8;

// Rows of given tokens that attend together. They compute their scores with the keys of all before
// the last of them, and keep those before themselves.
constexpr int64_t kGivenRows = 8;

// Rows whose keys and values one task stores.
constexpr int64_t kStoredRows = 16;

int64_t parts_of_heads(const ModelConfig& config, int64_t groups, int64_t rows, int64_t length) {
  const int64_t elements = rows * length * 2 * config.kv_width();
  const int64_t tasks = std::min(kTasks, elements / kTaskElements);
  return std::clamp<int64_t>(tasks / groups, 1, config.kv_heads);
}

}  // namespace

void Decoder::start(const Model& model, const EncodedSources* sources, int64_t sentences,
                    int64_t attention_layer) {
  model_ = &model;
  sources_ = sources;
  attention_layer_ = attention_layer;
  longest_source_ = 0;
  blocks_used_ = 0;
  const ModelConfig& config = model.config();
  block_stride_ = config.decoder_layers * 2 * config.kv_width() * config.cache_element_bytes();
  path_begins_.assign(static_cast<size_t>(sentences) + 1, 0);
  source_keys_.clear();
  source_keys_begin_.clear();
  if (sources == nullptr) return;
  for (int64_t sentence = 0; sentence < sentences; ++sentence) {
    source_keys_begin_.push_back(static_cast<int64_t>(source_keys_.size()));
    longest_source_ = std::max(longest_source_, sources->length(sentence));
    for (int64_t i = 0; i < sources->length(sentence); ++i) {
      source_keys_.push_back(sources->keys(sentence, i));
    }
  }
}

char* Decoder::next_block(int64_t rows) {
  if (blocks_.size() == blocks_used_) blocks_.emplace_back();
  return blocks_[blocks_used_++].reserve(rows * block_stride_);
}

void Decoder::swap_paths(int64_t rows, int64_t pointers) {
  std::swap(paths_, earlier_paths_);
  std::swap(path_begins_, earlier_begins_);
  paths_.reserve(pointers);
  path_begins_.assign(1, 0);
  path_begins_.reserve(static_cast<size_t>(rows) + 1);
}

void Decoder::add_path(int64_t parent, const char* block, int64_t added) {
  const size_t p = static_cast<size_t>(parent);
  const int64_t length = earlier_begins_[p + 1] - earlier_begins_[p];
  const void** const path = paths_.data() + path_begins_.back();
  std::copy_n(earlier_paths_.data() + earlier_begins_[p], length, path);
  for (int64_t i = 0; i < added; ++i) path[length + i] = block + i * block_stride_;
  path_begins_.push_back(path_begins_.back() + length + added);
}

const float* Decoder::step(const std::vector<Row>& rows, PositionTables& positions,
                           Parallel& parallel) {
  const int64_t count = static_cast<int64_t>(rows.size());
  char* const block = next_block(count);
  int64_t pointers = count;
  for (const Row& row : rows) {
    const size_t parent = static_cast<size_t>(row.parent);
    pointers += path_begins_[parent + 1] - path_begins_[parent];
  }
  swap_paths(count, pointers);
  ids_.clear();
  row_positions_.clear();
  groups_.clear();
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = rows[static_cast<size_t>(r)];
    const int64_t begin = path_begins_.back();
    add_path(row.parent, block + r * block_stride_, 1);
    const int64_t length = path_begins_.back() - begin;
    const void* const* const path = paths_.data() + begin;
    ids_.push_back(row.token);
    row_positions_.push_back(static_cast<int32_t>(length - 1));
    if (groups_.empty() || groups_.back().sentence != row.sentence) {
      groups_.push_back({row.sentence, false, r, r, length, length, path, length});
    }
    Group& group = groups_.back();
    group.shared = std::mismatch(group.positions, group.positions + group.shared, path).first -
                   group.positions;
    group.end = r + 1;
  }
  return run(block, positions, parallel);
}

const float* Decoder::extend(const std::vector<Span>& spans, PositionTables& positions,
                             Parallel& parallel) {
  int64_t count = 0;
  for (const Span& span : spans) count += span.count;
  char* const block = next_block(count);
  const int64_t sentences = static_cast<int64_t>(path_begins_.size()) - 1;
  std::vector<const Span*> by_sentence(static_cast<size_t>(sentences), nullptr);
  std::vector<int64_t> first_rows(static_cast<size_t>(sentences), 0);
  int64_t row = 0;
  for (const Span& span : spans) {
    by_sentence[static_cast<size_t>(span.sentence)] = &span;
    first_rows[static_cast<size_t>(span.sentence)] = row;
    row += span.count;
  }
  swap_paths(sentences, path_begins_.back() + count);
  for (int64_t sentence = 0; sentence < sentences; ++sentence) {
    const size_t s = static_cast<size_t>(sentence);
    add_path(sentence, block + first_rows[s] * block_stride_,
             by_sentence[s] == nullptr ? 0 : by_sentence[s]->count);
  }
  ids_.clear();
  row_positions_.clear();
  groups_.clear();
  for (const Span& span : spans) {
    const size_t s = static_cast<size_t>(span.sentence);
    const int64_t earlier = path_begins_[s + 1] - path_begins_[s] - span.count;
    ids_.insert(ids_.end(), span.tokens, span.tokens + span.count);
    for (int64_t i = 0; i < span.count; ++i) {
      row_positions_.push_back(static_cast<int32_t>(earlier + i));
    }
    for (int64_t begin = 0; begin < span.count; begin += kGivenRows) {
      const int64_t end = std::min(begin + kGivenRows, span.count);
      groups_.push_back({span.sentence, true, first_rows[s] + begin, first_rows[s] + end,
                         earlier + end, earlier + end, paths_.data() + path_begins_[s], 0});
    }
  }
  return run(block, positions, parallel);
}

const float* Decoder::run(char* block, PositionTables& positions, Parallel& parallel) {
  const ModelConfig& config = model_->config();
  const int64_t count = static_cast<int64_t>(ids_.size());
  const int64_t width = config.width;
  float* const x = x_.reserve(count * width);
  float* const normed = config.norm_first ? normed_.reserve(count * width) : x;
  float* const projected =
      projected_.reserve(count * (config.query_width() + 2 * config.kv_width()));
  float* const attended = attended_.reserve(count * config.query_width());
  if (attention_layer_ >= 0) attention_.reserve(count * longest_source_);
  const int64_t length = 1 + *std::max_element(row_positions_.begin(), row_positions_.end());
  model_->embed(model_->decoder(), ids_.data(), row_positions_.data(),
                positions.added(config, model_->decoder(), length), count, x, parallel);
  const float* const rotary = positions.rotary(config, length);

  const Epilogue onto_residual{GemmActivation::none, true};
  for (int64_t i = 0; i < config.decoder_layers; ++i) {
    const Layer& layer = model_->decoder().layers[static_cast<size_t>(i)];
    if (config.norm_first) layer.self_norm.apply(x, count, normed, parallel);
    layer.self_in.apply(normed, count, projected, {}, parallel);
    attend_to_positions(i, block, rotary, parallel);
    layer.self_out.apply(attended, count, x, onto_residual, parallel);
    if (!config.norm_first) layer.self_norm.apply(x, count, x, parallel);

    if (layer.cross) {
      if (config.norm_first) layer.cross->norm.apply(x, count, normed, parallel);
      layer.cross->query.apply(normed, count, projected, {}, parallel);
      attend_to_sources(i, parallel);
      layer.cross->out.apply(attended, count, x, onto_residual, parallel);
      if (!config.norm_first) layer.cross->norm.apply(x, count, x, parallel);
    }

    if (config.norm_first) layer.feed_forward_norm.apply(x, count, normed, parallel);
    model_->add_feed_forward(layer.feed_forward, normed, count, x, inner_, parallel);
    if (!config.norm_first) layer.feed_forward_norm.apply(x, count, x, parallel);
  }
  if (config.final_norm) model_->decoder().norm.apply(x, count, x, parallel);
  return x;
}

void Decoder::attend_to_positions(int64_t layer, char* block, const float* rotary,
                                  Parallel& parallel) {
  const ModelConfig& config = model_->config();
  const int64_t head_dim = config.head_dim;
  const int64_t query_width = config.query_width();
  const int64_t kv_width = config.kv_width();
  const int64_t projected_width = query_width + 2 * kv_width;
  const int64_t queries = config.heads / config.kv_heads;
  const int64_t key_offset = layer * 2 * kv_width;
  const int64_t element_bytes = config.cache_element_bytes();
  const int64_t count = static_cast<int64_t>(ids_.size());
  float* const projected = projected_.data();

  // Turns the queries and keys of some heads of a row, and puts its keys and values into the cache.
  const auto store = [&](int64_t r, int64_t kv_begin, int64_t kv_end) {
    float* const row = projected + r * projected_width;
    float* const key = row + query_width + kv_begin * head_dim;
    const int64_t size = (kv_end - kv_begin) * head_dim;
    if (rotary != nullptr) {
      const float* const angles = rotary + row_positions_[static_cast<size_t>(r)] * head_dim;
      rotate(row + kv_begin * queries * head_dim, (kv_end - kv_begin) * queries, head_dim, angles);
      rotate(key, kv_end - kv_begin, head_dim, angles);
    }
    char* const cell =
        block + r * block_stride_ + (key_offset + kv_begin * head_dim) * element_bytes;
    cached_attention_kernels().store(key, size, config.bfloat16_cache(), cell);
    cached_attention_kernels().store(key + kv_width, size, config.bfloat16_cache(),
                                     cell + kv_width * element_bytes);
  };
  // Given tokens attend to those of other groups; rows of a step, to what is in the cache already,
  // and to themselves.
  const bool given = groups_[0].causal;
  if (given) {
    parallel.for_each((count + kStoredRows - 1) / kStoredRows, [&](int64_t task) {
      const int64_t end = std::min((task + 1) * kStoredRows, count);
      for (int64_t r = task * kStoredRows; r < end; ++r) store(r, 0, config.kv_heads);
    });
  }
  const int64_t groups = static_cast<int64_t>(groups_.size());
  int64_t longest = 0;
  for (const Group& group : groups_) longest = std::max(longest, group.length);
  const int64_t parts = parts_of_heads(config, groups, count, longest);
  parallel.for_each(groups * parts, [&](int64_t task) {
    const Group& group = groups_[static_cast<size_t>(task / parts)];
    const int64_t part = task % parts;
    CachedAttention a{};
    a.kv_begin = part * config.kv_heads / parts;
    a.kv_end = (part + 1) * config.kv_heads / parts;
    if (!given) {
      for (int64_t r = group.begin; r < group.end; ++r) store(r, a.kv_begin, a.kv_end);
    }
    a.query = projected + group.begin * projected_width;
    a.query_stride = projected_width;
    a.out = attended_.data() + group.begin * query_width;
    a.out_stride = query_width;
    a.rows = group.end - group.begin;
    a.paths = group.positions;
    a.path_stride = group.stride;
    a.shared = group.shared;
    a.length = group.length;
    a.causal = group.causal;
    a.key_offset = key_offset;
    a.value_offset = key_offset + kv_width;
    a.bfloat16 = config.bfloat16_cache();
    a.heads = config.heads;
    a.kv_heads = config.kv_heads;
    a.head_dim = head_dim;
    a.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    cached_attention_kernels().attend(a);
  });
}

void Decoder::attend_to_sources(int64_t layer, Parallel& parallel) {
  const ModelConfig& config = model_->config();
  const int64_t query_width = config.query_width();
  const int64_t groups = static_cast<int64_t>(groups_.size());
  const bool kept = layer == attention_layer_;
  // The attention that is kept is a sum over all heads.
  const int64_t parts = kept ? 1 : parts_of_heads(config, groups, groups, longest_source_);
  parallel.for_each(groups * parts, [&](int64_t task) {
    const Group& group = groups_[static_cast<size_t>(task / parts)];
    const int64_t part = task % parts;
    CachedAttention a{};
    a.query = projected_.data() + group.begin * query_width;
    a.query_stride = query_width;
    a.out = attended_.data() + group.begin * query_width;
    a.out_stride = query_width;
    a.rows = group.end - group.begin;
    a.paths = source_keys_.data() + source_keys_begin_[static_cast<size_t>(group.sentence)];
    a.length = sources_->length(group.sentence);
    a.shared = a.length;
    a.key_offset = layer * sources_->layer_stride();
    a.value_offset = a.key_offset + config.kv_width();
    a.bfloat16 = config.bfloat16_cache();
    a.heads = config.heads;
    a.kv_heads = config.kv_heads;
    a.head_dim = config.head_dim;
    a.kv_begin = part * config.kv_heads / parts;
    a.kv_end = (part + 1) * config.kv_heads / parts;
    a.scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim));
    if (kept) {
      a.weights = attention_.data() + group.begin * longest_source_;
      a.weights_stride = longest_source_;
      std::fill_n(a.weights, a.rows * longest_source_, 0.0f);
    }
    cached_attention_kernels().attend(a);
  });
}

int64_t Decoder::bytes() const {
  int64_t bytes = paths_.bytes() + earlier_paths_.bytes() + x_.bytes() + normed_.bytes() +
                  projected_.bytes() + attended_.bytes() + inner_.bytes() + attention_.bytes();
  for (const Buffer<char>& block : blocks_) bytes += block.bytes();
  return bytes;
}

}  // namespace transformer_ext::engine
