#include "engine/model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "embedding/embedding.h"
#include "residual_norm/residual_norm.h"

namespace transformer_ext::engine {

namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// Takes weights by name and says what is wrong with them.
class Reader {
 public:
  Reader(const ModelConfig& config, Weights weights, Parallel& parallel)
      : config_(config), weights_(weights), parallel_(parallel) {}

  std::vector<float> copy(const std::string& name, const std::vector<int64_t>& shape) {
    const float* const data = find(name, shape);
    int64_t size = 1;
    for (const int64_t n : shape) size *= n;
    return {data, data + size};
  }

  // A table of embeddings: to each place given, and packed, where those are not null.
  void table(const std::string& name, int64_t rows, Buffer<float>* copy, PackedMatrix* packed) {
    const int64_t width = config_.width;
    const float* const data = find(name, {rows, width});
    if (copy != nullptr) {
      float* const to = copy->reserve(rows * width);
      constexpr int64_t kTogether = 256;
      parallel_.for_each((rows + kTogether - 1) / kTogether, [&](int64_t block) {
        const int64_t begin = block * kTogether;
        const int64_t end = std::min(rows, begin + kTogether);
        std::copy(data + begin * width, data + end * width, to + begin * width);
      });
    }
    if (packed != nullptr) {
      packed->pack(data, rows, width, width, parallel_, config_.compute);
    }
  }

  Linear linear(const std::string& name, int64_t rows, int64_t columns) {
    return linear(name, rows, columns, config_.bias);
  }

  Linear linear(const std::string& name, int64_t rows, int64_t columns, bool bias) {
    Linear linear;
    linear.weight.pack(find(name + ".weight", {rows, columns}), rows, columns, columns, parallel_,
                       config_.compute);
    if (bias) linear.bias = copy(name + ".bias", {rows});
    return linear;
  }

  Norm norm(const std::string& name) {
    Norm norm;
    norm.weight = copy(name + ".weight", {config_.width});
    if (!config_.rms) norm.bias = copy(name + ".bias", {config_.width});
    norm.rms = config_.rms;
    norm.eps = config_.eps;
    return norm;
  }

  Stack stack(const std::string& name, int64_t depth, const float* embedding,
              int64_t token_types = 0) {
    Stack stack;
    stack.embedding = embedding;
    if (token_types > 0) {
      stack.token_types = copy(name + ".token_types.weight", {token_types, config_.width});
    }
    if (config_.positions == Positions::learned) {
      stack.positions = copy(name + ".positions.weight", {config_.max_positions, config_.width});
    }
    if (config_.embedding_norm) stack.embedding_norm = norm(name + ".embedding_norm");
    if (config_.final_norm) stack.norm = norm(name + ".norm");
    const bool cross = config_.kind == Kind::encoder_decoder && name == "decoder";
    for (int64_t i = 0; i < depth; ++i) {
      stack.layers.push_back(layer(name + ".layers." + std::to_string(i), cross));
    }
    return stack;
  }

  // The projection, activation and norm before the product with the embeddings.
  void masked_lm_head(EncoderHeads* heads) {
    heads->masked_lm =
        linear("masked_lm_head.projection", config_.width, config_.width, /*bias=*/true);
    heads->masked_lm_norm = norm("masked_lm_head.norm");
  }

 private:
  Layer layer(const std::string& name, bool cross) {
    const int64_t width = config_.width;
    const int64_t inner = config_.inner;
    Layer layer;
    layer.self_in = linear(name + ".self_attention.in_projection",
                           config_.query_width() + 2 * config_.kv_width(), width);
    layer.self_out = linear(name + ".self_attention.out_projection", width, config_.query_width());
    layer.self_norm = norm(name + ".self_attention_norm");
    layer.feed_forward.in = linear(name + ".feed_forward.in_projection",
                                   is_gated(config_.activation) ? 2 * inner : inner, width);
    layer.feed_forward.out = linear(name + ".feed_forward.out_projection", width, inner);
    layer.feed_forward_norm = norm(name + ".feed_forward_norm");
    if (cross) {
      CrossAttention& attention = layer.cross.emplace();
      const std::string prefix = name + ".cross_attention";
      attention.query = linear(prefix + ".query_projection", config_.query_width(), width);
      attention.key_value = linear(prefix + ".key_value_projection", 2 * config_.kv_width(), width);
      attention.out = linear(prefix + ".out_projection", width, config_.query_width());
      attention.norm = norm(name + ".cross_attention_norm");
    }
    return layer;
  }

  const float* find(const std::string& name, const std::vector<int64_t>& shape) {
    const Array found = weights_(name);
    if (found.data == nullptr) throw std::invalid_argument("weight " + name + " is missing");
    if (found.shape != shape) {
      throw std::invalid_argument("weight " + name + ": got shape " + shape_text(found.shape) +
                                  ", expected " + shape_text(shape));
    }
    return found.data;
  }

