// A model ready to translate: weights, threads and workspaces.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "common/thread_pool.h"
#include "engine/model.h"
#include "engine/search.h"

namespace transformer_ext::engine {

class Engine;

// What a call asks of an engine beside itself.
struct Ensemble {
  std::vector<Engine*> others;            // that have a say in each token
  std::vector<int64_t> attention_layers;  // of this engine and of each other one; empty: none
  // Before each step, on the thread that called: what it throws ends the call, and the engine
  // serves the next.
  BeforeStep before_step = nullptr;
};

// Any number of threads may call one engine at once: the weights are only read, each call has a
// workspace of its own, and the pool's threads go to the call that comes first.
//
// The threads share out the work within a step of all sentences, or, where these are many, form
// teams that each have sentences of their own.
class Engine {
 public:
  Engine(const ModelConfig& config, Weights weights, int threads)
      : pool_(threads), model_(config, weights, pool_) {}

  const ModelConfig& config() const { return model_.config(); }
  int threads() const { return pool_.threads(); }

  // See search() and score() in search.h. std::invalid_argument for an encoder alone.
  std::vector<SearchResult> search(const std::vector<std::vector<int32_t>>& sources,
                                   const std::vector<Request>& requests,
                                   const SearchOptions& options, const Ensemble& ensemble = {});
  // As how many teams the threads search for so many sentences.
  int team_count(size_t sentences, const SearchOptions& options) const;

  std::vector<TargetScores> score(const std::vector<std::vector<int32_t>>& sources,
                                  const std::vector<std::vector<int32_t>>& targets,
                                  int32_t start_id, const Ensemble& ensemble = {});

  // Texts of token ids through a model without a decoder (std::invalid_argument for another kind),
  // none of them empty. `before_layer` is called before each layer on the thread that called; what
  // it throws ends the call. See EncodedTexts for the results and the errors.
  //
  // out[i][tokens of text i, width].
  void states(const Texts& texts, const std::vector<float*>& out,
              const BeforeStep& before_layer = nullptr);
  // out[texts, width].
  void pooled(const Texts& texts, float* out, const BeforeStep& before_layer = nullptr);
  // out[texts, labels].
  void label_scores(const Texts& texts, float* out, const BeforeStep& before_layer = nullptr);
  // out[i][positions[i], vocabulary].
  void token_scores(const Texts& texts, const std::vector<std::vector<int32_t>>& positions,
                    const std::vector<float*>& out, const BeforeStep& before_layer = nullptr);

 private:
  // Throws unless the model is of the kind that `what` takes.
  void require_kind(Kind kind, const char* what) const;
  // Throws unless the model has a decoder, and as many sources as there are `others`, or none where
  // it has no encoder.
  void check_sources(const std::vector<std::vector<int32_t>>& sources, size_t others,
                     const char* what, const char* name) const;

  class Lease;
  class Leases;
  using Teams = std::vector<std::unique_ptr<ThreadPool>>;

  // All threads, as so many pools.
  Teams& teams(int count);

  ThreadPool pool_;
  Model model_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> idle_;
  int leased_ = 0;
  std::map<int, Teams> teams_;  // by their number
};

}  // namespace transformer_ext::engine
