// One pass over a row's scores (logits) as they come, some columns at a time: what log-softmax
// needs of them, and the highest few. So the row is never held whole.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace transformer_ext {

// What is known of a row so far.
struct TopScores {
  float maximum;  // -inf at first
  float sum;      // of exp(score - maximum), 0 at first
  int32_t count;  // entries in use, 0 at first
  int32_t capacity;
  float* scores;  // [capacity], highest first; of equal ones the lower id first
  int32_t* ids;   // [capacity]
  float floor;    // lower scores are known not to be among the highest; -inf: nothing is known
};

struct TopScoresKernels {
  // The columns first_id .. first_id + n of one row; calls come in ascending order of columns. A
  // NaN makes the sum NaN; -inf is never among the highest.
  void (*scan)(const float* scores, int64_t n, int32_t first_id, TopScores* top);
  // sum[i] += weight * exp(scores[i] - log_sum): a model's part in the probabilities of an
  // ensemble.
  void (*add_probabilities)(const float* scores, int64_t n, float log_sum, float weight,
                            float* sum);
};

TRANSFORMER_EXT_KERNELS(TopScoresKernels, top_scores_kernels)

}  // namespace transformer_ext
