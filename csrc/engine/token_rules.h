// One step's view of one hypothesis: which tokens may follow it, and what the model's scores are
// made into before the search compares them. transformer_ext/inference/search.py says the same in
// plain Python.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/next_tokens.h"

namespace transformer_ext::engine {

struct TokenOptions {
  std::vector<int32_t> suppressed;  // ascending ids, never proposed
  int64_t no_repeat_ngram_size = 0;
  double repetition_penalty = 1.0;  // at least 1
  // The penalty is on the model's scores before their softmax: a negative one is multiplied by it,
  // another divided. Where there are several models (the mean of their probabilities has no such
  // scores), on log-probabilities all the same.
  bool penalty_on_logits = false;
  int32_t eos_id = 0;
  // Of sampling; 0 tokens and probability 1 are no limit.
  int64_t top_k = 0;
  double top_p = 1.0;
  double temperature = 1.0;
};

// What the options say of the next token of one hypothesis.
struct TokenRules {
  int32_t forced = -1;            // the only one that may follow, whatever else is said; -1: none
  bool may_end = true;            // whether the end of sentence may follow
  std::vector<int32_t> banned;    // beside the suppressed, ascending
  std::vector<int32_t> repeated;  // ascending: the repetition penalty is on them

  // For a hypothesis of these tokens.
  void find(const TokenOptions& options, const std::vector<int32_t>& tokens);

  // How many of the most probable tokens must be looked at, so that `count` are left.
  int64_t needed(const TokenOptions& options, int64_t count) const;
};

// A token that may follow.
struct Candidate {
  int32_t token;
  double log_prob;  // the model's
  double adjusted;  // what the search adds up
};

// Those of a row, in no order, among them the `count` best by (adjusted, then lower id).
void find_candidates(const NextTokens& next, int64_t row, const TokenRules& rules,
                     const TokenOptions& options, int64_t count,
                     std::vector<Candidate>* candidates);

// Draws a token, with probability proportional to exp(adjusted / temperature) among the top_k most
// probable, of these the fewest that together have the probability top_p (Fan et al. 2018,
// "Hierarchical neural story generation"; Holtzman et al. 2020, "The curious case of neural text
// degeneration"). `uniform` from [0, 1) chooses from the tokens in falling order of probability.
// Token -1 where none may follow. `candidates` is scratch memory.
Candidate draw(const NextTokens& next, int64_t row, const TokenRules& rules,
               const TokenOptions& options, double uniform, std::vector<Candidate>* candidates);

// The random number of one token: a function of its arguments alone (Philox4x32 of
// csrc/dropout/philox.h, 53 bits of its first two words).
double uniform_number(uint64_t seed, uint64_t sentence, uint32_t sample, uint32_t step);

}  // namespace transformer_ext::engine
