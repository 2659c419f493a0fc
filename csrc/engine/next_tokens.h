// From the decoder's states to the scores of next tokens: what a search is given to choose from.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "engine/buffer.h"
#include "engine/model.h"
#include "engine/top_scores.h"

namespace transformer_ext::engine {

// Output projection, log-softmax and the choice of the highest in one pass, which holds a whole row
// of the vocabulary only where that is asked for. Log-probabilities are those of the model: what a
// search makes of them is said in token_rules.h.
class NextTokens {
 public:
  // For states [rows, width], the `count` most probable tokens of each row (or the whole
  // vocabulary), and the scores of one token each, where `tokens` [rows] is not null and not
  // negative. `keep` keeps all scores. Throws std::domain_error where the model's scores are not
  // finite numbers.
  void find(const Model& model, const float* states, int64_t rows, int64_t count,
            const int32_t* tokens, bool keep, Parallel& parallel);

  int64_t count() const { return count_; }
  // Of the i-th most probable token of a row, i < count(); equal ones by ascending id. Minus
  // infinity from where there are no more.
  int32_t id(int64_t row, int64_t i) const { return ids_.data()[row * count_ + i]; }
  double log_prob(int64_t row, int64_t i) const { return log_probs_.data()[row * count_ + i]; }
  // Of the token asked for.
  double wanted_log_prob(int64_t row) const {
    return static_cast<double>(wanted_.data()[row]) - log_sums_.data()[row];
  }
  // Where all are kept: [vocabulary] of a row; a log-probability is a score minus log_sum(row).
  const float* scores(int64_t row) const {
    return kept_ ? scores_.data() + row * vocabulary_ : nullptr;
  }
  double log_sum(int64_t row) const { return log_sums_.data()[row]; }
  int64_t vocabulary() const { return vocabulary_; }
  int64_t bytes() const;

 private:
  void scan(const Model& model, const float* states, int64_t rows, const int32_t* tokens,
            Parallel& parallel);
  double merged_log_sum(int64_t row) const;
  void merge_tops(int64_t row);

  bool kept_ = false;
  int64_t vocabulary_ = 0;
  int64_t count_ = 0;
  int64_t rows_ = 0;
  int64_t parts_ = 0;
  Buffer<TopScores> tops_;  // [parts][rows]
  Buffer<float> top_scores_;
  Buffer<int32_t> top_ids_;
  Buffer<float> wanted_;  // [rows]: the scores of the given tokens
  Buffer<int32_t> ids_;
  Buffer<double> log_probs_;
  Buffer<double> log_sums_;
  Buffer<float> scores_;  // [rows][vocabulary]
};

}  // namespace transformer_ext::engine
