#include "engine/next_tokens.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "gemm/gemm.h"

namespace transformer_ext::engine {

namespace {

constexpr double kImpossible = -std::numeric_limits<double>::infinity();

// The vocabulary is cut into at most kParts parts, a task each, of chunks whose scores for a block
// of rows stay in the second-level cache. The cut depends on the vocabulary alone: the sum over a
// row is the same in any batch.
constexpr int64_t kParts = 16;
constexpr int64_t kChunkColumns = 512;
constexpr int64_t kChunkRows = 128;

// Rows that one task merges.
constexpr int64_t kMergedRows = 16;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

void NextTokens::scan(const Model& model, const float* states, int64_t rows, const int32_t* tokens,
                      Parallel& parallel) {
  const Linear& generator = model.generator();
  const PackedView weight = generator.weight;
  const int64_t width = weight.k;
  const int64_t chunk = round_up(kChunkColumns, gemm_panel_columns());
  const int64_t part_columns = round_up((weight.n + kParts - 1) / kParts, chunk);
  rows_ = rows;
  parts_ = (weight.n + part_columns - 1) / part_columns;
  TopScores* const tops = tops_.reserve(parts_ * rows);
  float* const top_scores = top_scores_.reserve(parts_ * rows * count_);
  int32_t* const top_ids = top_ids_.reserve(parts_ * rows * count_);
  float* const wanted = wanted_.reserve(rows);
  float* const kept = kept_ ? scores_.reserve(rows * weight.n) : nullptr;
  float* const floors = floors_.reserve(rows);
  std::fill_n(floors, rows, -std::numeric_limits<float>::infinity());
  const GemmInput x = gemm_convert(
      states, rows, width, width, weight.type,
      converted_.reserve(static_cast<int64_t>(gemm_converted_bytes(rows, width, weight.type))),
      parallel);
  parallel.for_each(parts_, [&](int64_t part) {
    float* const chunk_scores =
        kept != nullptr
            ? nullptr
            : static_cast<float*>(thread_scratch(
                  static_cast<size_t>(std::min(rows, kChunkRows) * chunk) * sizeof(float),
                  scratch_slot::vocabulary_scores));
    const int64_t end = std::min((part + 1) * part_columns, weight.n);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = part * rows + r;
      tops[at] = {-std::numeric_limits<float>::infinity(),
                  0.0f,
                  0,
                  static_cast<int32_t>(count_),
                  top_scores + at * count_,
                  top_ids + at * count_,
                  -std::numeric_limits<float>::infinity()};
    }
    Serial serial;
    for (int64_t column = part * part_columns; column < end; column += chunk) {
      const int64_t columns = std::min(chunk, end - column);
      const PackedView view = weight.columns(column, columns);
      const float* const bias = generator.bias.empty() ? nullptr : generator.bias.data() + column;
      for (int64_t first = 0; first < rows; first += kChunkRows) {
        const int64_t block = std::min(kChunkRows, rows - first);
        float* const scores = kept != nullptr ? kept + first * weight.n + column : chunk_scores;
        const int64_t stride = kept != nullptr ? weight.n : chunk;
        gemm(x.rows_from(first), block, view, bias, scores, stride, {}, serial);
        for (int64_t r = 0; r < block; ++r) {
          const float* const row = scores + r * stride;
          TopScores* const top = tops + part * rows + first + r;
          // What has count_ others above it in one part is not among the highest of all. Which part
          // is first to say so is a matter of chance, but not the result: see merge_tops().
          const std::atomic_ref<float> floor(floors[first + r]);
          top->floor = floor.load(std::memory_order_relaxed);
          top_scores_kernels().scan(row, columns, static_cast<int32_t>(column), top);
          if (top->count == top->capacity && top->scores[top->capacity - 1] > top->floor) {
            floor.store(top->scores[top->capacity - 1], std::memory_order_relaxed);
          }
          if (tokens == nullptr || tokens[first + r] < column) continue;
          const int64_t token = tokens[first + r] - column;
          if (token < columns) wanted[first + r] = row[token];
        }
      }
    }
  });
}

double NextTokens::merged_log_sum(int64_t row) const {
  double maximum = kImpossible;
  for (int64_t part = 0; part < parts_; ++part) {
    maximum = std::max(maximum, static_cast<double>(tops_.data()[part * rows_ + row].maximum));
  }
  double sum = 0.0;
  for (int64_t part = 0; part < parts_; ++part) {
    const TopScores& top = tops_.data()[part * rows_ + row];
    sum += static_cast<double>(top.sum) * std::exp(static_cast<double>(top.maximum) - maximum);
  }
  const double result = maximum + std::log(sum);
  if (!std::isfinite(result)) {
    throw std::domain_error("the model's scores are not finite numbers (NaN or infinity)");
  }
  return result;
}

void NextTokens::merge_tops(int64_t row) {
  const double denominator = log_sums_.data()[row];
  // Parts and their entries come in ascending order of ids among equal scores: an entry goes behind
  // those that are not lower. Scores are compared as they are, as the parts did: two may become
  // equal where the denominator is taken off, and parts leave out what is lower elsewhere.
  int64_t found = 0;
  int32_t* const ids = ids_.data() + row * count_;
  double* const log_probs = log_probs_.data() + row * count_;
  for (int64_t part = 0; part < parts_; ++part) {
    const TopScores& top = tops_.data()[part * rows_ + row];
    for (int32_t i = 0; i < top.count; ++i) {
      const double score = static_cast<double>(top.scores[i]);
      if (found == count_ && !(score > log_probs[found - 1])) break;
      int64_t at = found < count_ ? found++ : count_ - 1;
      for (; at > 0 && log_probs[at - 1] < score; --at) {
        log_probs[at] = log_probs[at - 1];
        ids[at] = ids[at - 1];
      }
      log_probs[at] = score;
      ids[at] = top.ids[i];
    }
  }
  for (int64_t i = 0; i < found; ++i) log_probs[i] -= denominator;
  for (; found < count_; ++found) {
    log_probs[found] = kImpossible;
    ids[found] = 0;
  }
}

void NextTokens::find(const Model& model, const float* states, int64_t rows, int64_t count,
                      const int32_t* tokens, bool keep, Parallel& parallel) {
  vocabulary_ = model.config().target_vocabulary;
  count_ = std::min(count, vocabulary_);
  kept_ = keep;
  mean_ = false;
  scan(model, states, rows, tokens, parallel);
  ids_.reserve(rows * count_);
  log_probs_.reserve(rows * count_);
  log_sums_.reserve(rows);
  parallel.for_each((rows + kMergedRows - 1) / kMergedRows, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kMergedRows, rows);
    for (int64_t r = task * kMergedRows; r < end; ++r) {
      log_sums_.data()[r] = merged_log_sum(r);
      merge_tops(r);
    }
  });
}