  const ModelConfig& config_;
  Weights weights_;
  Parallel& parallel_;
};

// Rows of embeddings that one task unpacks: some microseconds.
constexpr int64_t kRowsPerTask = 16;

int64_t grown(int64_t rows, int64_t length) {
  rows = rows == 0 ? 128 : rows;
  while (rows < length) rows *= 2;
  return rows;
}

}  // namespace

const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::decoder_only:
      return "decoder-only";
    case Kind::encoder_only:
      return "encoder-only";
    case Kind::encoder_decoder:
      break;
  }
  return "encoder-decoder";
}

void Linear::apply(const float* x, int64_t rows, float* y, Epilogue epilogue,
                   Parallel& parallel) const {
  gemm(x, rows, weight.k(), weight, bias_data(), y, weight.n(), epilogue, parallel);
}

void Norm::apply(const float* x, int64_t rows, float* out, Parallel& parallel) const {
  ResidualNormForward<float> arguments{};
  arguments.x = x;
  arguments.weight = weight.data();
  arguments.bias = bias.empty() ? nullptr : bias.data();
  arguments.normed = out;
  arguments.rows = rows;
  arguments.columns = static_cast<int64_t>(weight.size());
  arguments.rms = rms;
  arguments.eps = eps;
  residual_norm_kernels().forward_f32(arguments, parallel);
}

Model::Model(const ModelConfig& config, Weights weights, Parallel& parallel) : config_(config) {
  Reader reader(config_, weights, parallel);
  PackedMatrix* const generator = &generator_.weight;
  // The largest first: while they are copied from, the engine itself is still small.
  if (config_.kind == Kind::encoder_only) {
    const bool tied = config_.masked_lm_head;
    reader.table("embedding.weight", config_.source_vocabulary, tied ? nullptr : &source_table_,
                 tied ? generator : nullptr);
    if (tied) {
      generator_.bias = reader.copy("masked_lm_head.bias", {config_.source_vocabulary});
      reader.masked_lm_head(&encoder_heads_);
    }
    if (config_.pooler) {
      encoder_heads_.pooler = reader.linear("pooler", config_.width, config_.width, /*bias=*/true);
    }
    if (config_.labels > 0) {
      encoder_heads_.labels =
          reader.linear("generator", config_.labels, config_.width, config_.output_bias);
    }
    encoder_ =
        reader.stack("encoder", config_.encoder_layers, source_table_.data(), config_.token_types);
    return;
  }
  const Tying tie = config_.tie;
  const bool encodes = config_.kind == Kind::encoder_decoder;
  if (encodes) {
    reader.table("source_embedding.weight", config_.source_vocabulary,
                 tie == Tying::all ? nullptr : &source_table_,
                 tie == Tying::all ? generator : nullptr);
  }
  if (tie != Tying::all) {
    reader.table(encodes ? "target_embedding.weight" : "embedding.weight",
                 config_.target_vocabulary, tie == Tying::target ? nullptr : &target_table_,
                 tie == Tying::target ? generator : nullptr);
  }
  if (tie == Tying::none) {
    reader.table("generator.weight", config_.target_vocabulary, nullptr, generator);
  }
  if (config_.output_bias) {
    generator_.bias = reader.copy("generator.bias", {config_.target_vocabulary});
  }
  if (encodes) {
    encoder_ = reader.stack("encoder", config_.encoder_layers, source_table_.data());
  }
  decoder_ = reader.stack("decoder", config_.decoder_layers, target_table_.data());
}

void Model::embed(const Stack& stack, const int32_t* ids, const int32_t* positions,
                  const float* table, int64_t rows, float* x, Parallel& parallel,
                  const int32_t* token_types) const {
  EmbeddingForward<float> arguments{};
  arguments.ids = {nullptr, ids};
  arguments.weight = stack.embedding;
  if (stack.embedding == nullptr) {
    // Each id's row where its result will lie.
    int32_t* const places = static_cast<int32_t*>(thread_scratch(
        static_cast<size_t>(rows + 1) * sizeof(int32_t), scratch_slot::embedding_places));
    parallel.for_each((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
      const int64_t end = std::min((task + 1) * kRowsPerTask, rows);
      for (int64_t row = task * kRowsPerTask; row < end; ++row) {
        gemm_unpack(generator_.weight, ids[row], x + row * config_.width);
        places[row] = static_cast<int32_t>(row);
      }
    });
    arguments.ids = {nullptr, places};
    arguments.weight = x;
  }
  arguments.scale = config_.scale_embedding
                        ? static_cast<float>(std::sqrt(static_cast<double>(config_.width)))
                        : 1.0f;
  arguments.positions = {nullptr, positions};
  arguments.position_table = table;
  arguments.out = x;
  arguments.tokens = rows;
  arguments.columns = config_.width;
  embedding_kernels().forward_f32(arguments, parallel);
  if (!stack.token_types.empty()) {
    parallel.for_each((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
      const int64_t end = std::min((task + 1) * kRowsPerTask, rows);
      for (int64_t row = task * kRowsPerTask; row < end; ++row) {
        const int64_t type = token_types == nullptr ? 0 : token_types[row];
        const float* const added = stack.token_types.data() + type * config_.width;
        float* const to = x + row * config_.width;
        for (int64_t i = 0; i < config_.width; ++i) to[i] += added[i];
      }
    });
  }
  if (!stack.embedding_norm.weight.empty()) stack.embedding_norm.apply(x, rows, x, parallel);
}

