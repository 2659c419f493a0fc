#include "engine/search.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace transformer_ext::engine {

namespace {

constexpr double kImpossible = -std::numeric_limits<double>::infinity();

// A token of a hypothesis, and the one before it in the same pool (-1: none).
struct Node {
  int32_t token;
  int32_t parent;
  double score;
};

struct Live {
  int32_t node;
  int32_t row;  // in the decoder's last step
  double log_prob;
};

struct Candidate {
  double log_prob;
  double score;
  int32_t live;
  int32_t token;
};

class SentenceSearch {
 public:
  SentenceSearch(int64_t limit, const SearchOptions& options)
      : options_(options), limit_(limit), live_{{-1, 0, 0.0}} {}

  Stop stop() const { return stop_; }
  const std::vector<Live>& live() const { return live_; }
  int32_t newest(const Live& live) const {
    return live.node < 0 ? options_.start_id : nodes_[static_cast<size_t>(live.node)].token;
  }

  // One step; the live hypotheses are the rows first_row, first_row + 1, ... of `next`.
  void advance(const NextTokens& next, int64_t first_row) {
    candidates_.clear();
    for (size_t i = 0; i < live_.size(); ++i) {
      live_[i].row = static_cast<int32_t>(first_row + static_cast<int64_t>(i));
      for (int64_t rank = 0; rank < next.count(); ++rank) {
        const int32_t token = next.id(live_[i].row, rank);
        const double score = next.log_prob(live_[i].row, rank);
        if (score == kImpossible) break;
        if (!proposable(token)) continue;
        candidates_.push_back({live_[i].log_prob + score, score, static_cast<int32_t>(i), token});
      }
    }
    const size_t considered =
        std::min(candidates_.size(), static_cast<size_t>(2 * options_.beam_size));
    std::partial_sort(candidates_.begin(),
                      candidates_.begin() + static_cast<std::ptrdiff_t>(considered),
                      candidates_.end(), [](const Candidate& a, const Candidate& b) {
                        if (a.log_prob != b.log_prob) return a.log_prob > b.log_prob;
                        return a.live != b.live ? a.live < b.live : a.token < b.token;
                      });
    const size_t beam_size = static_cast<size_t>(options_.beam_size);
    survivors_.clear();
    for (size_t rank = 0; rank < considered; ++rank) {
      const Candidate& candidate = candidates_[rank];
      const Live& from = live_[static_cast<size_t>(candidate.live)];
      if (candidate.token == options_.eos_id) {
        if (rank < beam_size) finished_.push_back(hypothesis(from, &candidate));
      } else if (survivors_.size() < beam_size) {
        survivors_.push_back({static_cast<int32_t>(nodes_.size()), from.row, candidate.log_prob});
        nodes_.push_back({candidate.token, from.node, candidate.score});
      }
    }
    std::swap(live_, survivors_);
    ++steps_;
    stop_ = reason_to_stop();
  }

  SearchResult result() {
    SearchResult result;
    result.stop = stop_;
    result.steps = steps_;
    const size_t wanted = static_cast<size_t>(options_.num_hypotheses);
    rank();
    for (Hypothesis& hypothesis : finished_) {
      if (result.hypotheses.size() < wanted) result.hypotheses.push_back(std::move(hypothesis));
    }
    if (stop_ == Stop::max_length) {
      for (const Live& live : live_) {
        if (result.hypotheses.size() < wanted) {
          result.hypotheses.push_back(hypothesis(live, nullptr));
        }
      }
    }
    return result;
  }

 private:
  bool proposable(int32_t token) const {
    if (token == options_.eos_id) return steps_ >= options_.min_length;
    return std::find(options_.suppressed.begin(), options_.suppressed.end(), token) ==
           options_.suppressed.end();
  }

  // A live hypothesis as a result: ended by `end`, or cut off (null).
  Hypothesis hypothesis(const Live& live, const Candidate* end) const {
    Hypothesis h;
    for (int32_t node = live.node; node >= 0; node = nodes_[static_cast<size_t>(node)].parent) {
      h.tokens.push_back(nodes_[static_cast<size_t>(node)].token);
      h.token_scores.push_back(nodes_[static_cast<size_t>(node)].score);
    }
    std::reverse(h.tokens.begin(), h.tokens.end());
    std::reverse(h.token_scores.begin(), h.token_scores.end());
    h.ended = end != nullptr;
    h.log_prob = h.ended ? end->log_prob : live.log_prob;
    if (h.ended) h.token_scores.push_back(end->score);
    h.score =
        h.log_prob / (h.ended ? options_.ended_penalty : options_.cut_penalty)[h.tokens.size()];
    return h;
  }

  void rank() {
    std::stable_sort(finished_.begin(), finished_.end(),
                     [](const Hypothesis& a, const Hypothesis& b) { return a.score > b.score; });
  }

