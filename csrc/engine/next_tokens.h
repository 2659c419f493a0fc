// From the decoder's states to the scores of next tokens: what a search is given to choose from.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

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

  // The same of the mean probability that several models give: `members` are the results of find()
  // of each, all kept.
  void find_mean(const std::vector<const NextTokens*>& members, int64_t count,
                 const int32_t* tokens, bool keep, Parallel& parallel);

  int64_t count() const { return count_; }
  // Of the i-th most probable token of a row, i < count(); equal ones by ascending id. Minus
  // infinity from where there are no more.
  int32_t id(int64_t row, int64_t i) const { return ids_.data()[row * count_ + i]; }
  double log_prob(int64_t row, int64_t i) const { return log_probs_.data()[row * count_ + i]; }
  // Of the token asked for.
  double wanted_log_prob(int64_t row) const { return log_prob_of(row, wanted_.data()[row]); }
  // Of any token, where all are kept.
  bool kept() const { return kept_; }
  double kept_log_prob(int64_t row, int64_t token) const {
    return log_prob_of(row, scores_.data()[row * vocabulary_ + token]);
  }
  int64_t vocabulary() const { return vocabulary_; }
  // What a row's scores have above its log-probabilities; 0 of a mean.
  double log_sum(int64_t row) const { return mean_ ? 0.0 : log_sums_.data()[row]; }
  int64_t bytes() const;

 private:
  void scan(const Model& model, const float* states, int64_t rows, const int32_t* tokens,
            Parallel& parallel);
  // Scores are logits, or, of a mean, probabilities.
  double log_prob_of(int64_t row, float score) const {
    return mean_ ? std::log(static_cast<double>(score))
                 : static_cast<double>(score) - log_sums_.data()[row];
  }
  double merged_log_sum(int64_t row) const;
  void merge_tops(int64_t row);

  bool kept_ = false;
  bool mean_ = false;
  int64_t vocabulary_ = 0;
  int64_t count_ = 0;
  int64_t rows_ = 0;
  int64_t parts_ = 0;
  Buffer<TopScores> tops_;  // [parts][rows]
  Buffer<float> top_scores_;
  Buffer<int32_t> top_ids_;
  Buffer<float> floors_;    // [rows]: below this a score is not among the highest
  Buffer<char> converted_;  // the states as factors of the product
  Buffer<float> wanted_;    // [rows]: the scores of the given tokens
  Buffer<int32_t> ids_;
  Buffer<double> log_probs_;
  Buffer<double> log_sums_;
  Buffer<float> scores_;  // [rows][vocabulary]: logits, or of a mean, probabilities
};

}  // namespace transformer_ext::engine
