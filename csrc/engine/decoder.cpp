#include "engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/cached_attention.h"

namespace transformer_ext::engine {

namespace {

// Few sentences are cut into parts, of heads: tasks of at least so many elements of keys and
// values, about a microsecond of work, until there are kTasks. For one sentence without a beam the
// attention of a step on two threads takes 25 microseconds instead of 32.
constexpr int64_t kTaskElements = 4096;
constexpr int64_t kTasks = 8;

int64_t parts_of_heads(const ModelConfig& config, int64_t groups, int64_t rows, int64_t length) {
  const int64_t elements = rows * length * 2 * config.kv_width();
  const int64_t tasks = std::min(kTasks, elements / kTaskElements);
  return std::clamp<int64_t>(tasks / groups, 1, config.kv_heads);
}

}  // namespace

void Decoder::start(const Model& model, const EncodedSources& sources, int64_t attention_layer) {
  model_ = &model;
  sources_ = &sources;
  attention_layer_ = attention_layer;
  longest_source_ = 0;
  position_ = 0;
  const ModelConfig& config = model.config();
  block_stride_ = config.decoder_layers * 2 * config.kv_width() * config.cache_element_bytes();
  source_keys_.clear();
  source_keys_begin_.clear();
  for (int64_t sentence = 0; sentence < sources.sentences(); ++sentence) {
    source_keys_begin_.push_back(static_cast<int64_t>(source_keys_.size()));
    longest_source_ = std::max(longest_source_, sources.length(sentence));
    for (int64_t i = 0; i < sources.length(sentence); ++i) {
      source_keys_.push_back(sources.keys(sentence, i));
    }
  }
}

void Decoder::advance_paths(const std::vector<Row>& rows) {
  const int64_t length = position_ + 1;
  const int64_t count = static_cast<int64_t>(rows.size());
  if (static_cast<int64_t>(blocks_.size()) < length) blocks_.emplace_back();
  const char* const block = blocks_[static_cast<size_t>(position_)].reserve(count * block_stride_);
  std::swap(paths_, earlier_paths_);
  const void** const paths = paths_.reserve(count * length);
  for (int64_t r = 0; r < count; ++r) {
    const void** const path = paths + r * length;
    if (position_ > 0) {
      std::copy_n(earlier_paths_.data() + rows[static_cast<size_t>(r)].parent * position_,
                  position_, path);
    }
    path[position_] = block + r * block_stride_;
  }
}

void Decoder::find_groups(const std::vector<Row>& rows) {
  const int64_t length = position_ + 1;
  const int64_t count = static_cast<int64_t>(rows.size());
  groups_.clear();
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    const int32_t sentence = rows[static_cast<size_t>(begin)].sentence;
    const void* const* const first = paths_.data() + begin * length;
    int64_t shared = length;
    for (end = begin + 1; end < count && rows[static_cast<size_t>(end)].sentence == sentence;
         ++end) {
      const void* const* const path = paths_.data() + end * length;
      shared = std::mismatch(first, first + shared, path).first - first;
    }
    groups_.push_back({begin, end, shared});
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
  find_groups(rows);
  char* const block = blocks_[static_cast<size_t>(position_)].data();
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

  const int64_t groups = static_cast<int64_t>(groups_.size());
  CachedAttention attention{};
  attention.query = projected;
  attention.out = attended;
  attention.out_stride = query_width;
  attention.bfloat16 = config.bfloat16_cache();
  attention.heads = config.heads;
  attention.kv_heads = config.kv_heads;
  attention.head_dim = head_dim;
  attention.scale = scale;
  const Epilogue onto_residual{GemmActivation::none, true};
  for (int64_t i = 0; i < config.decoder_layers; ++i) {
    const Layer& layer = model_->decoder().layers[static_cast<size_t>(i)];
    if (config.norm_first) layer.self_norm.apply(x, count, normed, parallel);
    layer.self_in.apply(normed, count, projected, {}, parallel);
    const int64_t parts = parts_of_heads(config, groups, count, length);
    parallel.for_each(groups * parts, [&](int64_t task) {
      const Group& group = groups_[static_cast<size_t>(task / parts)];
      const int64_t part = task % parts;
      const int64_t kv_begin = part * config.kv_heads / parts;
      const int64_t kv_end = (part + 1) * config.kv_heads / parts;
      const int64_t key_offset = i * 2 * kv_width;
      for (int64_t r = group.begin; r < group.end; ++r) {
        float* const row = projected + r * projected_width;
        float* const key = row + query_width + kv_begin * head_dim;
        const int64_t size = (kv_end - kv_begin) * head_dim;
        if (angles != nullptr) {
          const int64_t queries = config.heads / config.kv_heads;
          rotate(row + kv_begin * queries * head_dim, (kv_end - kv_begin) * queries, head_dim,
                 angles);
          rotate(key, kv_end - kv_begin, head_dim, angles);
        }
        char* const cell = block + r * block_stride_ +
                           (key_offset + kv_begin * head_dim) * config.cache_element_bytes();
        cached_attention_kernels().store(key, size, attention.bfloat16, cell);
        cached_attention_kernels().store(key + kv_width, size, attention.bfloat16,
                                         cell + kv_width * config.cache_element_bytes());
      }
      CachedAttention a = attention;
      a.query += group.begin * projected_width;
      a.query_stride = projected_width;
      a.out += group.begin * query_width;
      a.rows = group.end - group.begin;
      a.paths = paths_.data() + group.begin * length;
      a.path_stride = length;
      a.shared = group.shared;
      a.length = length;
      a.key_offset = key_offset;
      a.value_offset = key_offset + kv_width;
      a.kv_begin = kv_begin;
      a.kv_end = kv_end;
      cached_attention_kernels().attend(a);
    });
    layer.self_out.apply(attended, count, x, onto_residual, parallel);
    if (!config.norm_first) layer.self_norm.apply(x, count, x, parallel);

    if (config.norm_first) layer.cross->norm.apply(x, count, normed, parallel);
    layer.cross->query.apply(normed, count, projected, {}, parallel);
    // The attention that is kept is a sum over all heads.
    const int64_t cross_parts =
        i == attention_layer_ ? 1 : parts_of_heads(config, groups, groups, longest_source_);
    parallel.for_each(groups * cross_parts, [&](int64_t task) {
      const Group& group = groups_[static_cast<size_t>(task / cross_parts)];
      const int64_t part = task % cross_parts;
      const int32_t sentence = rows[static_cast<size_t>(group.begin)].sentence;
      CachedAttention a = attention;
      a.query += group.begin * query_width;
      a.query_stride = query_width;
      a.out += group.begin * query_width;
      a.rows = group.end - group.begin;
      a.paths = source_keys_.data() + source_keys_begin_[static_cast<size_t>(sentence)];
      a.length = sources_->length(sentence);
      a.shared = a.length;
      a.key_offset = i * sources_->layer_stride();
      a.value_offset = a.key_offset + kv_width;
      a.kv_begin = part * config.kv_heads / cross_parts;
      a.kv_end = (part + 1) * config.kv_heads / cross_parts;
      if (i == attention_layer_) {
        a.weights = kept_attention + group.begin * longest_source_;
        a.weights_stride = longest_source_;
        std::fill_n(a.weights, a.rows * longest_source_, 0.0f);
      }
      cached_attention_kernels().attend(a);
    });
    layer.cross->out.apply(attended, count, x, onto_residual, parallel);
    if (!config.norm_first) layer.cross->norm.apply(x, count, x, parallel);

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
  for (const Buffer<char>& block : blocks_) bytes += block.bytes();
  return bytes;
}

}  // namespace transformer_ext::engine
