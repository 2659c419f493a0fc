// Beam search over a batch of sentences. The rules are those of SearchOptions
// (transformer_ext/inference/options.py), and transformer_ext/inference/search.py says the same in
// plain Python.
#pragma once

#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "engine/decoder.h"
#include "engine/encoder.h"
#include "engine/model.h"

namespace transformer_ext::engine {

struct SearchOptions {
  int64_t beam_size = 4;
  int64_t num_hypotheses = 1;
  int64_t min_length = 0;
  bool stop_at_first = false;  // early_stopping "first"; else "exact"
  int32_t start_id = 0;
  int32_t eos_id = 0;
  std::vector<int32_t> suppressed;  // ids never proposed
  // What a log-probability is divided by for n tokens without the end of sentence, where that
  // follows and where it does not; for every n that the limits allow.
  std::vector<double> ended_penalty;
  std::vector<double> cut_penalty;
};

enum class Stop : int { none = 0, exact = 1, first = 2, max_length = 3 };

struct Hypothesis {
  std::vector<int32_t> tokens;
  double score = 0.0;
  double log_prob = 0.0;
  std::vector<double> token_scores;  // of the tokens, then of the end of sentence if `ended`
  bool ended = false;
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
};

// A result for each source (at least one token each). limits[i] is the most tokens, end of sentence
// included, of sentence i: at least 1, at most the size of the penalties. Throws
// std::invalid_argument for ids out of range and sequences longer than the model's positions.
std::vector<SearchResult> search(const Model& model,
                                 const std::vector<std::vector<int32_t>>& sources,
                                 const std::vector<int64_t>& limits, const SearchOptions& options,
                                 Workspace& workspace, Parallel& parallel);

// Log-probabilities of the given targets' tokens: targets[i] is what the model is to say, its end
// of sentence included if that is to count, and is fed after start_id.
std::vector<std::vector<double>> score(const Model& model,
                                       const std::vector<std::vector<int32_t>>& sources,
                                       const std::vector<std::vector<int32_t>>& targets,
                                       int32_t start_id, Workspace& workspace, Parallel& parallel);

}  // namespace transformer_ext::engine