void NextTokens::find_mean(const std::vector<const NextTokens*>& members, int64_t count,
                           const int32_t* tokens, bool keep, Parallel& parallel) {
  vocabulary_ = members[0]->vocabulary_;
  rows_ = members[0]->rows_;
  count_ = std::min(count, vocabulary_);
  kept_ = keep;
  mean_ = true;
  float* const scores = scores_.reserve(rows_ * vocabulary_);
  float* const wanted = wanted_.reserve(rows_);
  float* const top_scores = top_scores_.reserve(rows_ * count_);
  int32_t* const ids = ids_.reserve(rows_ * count_);
  double* const log_probs = log_probs_.reserve(rows_ * count_);
  const float weight = 1.0f / static_cast<float>(members.size());
  parallel.for_each(rows_, [&](int64_t r) {
    float* const row = scores + r * vocabulary_;
    std::fill_n(row, vocabulary_, 0.0f);
    for (const NextTokens* const member : members) {
      top_scores_kernels().add_probabilities(member->scores_.data() + r * vocabulary_, vocabulary_,
                                             static_cast<float>(member->log_sums_.data()[r]),
                                             weight, row);
    }
    TopScores top{-std::numeric_limits<float>::infinity(),
                  0.0f,
                  0,
                  static_cast<int32_t>(count_),
                  top_scores + r * count_,
                  ids + r * count_,
                  -std::numeric_limits<float>::infinity()};
    top_scores_kernels().scan(row, vocabulary_, 0, &top);
    for (int64_t i = 0; i < count_; ++i) {
      log_probs[r * count_ + i] =
          i < top.count ? std::log(static_cast<double>(top.scores[i])) : kImpossible;
    }
    if (tokens != nullptr && tokens[r] >= 0) wanted[r] = row[tokens[r]];
  });
}

int64_t NextTokens::bytes() const {
  return tops_.bytes() + top_scores_.bytes() + top_ids_.bytes() + wanted_.bytes() + ids_.bytes() +
         log_probs_.bytes() + log_sums_.bytes() + scores_.bytes() + floors_.bytes() +
         converted_.bytes();
}

}  // namespace transformer_ext::engine