void Model::add_feed_forward(const FeedForward& network, const float* input, int64_t rows, float* x,
                             Buffer<float>& scratch, Parallel& parallel) const {
  const int64_t wide = network.in.weight.n();
  const int64_t inner = config_.inner;
  const bool relu = config_.activation == Activation::relu;
  float* const hidden = scratch.reserve(rows * (relu ? wide : wide + inner));
  const float* activated = hidden;
  if (relu) {
    network.in.apply(input, rows, hidden, {GemmActivation::relu, false}, parallel);
  } else {
    network.in.apply(input, rows, hidden, {}, parallel);
    ActivationForward<float> arguments{};
    arguments.x = hidden;
    arguments.out = hidden + rows * wide;
    arguments.rows = rows;
    arguments.columns = inner;
    arguments.kind = config_.activation;
    activation_kernels().forward_f32(arguments, parallel);
    activated = arguments.out;
  }
  network.out.apply(activated, rows, x, {GemmActivation::none, true}, parallel);
}

const float* PositionTables::added(const ModelConfig& config, const Stack& stack, int64_t length) {
  if (config.positions == Positions::learned) {
    if (length > config.max_positions) {
      throw std::invalid_argument("a sequence of " + std::to_string(length) +
                                  " tokens is longer than the " +
                                  std::to_string(config.max_positions) +
                                  " learned positions of this model (max_positions)");
    }
    return stack.positions.data();
  }
  const bool halves = config.positions == Positions::sinusoidal_halves;
  if (!halves && config.positions != Positions::sinusoidal) return nullptr;
  const int64_t width = config.width;
  if (length > sinusoidal_rows_) {
    sinusoidal_rows_ = grown(sinusoidal_rows_, length);
    sinusoidal_.resize(static_cast<size_t>(sinusoidal_rows_ * width));
    for (int64_t position = 0; position < sinusoidal_rows_; ++position) {
      float* const row = sinusoidal_.data() + position * width;
      for (int64_t i = 0; i < width / 2; ++i) {
        const double angle = static_cast<double>(position) *
                             std::exp(static_cast<double>(2 * i) *
                                      (-std::log(10000.0) / static_cast<double>(width)));
        row[halves ? i : 2 * i] = static_cast<float>(std::sin(angle));
        row[halves ? width / 2 + i : 2 * i + 1] = static_cast<float>(std::cos(angle));
      }
    }
  }
  return sinusoidal_.data();
}

const float* PositionTables::rotary(const ModelConfig& config, int64_t length) {
  if (config.positions != Positions::rope) return nullptr;
  const int64_t half = config.head_dim / 2;
  if (length > rotary_rows_) {
    rotary_rows_ = grown(rotary_rows_, length);
    rotary_.resize(static_cast<size_t>(rotary_rows_ * 2 * half));
    for (int64_t position = 0; position < rotary_rows_; ++position) {
      float* const row = rotary_.data() + position * 2 * half;
      for (int64_t i = 0; i < half; ++i) {
        // float32, as the model in Python computes it.
        const float angle = static_cast<float>(position) *
                            std::pow(10000.0f, -(static_cast<float>(i) / static_cast<float>(half)));
        row[i] = std::cos(angle);
        row[half + i] = std::sin(angle);
      }
    }
  }
  return rotary_.data();
}

void rotate(float* vectors, int64_t heads, int64_t head_dim, const float* angles) {
  const int64_t half = head_dim / 2;
  for (int64_t h = 0; h < heads; ++h, vectors += head_dim) {
    for (int64_t i = 0; i < half; ++i) {
      const float real = vectors[i];
      const float imaginary = vectors[half + i];
      vectors[i] = real * angles[i] - imaginary * angles[half + i];
      vectors[half + i] = imaginary * angles[i] + real * angles[half + i];
    }
  }
}

}  // namespace transformer_ext::engine
