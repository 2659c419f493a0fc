#include "engine/engine.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace transformer_ext::engine {

namespace {

// A workspace that has grown larger than this, as by one very long line, is given back after the
// call. A batch of 64 sentences of 50 tokens takes 200 to 400 MB in a base model.
constexpr int64_t kKeptBytes = int64_t{1} << 30;

}  // namespace

// A workspace for the time of a call.
class Engine::Lease {
 public:
  explicit Lease(Engine& engine) : engine_(engine) {
    const std::lock_guard<std::mutex> lock(engine_.mutex_);
    if (engine_.idle_.empty()) {
      workspace_ = std::make_unique<Workspace>();
    } else {
      workspace_ = std::move(engine_.idle_.back());
      engine_.idle_.pop_back();
    }
  }
  ~Lease() {
    if (workspace_->bytes() > kKeptBytes) return;
    const std::lock_guard<std::mutex> lock(engine_.mutex_);
    engine_.idle_.push_back(std::move(workspace_));
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Workspace& workspace() { return *workspace_; }

 private:
  Engine& engine_;
  std::unique_ptr<Workspace> workspace_;
};

namespace {

void check_sources(const std::vector<std::vector<int32_t>>& sources, size_t others,
                   const char* name) {
  if (sources.size() != others) {
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(others) +
                                ", expected one for each of the " + std::to_string(sources.size()) +
                                " sources");
  }
  for (const std::vector<int32_t>& source : sources) {
    if (source.empty()) throw std::invalid_argument("sources: got one without a token");
  }
}

void check_layer(const Model& model, int64_t layer, bool needed) {
  const int64_t layers = model.config().decoder_layers;
  if (needed && (layer < 0 || layer >= layers)) {
    throw std::invalid_argument("attention_layer: got " + std::to_string(layer) +
                                ", but the decoder has " + std::to_string(layers) + " layers");
  }
}

}  // namespace

std::vector<SearchResult> Engine::search(const std::vector<std::vector<int32_t>>& sources,
                                         const std::vector<Request>& requests,
                                         const SearchOptions& options) {
  check_sources(sources, requests.size(), "requests");
  check_layer(model_, options.attention_layer,
              options.return_attention || options.coverage_penalty > 0.0);
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
  }
  Lease lease(*this);
  return engine::search(model_, sources, requests, options, lease.workspace(), pool_);
}

std::vector<TargetScores> Engine::score(const std::vector<std::vector<int32_t>>& sources,
                                        const std::vector<std::vector<int32_t>>& targets,
                                        int32_t start_id, int64_t attention_layer) {
  check_sources(sources, targets.size(), "targets");
  check_layer(model_, attention_layer, attention_layer >= 0);
  Lease lease(*this);
  return engine::score(model_, sources, targets, start_id, attention_layer, lease.workspace(),
                       pool_);
}

}  // namespace transformer_ext::engine
