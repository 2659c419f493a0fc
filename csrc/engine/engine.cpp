#include "engine/engine.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace transformer_ext::engine {

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

}  // namespace

std::vector<SearchResult> Engine::search(const std::vector<std::vector<int32_t>>& sources,
                                         const std::vector<int64_t>& limits,
                                         const SearchOptions& options) {
  check_sources(sources, limits.size(), "limits");
  for (const int64_t limit : limits) {
    if (limit < 1 || static_cast<size_t>(limit) >= options.ended_penalty.size() ||
        static_cast<size_t>(limit) >= options.cut_penalty.size()) {
      throw std::invalid_argument("limits: got " + std::to_string(limit) +
                                  ", expected 1 or more and a penalty for each length up to it");
    }
  }
  Lease lease(*this);
  return engine::search(model_, sources, limits, options, lease.workspace(), pool_);
}

std::vector<std::vector<double>> Engine::score(const std::vector<std::vector<int32_t>>& sources,
                                               const std::vector<std::vector<int32_t>>& targets,
                                               int32_t start_id) {
  check_sources(sources, targets.size(), "targets");
  Lease lease(*this);
  return engine::score(model_, sources, targets, start_id, lease.workspace(), pool_);
}

}  // namespace transformer_ext::engine
