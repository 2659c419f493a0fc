#include "engine/text_encoder.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "activation/activation.h"

namespace transformer_ext::engine {

namespace {

// Rows whose scores of the whole vocabulary are made at once, before each goes to its place: for as
// many the weights are read once, and 30,522 scores each take 8 MB.
constexpr int64_t kScoredRows = 64;

// Columns of a mean that one task adds up.
constexpr int64_t kColumnsPerTask = 256;

void check_count(const char* name, size_t got, size_t texts) {
  if (got == texts) return;
  throw std::invalid_argument(std::string(name) + ": got " + std::to_string(got) +
                              ", expected one for each of the " + std::to_string(texts) + " texts");
}

// out[texts, width] from states[tokens, width], in the order of the tokens.
void mean(const PackedTokens& tokens, const float* states, int64_t width, float* out,
          Parallel& parallel) {
  const int64_t parts = (width + kColumnsPerTask - 1) / kColumnsPerTask;
  parallel.for_each(tokens.sequences() * parts, [&](int64_t task) {
    const int64_t text = task / parts;
    const int64_t begin = task % parts * kColumnsPerTask;
    const int64_t end = std::min(width, begin + kColumnsPerTask);
    const int64_t length = tokens.length(text);
    const float* row = states + tokens.begin(text) * width;
    float* const sums = out + text * width;
    std::copy(row + begin, row + end, sums + begin);
    for (int64_t token = 1; token < length; ++token) {
      row += width;
      for (int64_t i = begin; i < end; ++i) sums[i] += row[i];
    }
    for (int64_t i = begin; i < end; ++i) sums[i] /= static_cast<float>(length);
  });
}

}  // namespace

void EncodedTexts::assign(const Model& model, const Texts& texts) {
  const ModelConfig& config = model.config();
  for (const std::vector<int32_t>& ids : texts.ids) {
    if (ids.empty()) throw std::invalid_argument("ids: got a text without a token");
  }
  tokens_.assign(texts.ids, config.source_vocabulary, "ids");
  token_types_.clear();
  if (texts.token_types.empty()) return;
  if (config.token_types == 0) {
    throw std::invalid_argument(
        "token_types: expected none, the model has no embedding of them (num_token_types is 0)");
  }
  check_count("token_types", texts.token_types.size(), texts.ids.size());
  for (size_t i = 0; i < texts.ids.size(); ++i) {
    const std::vector<int32_t>& types = texts.token_types[i];
    if (types.size() != texts.ids[i].size()) {
      throw std::invalid_argument("token_types: got " + std::to_string(types.size()) +
                                  ", expected one for each of the " +
                                  std::to_string(texts.ids[i].size()) + " tokens of a text");
    }
    for (const int32_t type : types) {
      if (type < 0 || type >= config.token_types) {
        throw std::invalid_argument("token_types: got " + std::to_string(type) +
                                    ", expected 0 to " + std::to_string(config.token_types - 1));
      }
    }
    token_types_.insert(token_types_.end(), types.begin(), types.end());
  }
}

float* EncodedTexts::run(const Model& model, bool all, PositionTables& positions,
                         Parallel& parallel, const BeforeLayer& before_layer) {
  StackRun::Options options;
  options.token_types = token_types_.empty() ? nullptr : token_types_.data();
  options.wanted = all ? nullptr : &wanted_;
  options.before_layer = before_layer;
  return stack_.run(model, model.encoder(), tokens_, positions, parallel, options);
}

void EncodedTexts::states(const Model& model, const Texts& texts, const std::vector<float*>& out,
                          PositionTables& positions, Parallel& parallel,
                          const BeforeLayer& before_layer) {
  assign(model, texts);
  const float* const states = run(model, true, positions, parallel, before_layer);
  const int64_t width = model.config().width;
  parallel.for_each(tokens_.sequences(), [&](int64_t text) {
    std::copy_n(states + tokens_.begin(text) * width, tokens_.length(text) * width,
                out[static_cast<size_t>(text)]);
  });
}

void EncodedTexts::pooled(const Model& model, const Texts& texts, float* out,
                          PositionTables& positions, Parallel& parallel,
                          const BeforeLayer& before_layer) {
  assign(model, texts);
  const ModelConfig& config = model.config();
  const int64_t width = config.width;
  const int64_t count = tokens_.sequences();
  const float* vectors = nullptr;
  if (config.pooling == Pooling::first) {
    wanted_.assign(tokens_.offsets(), tokens_.offsets() + count);
    vectors = run(model, false, positions, parallel, before_layer);
  } else {
    const float* const states = run(model, true, positions, parallel, before_layer);
    float* const means = config.pooler ? pooled_.reserve(count * width) : out;
    mean(tokens_, states, width, means, parallel);
    vectors = means;
  }
  if (config.pooler) {
    model.encoder_heads().pooler.apply(vectors, count, out, {}, parallel);
    vectors = out;
  }
  parallel.for_each(count, [&](int64_t text) {
    const float* const from = vectors + text * width;
    float* const to = out + text * width;
    if (config.pooler) {
      for (int64_t i = 0; i < width; ++i) to[i] = std::tanh(from[i]);
    } else if (from != to) {
      std::copy_n(from, width, to);
    }
    if (config.normalize) {
      double squares = 0.0;
      for (int64_t i = 0; i < width; ++i) squares += static_cast<double>(to[i]) * to[i];
      // The bound is that of torch.nn.functional.normalize.
      const float length = std::max(static_cast<float>(std::sqrt(squares)), 1e-12f);
      for (int64_t i = 0; i < width; ++i) to[i] /= length;
    }
  });
}

void EncodedTexts::label_scores(const Model& model, const Texts& texts, float* out,
                                PositionTables& positions, Parallel& parallel,
                                const BeforeLayer& before_layer) {
  const ModelConfig& config = model.config();
  if (config.labels == 0) {
    throw std::invalid_argument("label scores: the model has no labels, so no classifier");
  }
  const int64_t count = static_cast<int64_t>(texts.ids.size());
  float* const vectors = head_.reserve(count * config.width);
  pooled(model, texts, vectors, positions, parallel, before_layer);
  model.encoder_heads().labels.apply(vectors, count, out, {}, parallel);
}

void EncodedTexts::token_scores(const Model& model, const Texts& texts,
                                const std::vector<std::vector<int32_t>>& wanted,
                                const std::vector<float*>& out, PositionTables& positions,
                                Parallel& parallel, const BeforeLayer& before_layer) {
  const ModelConfig& config = model.config();
  if (!config.masked_lm_head) {
    throw std::invalid_argument("token scores: the model has no masked_lm_head");
  }
  assign(model, texts);
  check_count("positions", wanted.size(), texts.ids.size());
  // Each token once, ascending; an asked-for row finds its own by bisection.
  wanted_.clear();
  std::vector<std::pair<int32_t, float*>> places;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const int64_t text = static_cast<int64_t>(i);
    float* place = out[i];
    for (const int32_t position : wanted[i]) {
      if (position < 0 || position >= tokens_.length(text)) {
        throw std::invalid_argument("positions: got " + std::to_string(position) +
                                    ", expected 0 to " + std::to_string(tokens_.length(text) - 1) +
                                    " in a text of " + std::to_string(tokens_.length(text)) +
                                    " tokens");
      }
      places.emplace_back(static_cast<int32_t>(tokens_.begin(text)) + position, place);
      wanted_.push_back(places.back().first);
      place += config.source_vocabulary;
    }
  }
  if (places.empty()) return;
  std::sort(wanted_.begin(), wanted_.end());
  wanted_.erase(std::unique(wanted_.begin(), wanted_.end()), wanted_.end());
  std::sort(places.begin(), places.end());

