// A stack of layers without attention to sources on whole sequences: an encoder.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common/parallel.h"
#include "engine/buffer.h"
#include "engine/model.h"

namespace transformer_ext::engine {

// Sequences of token ids, one after the other.
class PackedTokens {
 public:
  // Ids must be in the vocabulary (else std::invalid_argument, which calls them `name`).
  void assign(const std::vector<std::vector<int32_t>>& sequences, int64_t vocabulary,
              const char* name);

  int64_t sequences() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t tokens() const { return offsets_.back(); }
  int64_t begin(int64_t sequence) const { return offsets_[static_cast<size_t>(sequence)]; }
  int64_t length(int64_t sequence) const { return begin(sequence + 1) - begin(sequence); }
  int64_t longest() const { return longest_; }
  const int32_t* offsets() const { return offsets_.data(); }  // [sequences + 1]
  const int32_t* ids() const { return ids_.data(); }
  const int32_t* positions() const { return positions_.data(); }  // of each in its sequence

 private:
  std::vector<int32_t> offsets_{0};
  std::vector<int32_t> ids_;
  std::vector<int32_t> positions_;
  int64_t longest_ = 0;
};

// Runs a stack, and keeps the memory that this takes.
class StackRun {
 public:
  struct Options {
    const int32_t* token_types = nullptr;  // of each token; null: all 0
    // Tokens, ascending, whose states alone are wanted; null: all.
    const std::vector<int32_t>* wanted = nullptr;
    // Called before each layer on the thread that called; what it throws ends the run.
    std::function<void()> before_layer = nullptr;
  };

  // The states [tokens (or those wanted), width], the caller's to change; valid until the next run.
  // Throws std::invalid_argument where learned positions end before the longest sequence.
  float* run(const Model& model, const Stack& stack, const PackedTokens& tokens,
             PositionTables& positions, Parallel& parallel, const Options& options);
  float* run(const Model& model, const Stack& stack, const PackedTokens& tokens,
             PositionTables& positions, Parallel& parallel) {
    return run(model, stack, tokens, positions, parallel, Options());
  }

  // Memory for other uses until the next run; the states stay.
  float* scratch(int64_t size) { return projected_.reserve(size); }

  int64_t bytes() const {
    return x_.bytes() + normed_.bytes() + projected_.bytes() + attended_.bytes() + inner_.bytes();
  }

 private:
  Buffer<float> x_;
  Buffer<float> normed_;
  Buffer<float> projected_;
  Buffer<float> attended_;
  Buffer<float> inner_;
};

}  // namespace transformer_ext::engine
