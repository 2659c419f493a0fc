// The encoder of an encoder-decoder, and what the decoder needs of its output.
#pragma once

#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "engine/buffer.h"
#include "engine/model.h"
#include "engine/stack.h"

namespace transformer_ext::engine {

// The keys and values of the decoder's attention to the sources, of every decoder layer: computed
// once for each sentence, and shared by its hypotheses.
class EncodedSources {
 public:
  // Runs the encoder. Each source has at least one token; ids must be in the vocabulary (else
  // std::invalid_argument).
  void encode(const Model& model, const std::vector<std::vector<int32_t>>& sources,
              PositionTables& positions, Parallel& parallel);

  int64_t sentences() const { return tokens_.sequences(); }
  int64_t length(int64_t sentence) const { return tokens_.length(sentence); }
  // The key [kv_width] of a sentence's token in the first layer; its value follows it. In the next
  // layer they are layer_stride() elements further. Elements are those of the decoder's cache.
  const void* keys(int64_t sentence, int64_t token) const {
    return key_values_.data() + (tokens_.begin(sentence) + token) * token_stride_ * element_bytes_;
  }
  int64_t layer_stride() const { return tokens_.tokens() * token_stride_; }
  int64_t bytes() const { return key_values_.bytes() + stack_.bytes(); }

 private:
  PackedTokens tokens_;
  StackRun stack_;
  int64_t token_stride_ = 0;
  int64_t element_bytes_ = 0;
  Buffer<char> key_values_;  // [layers][tokens][2 * kv_width]
};

}  // namespace transformer_ext::engine
