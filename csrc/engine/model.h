// The weights of a Transformer as the engine computes with them, and its shape.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "activation/activation.h"
#include "common/parallel.h"
#include "engine/buffer.h"
#include "gemm/gemm.h"

namespace transformer_ext::engine {

enum class Positions { none, sinusoidal, sinusoidal_halves, learned, rope };
enum class Tying { none, target, all };
enum class Pooling { first, mean };
enum class Kind { encoder_decoder, decoder_only, encoder_only };

// As messages and config.json call it.
const char* kind_name(Kind kind);

// The fields of TransformerConfig, LanguageModelConfig and TextEncoderConfig
// (transformer_ext/model/config.py) that inference needs.
struct ModelConfig {
  Kind kind = Kind::encoder_decoder;
  int64_t source_vocabulary = 0;  // of the encoder; 0: there is none
  int64_t target_vocabulary = 0;  // of the decoder; likewise
  int64_t width = 0;              // d_model
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t encoder_layers = 0;
  int64_t decoder_layers = 0;
  int64_t inner = 0;  // dim_feedforward
  Activation activation = Activation::relu;
  bool norm_first = false;
  bool rms = false;
  float eps = 1e-5f;
  Positions positions = Positions::sinusoidal;
  int64_t max_positions = 0;  // of learned positions
  Tying tie = Tying::all;
  bool scale_embedding = true;
  bool embedding_norm = false;
  bool final_norm = false;
  bool bias = true;
  GemmType compute = GemmType::float32;  // of the factors of matrix products
  bool output_bias = false;

  // Of an encoder alone.
  int64_t token_types = 0;  // 0: it has no embedding of them
  Pooling pooling = Pooling::first;
  bool pooler = false;
  bool normalize = false;  // the pooled vector, to length 1
  int64_t labels = 0;
  bool masked_lm_head = false;

  int64_t query_width() const { return heads * head_dim; }
  int64_t kv_width() const { return kv_heads * head_dim; }
  // Keys and values that the decoder attends to are kept in bfloat16 where the products that make
  // them are less exact than float32. 8-bit integers with a scale for each vector of a head, half
  // the bytes, gained too little for int8: base, 64 sentences, beam 4, one thread, 530 against 525
  // microseconds of processor time a token (1.005 times, median of four turns; 1.03 by the clock on
  // two threads that shared the cores with other work). BLEU of the shipped test text was 38.12.
  bool bfloat16_cache() const { return compute != GemmType::float32; }
  int64_t cache_element_bytes() const { return bfloat16_cache() ? 2 : 4; }
};

// A float32 array of the caller's, contiguous.
struct Array {
  const float* data = nullptr;  // null: there is none
  std::vector<int64_t> shape;
};

// By parameter name, as in model.safetensors. An array is packed or copied before the next is asked
// for, and never kept: the caller need not hold more than one of them in memory.
using Weights = FunctionRef<Array(const std::string&)>;

struct Linear {
  PackedMatrix weight;
  std::vector<float> bias;  // empty: none

  const float* bias_data() const { return bias.empty() ? nullptr : bias.data(); }
  // y[rows, n] = epilogue(x[rows, k] W^T + bias), rows side by side.
  void apply(const float* x, int64_t rows, float* y, Epilogue epilogue, Parallel& parallel) const;
};

struct Norm {
  std::vector<float> weight;
  std::vector<float> bias;  // empty: RMSNorm
  bool rms = false;
  float eps = 0.0f;

  // out[rows, width] from x of the same shape; out may be x.
  void apply(const float* x, int64_t rows, float* out, Parallel& parallel) const;
};

struct FeedForward {
  Linear in;  // gated: the gate's rows first
  Linear out;
};

struct CrossAttention {
  Linear query;
  Linear key_value;
  Linear out;
  Norm norm;
};

struct Layer {
  Linear self_in;  // query, key, value
  Linear self_out;
  Norm self_norm;
  std::optional<CrossAttention> cross;  // of the decoder of an encoder-decoder
  FeedForward feed_forward;
  Norm feed_forward_norm;
};

// The encoder or the decoder.
struct Stack {
  std::vector<Layer> layers;
  // [vocabulary, width]: one of Model's tables, or null where the output projection's weights,
  // which are tied to it, are all that is kept of it.
  const float* embedding = nullptr;
  std::vector<float> positions;    // learned: [max_positions, width]
  std::vector<float> token_types;  // [token_types, width]; empty: none
  Norm embedding_norm;             // empty weight: none
  Norm norm;                       // empty weight: none
};

// What follows the encoder of a model without a decoder. Empty weights: the model does not have it.
struct EncoderHeads {
  Linear pooler;
  Linear labels;
  // Before the product with the embeddings, which is Model::generator().
  Linear masked_lm;
  Norm masked_lm_norm;
};

class Model {
 public:
  // Packs and copies the weights of the model's kind. Throws std::invalid_argument, naming it,
  // where one is missing or has another shape than the configuration asks for.
  Model(const ModelConfig& config, Weights weights, Parallel& parallel);

  const ModelConfig& config() const { return config_; }
  const Stack& encoder() const { return encoder_; }
  const Stack& decoder() const { return decoder_; }
  const EncoderHeads& encoder_heads() const { return encoder_heads_; }
  // From states to scores of the vocabulary, where the model has such: what a decoder says, or the
  // masked language model of an encoder.
  const Linear& generator() const { return generator_; }

  // x[rows, width] = embeddings of the ids, scaled, with positions (those of `table`, see
  // PositionTables) and, where the model has them, token types (null: all 0), normalised where the
  // model does so. Ids and types must be in range.
  void embed(const Stack& stack, const int32_t* ids, const int32_t* positions, const float* table,
             int64_t rows, float* x, Parallel& parallel,
             const int32_t* token_types = nullptr) const;

  // x += network(input): the residual connection is the product's start. input may be x.
  void add_feed_forward(const FeedForward& network, const float* input, int64_t rows, float* x,
                        Buffer<float>& scratch, Parallel& parallel) const;

 private:
  ModelConfig config_;
  Buffer<float> source_table_;  // empty where tied to the output projection
  Buffer<float> target_table_;  // likewise
  Stack encoder_;
  Stack decoder_;
  EncoderHeads encoder_heads_;
  Linear generator_;
};

// Tables that depend on the position alone, grown as longer sentences come. Each workspace has its
// own, so that no lock is needed.
class PositionTables {
 public:
  // Rows for positions 0 .. length - 1 at least: to be added to embeddings, [length, width], or
  // null where the model has none. Throws std::invalid_argument where learned positions end before.
  const float* added(const ModelConfig& config, const Stack& stack, int64_t length);

  // Cosines, then sines, [length][2][head_dim / 2], or null where the model does not rotate.
  const float* rotary(const ModelConfig& config, int64_t length);

 private:
  std::vector<float> sinusoidal_;
  int64_t sinusoidal_rows_ = 0;
  std::vector<float> rotary_;
  int64_t rotary_rows_ = 0;
};

// Turns `heads` vectors by the angles of one position (Su et al. 2021, "RoFormer", equation 34);
// `angles` is that position's row of PositionTables::rotary.
void rotate(float* vectors, int64_t heads, int64_t head_dim, const float* angles);

}  // namespace transformer_ext::engine
