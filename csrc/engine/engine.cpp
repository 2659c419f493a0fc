#include "engine/engine.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace transformer_ext::engine {

namespace {

// Workspaces are kept for later calls as long as they are not larger than this together; those of
// one very long line, or of many threads, are given back. A batch of 64 sentences of 50 tokens, and
// as long outputs, takes 430 MB in a base model with a beam of 4, 260 MB in bfloat16 and int8.
constexpr int64_t kKeptBytes = int64_t{1} << 30;

// A team for each so many hypotheses. Two threads, base, int8, output tokens/s within a step and as
// two teams: 256 hypotheses 3,769 and 3,843; 64, 3,293 and 3,272; 16, 2,269 and 1,872; 2, 2,497 and
// 1,561 (each team reads all weights). Teams need not wait for one another at every step, which
// matters where other processes want the cores.
constexpr int64_t kTeamHypotheses = 128;

}  // namespace

// A workspace for the time of a call.
class Engine::Lease {
 public:
  explicit Lease(Engine& engine) : engine_(engine) {
    const std::lock_guard<std::mutex> lock(engine_.mutex_);
    // So that giving it back, in the destructor, cannot fail.
    engine_.idle_.reserve(static_cast<size_t>(++engine_.leased_) + engine_.idle_.size());
    if (engine_.idle_.empty()) {
      workspace_ = std::make_unique<Workspace>();
    } else {
      workspace_ = std::move(engine_.idle_.back());
      engine_.idle_.pop_back();
    }
  }
  ~Lease() {
    const std::lock_guard<std::mutex> lock(engine_.mutex_);
    --engine_.leased_;
    int64_t kept = workspace_->bytes();
    for (const auto& idle : engine_.idle_) kept += idle->bytes();
    if (kept <= kKeptBytes) engine_.idle_.push_back(std::move(workspace_));
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Workspace& workspace() { return *workspace_; }

 private:
  Engine& engine_;
  std::unique_ptr<Workspace> workspace_;
};

// One of each engine of an ensemble.
class Engine::Leases {
 public:
  Leases(Engine& first, const Ensemble& ensemble) {
    const std::vector<int64_t>& layers = ensemble.attention_layers;
    if (!layers.empty() && layers.size() != ensemble.others.size() + 1) {
      throw std::invalid_argument("attention_layers: got " + std::to_string(layers.size()) +
                                  ", expected one for each of the " +
                                  std::to_string(ensemble.others.size() + 1) + " models");
    }
    add(first, layers);
    for (Engine* const other : ensemble.others) {
      const ModelConfig& mine = first.config();
      other->require_kind(mine.kind, "an ensemble with this model");
      if (other->config().source_vocabulary != mine.source_vocabulary ||
          other->config().target_vocabulary != mine.target_vocabulary) {
        throw std::invalid_argument("models of an ensemble: expected equal vocabularies");
      }
      add(*other, layers);
    }
  }
  const std::vector<Member>& members() const { return members_; }

 private:
  void add(Engine& engine, const std::vector<int64_t>& attention_layers) {
    int64_t layer = -1;
    if (!attention_layers.empty()) {
      layer = attention_layers[members_.size()];
      const int64_t layers = engine.config().decoder_layers;
      engine.require_kind(Kind::encoder_decoder, "attention to sources");
      if (layer < 0 || layer >= layers) {
        throw std::invalid_argument("attention_layer: got " + std::to_string(layer) +
                                    ", but the decoder has " + std::to_string(layers) + " layers");
      }
    }
    leases_.push_back(std::make_unique<Lease>(engine));
    members_.push_back({engine.model_, leases_.back()->workspace(), layer});
  }

  std::vector<std::unique_ptr<Lease>> leases_;
  std::vector<Member> members_;
};

void Engine::require_kind(Kind kind, const char* what) const {
  if (config().kind == kind) return;
  throw std::invalid_argument(std::string(what) + ": the model is " + kind_name(config().kind) +
                              ", expected " + kind_name(kind));
}

void Engine::check_sources(const std::vector<std::vector<int32_t>>& sources, size_t others,
                           const char* what, const char* name) const {
  if (config().kind == Kind::decoder_only) {
    if (sources.empty()) return;
    throw std::invalid_argument("sources: got " + std::to_string(sources.size()) +
                                ", but the model has no encoder");
  }
  require_kind(Kind::encoder_decoder, what);
  if (sources.size() != others) {
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(others) +
                                ", expected one for each of the " + std::to_string(sources.size()) +
                                " sources");
  }
  for (const std::vector<int32_t>& source : sources) {
    if (source.empty()) throw std::invalid_argument("sources: got one without a token");
  }
}

