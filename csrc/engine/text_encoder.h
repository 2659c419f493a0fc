// An encoder alone: states of tokens, a vector for each text, and what the heads make of them.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common/parallel.h"
#include "engine/buffer.h"
#include "engine/model.h"
#include "engine/stack.h"

namespace transformer_ext::engine {

struct Texts {
  std::vector<std::vector<int32_t>> ids;          // at least one each
  std::vector<std::vector<int32_t>> token_types;  // of the ids; empty: all 0
};

// Runs texts through the encoder and keeps the memory that this takes. What each text gives does
// not depend, bit for bit, on the others.
//
// All throw std::invalid_argument for a text without a token, ids and types out of range, more
// tokens than learned positions, and results that the model has no weights for.
class EncodedTexts {
 public:
  using BeforeLayer = std::function<void()>;

  // out[i][tokens of text i, width].
  void states(const Model& model, const Texts& texts, const std::vector<float*>& out,
              PositionTables& positions, Parallel& parallel, const BeforeLayer& before_layer);
  // out[texts, width]: the first token's state or the mean of all, through the pooler where the
  // model has one, then divided by its length where it does so.
  void pooled(const Model& model, const Texts& texts, float* out, PositionTables& positions,
              Parallel& parallel, const BeforeLayer& before_layer);
  // out[texts, labels], before any softmax.
  void label_scores(const Model& model, const Texts& texts, float* out, PositionTables& positions,
                    Parallel& parallel, const BeforeLayer& before_layer);
  // out[i][wanted[i], vocabulary], before any softmax: what the masked language model says at
  // these tokens of text i, in any order.
  void token_scores(const Model& model, const Texts& texts,
                    const std::vector<std::vector<int32_t>>& wanted, const std::vector<float*>& out,
                    PositionTables& positions, Parallel& parallel, const BeforeLayer& before_layer);

  int64_t bytes() const {
    return stack_.bytes() + pooled_.bytes() + head_.bytes() + scores_.bytes();
  }

 private:
  void assign(const Model& model, const Texts& texts);
  // The states of all tokens, or of those in wanted_.
  float* run(const Model& model, bool all, PositionTables& positions, Parallel& parallel,
             const BeforeLayer& before_layer);

  PackedTokens tokens_;
  std::vector<int32_t> token_types_;  // empty: all 0
  std::vector<int32_t> wanted_;
  StackRun stack_;
  Buffer<float> pooled_;
  Buffer<float> head_;
  Buffer<float> scores_;
};

}  // namespace transformer_ext::engine