  Stop reason_to_stop() {
    const size_t ended = finished_.size();
    if (options_.beam_size == 1 && ended > 0) return Stop::first;
    if (options_.stop_at_first && ended >= static_cast<size_t>(options_.beam_size)) {
      return Stop::first;
    }
    if (live_.empty()) return Stop::exact;
    if (!options_.stop_at_first && ended >= static_cast<size_t>(options_.num_hypotheses)) {
      // A log-probability only falls from here on and a penalty only grows with the length, so no
      // descendant of the best live hypothesis can score above this.
      const auto penalty = [&](int64_t tokens) {
        return options_.ended_penalty[static_cast<size_t>(tokens)];
      };
      const double best_possible =
          live_[0].log_prob /
          std::max(penalty(std::min(std::max(steps_, options_.min_length), limit_)),
                   penalty(limit_ - 1));
      rank();
      if (best_possible <= finished_[static_cast<size_t>(options_.num_hypotheses) - 1].score) {
        return Stop::exact;
      }
    }
    return steps_ >= limit_ ? Stop::max_length : Stop::none;
  }

  const SearchOptions& options_;
  const int64_t limit_;
  int64_t steps_ = 0;
  Stop stop_ = Stop::none;
  std::vector<Node> nodes_;
  std::vector<Live> live_;
  std::vector<Live> survivors_;
  std::vector<Candidate> candidates_;
  std::vector<Hypothesis> finished_;
};

}  // namespace

std::vector<SearchResult> search(const Model& model,
                                 const std::vector<std::vector<int32_t>>& sources,
                                 const std::vector<int64_t>& limits, const SearchOptions& options,
                                 Workspace& workspace, Parallel& parallel) {
  workspace.sources.encode(model, sources, workspace.positions, parallel);
  workspace.decoder.start(model, workspace.sources);
  std::vector<SentenceSearch> searches;
  searches.reserve(sources.size());
  for (const int64_t limit : limits) searches.emplace_back(limit, options);

  // So many that 2 * beam_size are left whatever may not be proposed.
  const int64_t candidates =
      2 * options.beam_size + static_cast<int64_t>(options.suppressed.size()) + 1;
  std::vector<Row> rows;
  for (;;) {
    rows.clear();
    for (size_t sentence = 0; sentence < searches.size(); ++sentence) {
      if (searches[sentence].stop() != Stop::none) continue;
      for (const Live& live : searches[sentence].live()) {
        rows.push_back({static_cast<int32_t>(sentence), live.row, searches[sentence].newest(live)});
      }
    }
    if (rows.empty()) break;
    const int64_t count = static_cast<int64_t>(rows.size());
    const float* const states = workspace.decoder.step(rows, workspace.positions, parallel);
    workspace.next.find(model, states, count, candidates, parallel);
    for (int64_t row = 0; row < count;) {
      SentenceSearch& search =
          searches[static_cast<size_t>(rows[static_cast<size_t>(row)].sentence)];
      const int64_t live = static_cast<int64_t>(search.live().size());
      search.advance(workspace.next, row);
      row += live;
    }
  }
  std::vector<SearchResult> results;
  results.reserve(searches.size());
  for (SentenceSearch& search : searches) results.push_back(search.result());
  return results;
}

std::vector<std::vector<double>> score(const Model& model,
                                       const std::vector<std::vector<int32_t>>& sources,
                                       const std::vector<std::vector<int32_t>>& targets,
                                       int32_t start_id, Workspace& workspace, Parallel& parallel) {
  for (const std::vector<int32_t>& target : targets) {
    for (const int32_t id : target) {
      if (id < 0 || id >= model.config().target_vocabulary) {
        throw std::invalid_argument("target ids: got " + std::to_string(id) + ", expected 0 to " +
                                    std::to_string(model.config().target_vocabulary - 1));
      }
    }
  }
  workspace.sources.encode(model, sources, workspace.positions, parallel);
  workspace.decoder.start(model, workspace.sources);
  std::vector<std::vector<double>> scores(targets.size());
  std::vector<int32_t> row_of(targets.size(), 0);
  std::vector<Row> rows;
  std::vector<int32_t> wanted;
  std::vector<double> log_probs;
  for (size_t position = 0;; ++position) {
    rows.clear();
    wanted.clear();
    for (size_t i = 0; i < targets.size(); ++i) {
      if (position >= targets[i].size()) continue;
      const int32_t fed = position == 0 ? start_id : targets[i][position - 1];
      const int32_t parent = row_of[i];
      row_of[i] = static_cast<int32_t>(rows.size());
      rows.push_back({static_cast<int32_t>(i), parent, fed});
      wanted.push_back(targets[i][position]);
    }
    if (rows.empty()) return scores;
    const int64_t count = static_cast<int64_t>(rows.size());
    log_probs.resize(rows.size());
    const float* const states = workspace.decoder.step(rows, workspace.positions, parallel);
    workspace.next.score(model, states, count, wanted.data(), log_probs.data(), parallel);
    for (size_t r = 0; r < rows.size(); ++r) {
      scores[static_cast<size_t>(rows[r].sentence)].push_back(log_probs[r]);
    }
  }
}

}  // namespace transformer_ext::engine
