// The decoder, one position of all live hypotheses at a time, with a cache of earlier positions.
#pragma once

#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "engine/buffer.h"
#include "engine/encoder.h"
#include "engine/model.h"
#include "engine/top_scores.h"

namespace transformer_ext::engine {

// A live hypothesis, as the decoder sees it.
struct Row {
  int32_t sentence;
  int32_t parent;  // its row in the step before; not read in the first step
  int32_t token;   // its newest
};

// Keys and values of position t of all rows that were live then lie in one block that is never
// moved. A row knows its positions by pointers into the blocks; rows with a common beginning share
// them, and a new order of the beam, or the end of a sentence, copies pointers only.
class Decoder {
 public:
  // Must be called before the first step of a batch. Both must outlive it.
  void start(const Model& model, const EncodedSources& sources);

  // The decoder's states [rows, width] after the rows' newest tokens, ready for the generator.
  // Rows of a sentence stand together. Valid until the next step.
  const float* step(const std::vector<Row>& rows, PositionTables& positions, Parallel& parallel);

 private:
  void advance_paths(const std::vector<Row>& rows);

  const Model* model_ = nullptr;
  const EncodedSources* sources_ = nullptr;
  int64_t position_ = 0;
  int64_t block_stride_ = 0;                // floats of a row in a block: [layers][2][kv_width]
  std::vector<Buffer<float>> blocks_;       // by position
  Buffer<const float*> paths_;              // [rows][position_ + 1], into the blocks
  Buffer<const float*> earlier_paths_;      // of the step before
  std::vector<const float*> source_keys_;   // of each source token, in the first layer
  std::vector<int64_t> source_keys_begin_;  // by sentence
  std::vector<int32_t> ids_;
  std::vector<int32_t> row_positions_;
  Buffer<float> x_;
  Buffer<float> normed_;
  Buffer<float> projected_;
  Buffer<float> attended_;
  Buffer<float> inner_;
};

// The most probable next tokens of each row: output projection, log-softmax and the choice of the
// highest in one pass that never holds a whole row of the vocabulary.
class NextTokens {
 public:
  // For states [rows, width], at least `count` tokens a row (or the whole vocabulary). Throws
  // std::domain_error where the model's scores are not finite numbers.
  void find(const Model& model, const float* states, int64_t rows, int64_t count,
            Parallel& parallel);

  int64_t count() const { return count_; }
  // Of the i-th most probable token of a row, i < count(); equal ones by ascending id.
  int32_t id(int64_t row, int64_t i) const { return ids_.data()[row * count_ + i]; }
  double log_prob(int64_t row, int64_t i) const { return log_probs_.data()[row * count_ + i]; }

  // The log-probability of one given token for each row.
  void score(const Model& model, const float* states, int64_t rows, const int32_t* tokens,
             double* log_probs, Parallel& parallel);

 private:
  void scan(const Model& model, const float* states, int64_t rows, const int32_t* tokens,
            Parallel& parallel);
  double log_sum(int64_t row) const;

  int64_t count_ = 0;
  int64_t rows_ = 0;
  int64_t parts_ = 0;
  Buffer<TopScores> tops_;  // [parts][rows]
  Buffer<float> top_scores_;
  Buffer<int32_t> top_ids_;
  Buffer<float> wanted_;  // [rows]: the scores of the given tokens
  Buffer<int32_t> ids_;
  Buffer<double> log_probs_;
};

}  // namespace transformer_ext::engine