  const float* const states = run(model, false, positions, parallel, before_layer);
  const EncoderHeads& heads = model.encoder_heads();
  const int64_t width = config.width;
  const int64_t vocabulary = config.source_vocabulary;
  const int64_t rows = static_cast<int64_t>(wanted_.size());
  float* const head = head_.reserve(rows * width);
  heads.masked_lm.apply(states, rows, head, {}, parallel);
  ActivationForward<float> activation{};
  activation.x = head;
  activation.out = pooled_.reserve(rows * width);
  activation.rows = rows;
  activation.columns = width;
  activation.kind = config.activation;
  activation_kernels().forward_f32(activation, parallel);
  heads.masked_lm_norm.apply(activation.out, rows, head, parallel);
  float* const scores = scores_.reserve(std::min(rows, kScoredRows) * vocabulary);
  auto place = places.begin();
  for (int64_t begin = 0; begin < rows; begin += kScoredRows) {
    if (before_layer) before_layer();
    const int64_t end = std::min(rows, begin + kScoredRows);
    model.generator().apply(head + begin * width, end - begin, scores, {}, parallel);
    const auto first = place;
    while (place != places.end() && place->first <= wanted_[static_cast<size_t>(end - 1)]) ++place;
    parallel.for_each(place - first, [&](int64_t i) {
      const auto& [token, to] = first[i];
      const int64_t row = std::lower_bound(wanted_.begin() + begin, wanted_.begin() + end, token) -
                          wanted_.begin() - begin;
      std::copy_n(scores + row * vocabulary, vocabulary, to);
    });
  }
}

}  // namespace transformer_ext::engine