std::vector<SearchResult> Engine::search(const std::vector<std::vector<int32_t>>& sources,
                                         const std::vector<Request>& requests,
                                         const SearchOptions& options, const Ensemble& ensemble) {
  check_sources(sources, requests.size(), "search", "requests");
  if ((options.return_attention || options.coverage_penalty > 0.0) &&
      ensemble.attention_layers.empty()) {
    throw std::invalid_argument("attention_layers: got none, but the options need attention");
  }
  const size_t longest = std::min(options.ended_penalty.size(), options.cut_penalty.size());
  for (const Request& request : requests) {
    if (request.limit < 1 || static_cast<size_t>(request.limit) >= longest) {
      throw std::invalid_argument("limits: got " + std::to_string(request.limit) +
                                  ", expected 1 or more and a penalty for each length up to it");
    }
    if (request.prefix.size() >= static_cast<size_t>(request.limit)) {
      throw std::invalid_argument(
          "prefix: got " + std::to_string(request.prefix.size()) +
          " tokens, expected fewer than the longest output of the sentence (" +
          std::to_string(request.limit) + ", its end of sentence counted)");
    }
    if (options.start_id < 0 && request.prompt.empty()) {
      throw std::invalid_argument("prompts: got one without a token, and there is no start_id");
    }
  }
  const int count = team_count(requests.size(), options);
  if (count == 1) {
    const Leases leases(*this, ensemble);
    return engine::search(leases.members(), sources, requests, options, pool_,
                          ensemble.before_step);
  }
  struct Part {
    std::vector<std::vector<int32_t>> sources;
    std::vector<Request> requests;
    std::vector<SearchResult> results;
    std::exception_ptr error;
  };
  // In turns, because the sources come in the order of their lengths.
  const size_t parts_count = static_cast<size_t>(count);
  std::vector<Part> parts(parts_count);
  for (size_t i = 0; i < requests.size(); ++i) {
    if (!sources.empty()) parts[i % parts_count].sources.push_back(sources[i]);
    parts[i % parts_count].requests.push_back(requests[i]);
  }
  Teams& pools = teams(count);
  struct OtherFailed {};
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool> failed{false};
  const BeforeStep before_step = [&] {
    if (failed.load(std::memory_order_relaxed)) throw OtherFailed();
    if (ensemble.before_step && std::this_thread::get_id() == caller) ensemble.before_step();
  };
  pool_.for_each(count, [&](int64_t i) {
    Part& part = parts[static_cast<size_t>(i)];
    try {
      const Leases leases(*this, ensemble);
      part.results = engine::search(leases.members(), part.sources, part.requests, options,
                                    *pools[static_cast<size_t>(i)], before_step);
    } catch (const OtherFailed&) {
    } catch (...) {
      part.error = std::current_exception();
      failed.store(true, std::memory_order_relaxed);
    }
  });
  for (const Part& part : parts) {
    if (part.error) std::rethrow_exception(part.error);
  }
  std::vector<SearchResult> results;
  results.reserve(requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    results.push_back(std::move(parts[i % parts_count].results[i / parts_count]));
  }
  return results;
}

int Engine::team_count(size_t sentences, const SearchOptions& options) const {
  const int64_t count = static_cast<int64_t>(sentences);
  const int64_t hypotheses =
      count * (options.sampling ? options.num_hypotheses : options.beam_size);
  const int64_t most = std::min(count, hypotheses / kTeamHypotheses);
  return static_cast<int>(std::clamp<int64_t>(most, 1, threads()));
}

Engine::Teams& Engine::teams(int count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Teams& pools = teams_[count];
  for (int i = static_cast<int>(pools.size()); i < count; ++i) {
    pools.push_back(std::make_unique<ThreadPool>(threads() / count + (i < threads() % count)));
  }
  return pools;
}

std::vector<TargetScores> Engine::score(const std::vector<std::vector<int32_t>>& sources,
                                        const std::vector<std::vector<int32_t>>& targets,
                                        int32_t start_id, const Ensemble& ensemble) {
  check_sources(sources, targets.size(), "score", "targets");
  const Leases leases(*this, ensemble);
  return engine::score(leases.members(), sources, targets, start_id, pool_, ensemble.before_step);
}

void Engine::states(const Texts& texts, const std::vector<float*>& out,
                    const BeforeStep& before_layer) {
  require_kind(Kind::encoder_only, "states");
  Lease lease(*this);
  Workspace& workspace = lease.workspace();
  workspace.texts.states(model_, texts, out, workspace.positions, pool_, before_layer);
}

void Engine::pooled(const Texts& texts, float* out, const BeforeStep& before_layer) {
  require_kind(Kind::encoder_only, "pooled");
  Lease lease(*this);
  Workspace& workspace = lease.workspace();
  workspace.texts.pooled(model_, texts, out, workspace.positions, pool_, before_layer);
}

void Engine::label_scores(const Texts& texts, float* out, const BeforeStep& before_layer) {
  require_kind(Kind::encoder_only, "label_scores");
  Lease lease(*this);
  Workspace& workspace = lease.workspace();
  workspace.texts.label_scores(model_, texts, out, workspace.positions, pool_, before_layer);
}

void Engine::token_scores(const Texts& texts, const std::vector<std::vector<int32_t>>& positions,
                          const std::vector<float*>& out, const BeforeStep& before_layer) {
  require_kind(Kind::encoder_only, "token_scores");
  Lease lease(*this);
  Workspace& workspace = lease.workspace();
  workspace.texts.token_scores(model_, texts, positions, out, workspace.positions, pool_,
                               before_layer);
}

}  // namespace transformer_ext::engine
