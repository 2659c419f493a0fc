// Beam search and sampling for a batch of sentences, or for continuations of given texts. The rules
// are those of SearchOptions (transformer_ext/inference/options.py), and
// transformer_ext/inference/search.py says the same in plain Python. Nothing here computes with
// weights: which tokens may follow a hypothesis and what their scores are made into is said in
// token_rules.h, the numeric part is decoder.h and next_tokens.h.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common/parallel.h"
#include "engine/decoder.h"
#include "engine/encoder.h"
#include "engine/model.h"
#include "engine/next_tokens.h"
#include "engine/text_encoder.h"
#include "engine/token_rules.h"

namespace transformer_ext::engine {

enum class EarlyStopping { exact, first, heuristic };

struct SearchOptions {
  int64_t beam_size = 4;
  int64_t num_hypotheses = 1;
  EarlyStopping early_stopping = EarlyStopping::exact;
  double beam_patience = 1.0;
  bool rank_unfinished = false;
  double coverage_penalty = 0.0;
  bool return_attention = false;
  bool sampling = false;
  uint64_t seed = 0;
  TokenOptions tokens;
  int32_t start_id = 0;  // fed before all else; -1: nothing is
  // What a score is divided by for n tokens without the end of sentence, where that follows and
  // where it does not; for every n that the limits allow.
  std::vector<double> ended_penalty;
  std::vector<double> cut_penalty;
};

// What is asked for one sentence.
struct Request {
  std::vector<int32_t> prefix;  // of the output, to be taken as it is
  int64_t limit = 0;            // most tokens, end of sentence included; more than the prefix
  int64_t minimum = 0;          // fewest tokens before the end of sentence
  uint64_t number = 0;          // of the sentence, for the random numbers of sampling
  // Fed before the output. It is no part of hypotheses, scores and lengths, but its tokens are
  // among those that the repetition rules look at. Not empty where there is no start_id.
  std::vector<int32_t> prompt = {};
};

// Why the search for a sentence stopped, and why a hypothesis did.
enum class Stop { none, exact, first, heuristic, sampled, max_length, no_token };
enum class End { eos, max_length, no_token };

struct Hypothesis {
  std::vector<int32_t> tokens;
  double score = 0.0;
  double log_prob = 0.0;
  std::vector<double> token_scores;  // of the tokens, then of the end of sentence if `end` is eos
  End end = End::eos;
  std::vector<float> attention;  // [token_scores][source], if asked for
};

struct SearchResult {
  std::vector<Hypothesis> hypotheses;  // best first
  Stop stop = Stop::none;
  int64_t steps = 0;
};

// All memory that one batch needs beside the model; used again by the next.
struct Workspace {
  PositionTables positions;
  EncodedSources sources;
  Decoder decoder;
  NextTokens next;
  NextTokens mean;     // of an ensemble, in the workspace of its first member
  EncodedTexts texts;  // of a model without a decoder

  int64_t bytes() const {
    return sources.bytes() + decoder.bytes() + next.bytes() + mean.bytes() + texts.bytes();
  }
};

// One model of an ensemble, or the only one. All of an ensemble have the same vocabularies; the
// probability of a token is the mean of theirs, and so is the attention.
struct Member {
  const Model& model;
  Workspace& workspace;
  int64_t attention_layer;  // -1: none
};

// Called before each step on the thread that searches; what it throws ends the search. Null: none.
using BeforeStep = std::function<void()>;

// A result for each request. There is a source for each, of at least one token, or none at all
// where the model has no encoder. Limits are at least 1 and within the penalties. Throws
// std::invalid_argument for ids out of range and sequences longer than the model's positions.
std::vector<SearchResult> search(const std::vector<Member>& members,
                                 const std::vector<std::vector<int32_t>>& sources,
                                 const std::vector<Request>& requests, const SearchOptions& options,
                                 Parallel& parallel, const BeforeStep& before_step = nullptr);

// What the model thinks of given targets.
struct TargetScores {
  std::vector<double> log_probs;  // of each token
  std::vector<float> attention;   // [tokens][source], if asked for
};

// targets[i] is what the model is to say, its end of sentence included if that is to count, and is
// fed after start_id; without one (-1) after its own first token, which gets no score. Sources as
// for search().
std::vector<TargetScores> score(const std::vector<Member>& members,
                                const std::vector<std::vector<int32_t>>& sources,
                                const std::vector<std::vector<int32_t>>& targets, int32_t start_id,
                                Parallel& parallel, const BeforeStep& before_step = nullptr);

}  // namespace transformer_ext::engine
