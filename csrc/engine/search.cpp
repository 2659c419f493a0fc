#include "engine/search.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>

namespace transformer_ext::engine {

namespace {

// Where more candidates than this are asked for, picking them from the whole row is cheaper than
// keeping so long a list sorted.
constexpr int64_t kLongestList = 256;

// The least attention that the coverage penalty sees: a source token that was never looked at must
// not make a score infinite.
constexpr double kLeastCoverage = 1e-10;

// Given tokens that the decoder takes at once: more make its products no faster, and it needs
// memory for the activations of all. Fewer where an ensemble keeps the scores of the vocabulary for
// each.
constexpr int64_t kGivenTokens = 512;
constexpr int64_t kGivenTokensOfEnsemble = 64;

// A token of a hypothesis, and the one before it in the same pool (-1: none).
struct Node {
  int32_t token;
  int32_t parent;
  double log_prob;
  int64_t attention;  // where the step's attention begins
};

struct Live {
  int32_t node = -1;
  int32_t row = 0;               // in the decoder's last step, see Row::parent
  int32_t sample = 0;            // sampling: which of the sentence's
  double log_prob = 0.0;         // the model's
  double total = 0.0;            // what the search adds up
  std::vector<double> coverage;  // attention so far to each source token, if needed
};

// Tokens that are given, by sentence.
struct Given {
  std::vector<int32_t> fed;
  std::vector<int32_t> wanted;  // after each of them, if that is asked for
};

// The members of an ensemble (or the only model), step by step.
class Step {
 public:
  Step(const std::vector<Member>& members, const std::vector<std::vector<int32_t>>& sources,
       size_t sentences, Parallel& parallel, const BeforeStep& before_step)
      : members_(members), parallel_(parallel), before_step_(before_step) {
    for (const std::vector<int32_t>& source : sources) {
      longest_source_ = std::max(longest_source_, static_cast<int64_t>(source.size()));
    }
    for (const Member& member : members) {
      Workspace& workspace = member.workspace;
      if (!sources.empty()) {
        workspace.sources.encode(member.model, sources, workspace.positions, parallel);
      }
      workspace.decoder.start(member.model, sources.empty() ? nullptr : &workspace.sources,
                              static_cast<int64_t>(sentences), member.attention_layer);
    }
  }

  // See NextTokens::find.
  const NextTokens& find(const std::vector<Row>& rows, int64_t count, const int32_t* tokens,
                         bool keep) {
    if (before_step_) before_step_();
    sentences_.clear();
    for (const Row& row : rows) sentences_.push_back(row.sentence);
    for (const Member& member : members_) {
      Workspace& workspace = member.workspace;
      find(member, workspace.decoder.step(rows, workspace.positions, parallel_), count, tokens,
           keep);
    }
    return found(count, tokens, keep);
  }

  // Given tokens of all sentences, before the first step, some at a time. `found` is called with
  // the sentence of each row, and the scores of the tokens that are wanted after it; null where
  // these are not asked for.
  void feed(const std::vector<Given>& given,
            const std::function<void(const std::vector<int32_t>&, const NextTokens&)>& found) {
    const int64_t most =
        members_.size() > 1 && found != nullptr ? kGivenTokensOfEnsemble : kGivenTokens;
    std::vector<Span> spans;
    std::vector<int32_t> wanted;
    int64_t count = 0;
    const auto flush = [&] {
      if (spans.empty()) return;
      if (before_step_) before_step_();
      for (const Member& member : members_) {
        Workspace& workspace = member.workspace;
        const float* const states = workspace.decoder.extend(spans, workspace.positions, parallel_);
        if (found) find(member, states, 1, wanted.data(), false);
      }
      if (found) found(sentences_, this->found(1, wanted.data(), false));
      spans.clear();
      wanted.clear();
      sentences_.clear();
      count = 0;
    };
    sentences_.clear();
    for (size_t sentence = 0; sentence < given.size(); ++sentence) {
      const Given& tokens = given[sentence];
      for (size_t begin = 0; begin < tokens.fed.size();) {
        const size_t size = std::min(tokens.fed.size() - begin, static_cast<size_t>(most - count));
        spans.push_back({static_cast<int32_t>(sentence), tokens.fed.data() + begin,
                         static_cast<int64_t>(size)});
        sentences_.insert(sentences_.end(), size, static_cast<int32_t>(sentence));
        if (found) {
          const auto first = tokens.wanted.begin() + static_cast<std::ptrdiff_t>(begin);
          wanted.insert(wanted.end(), first, first + static_cast<std::ptrdiff_t>(size));
        }
        begin += size;
        count += static_cast<int64_t>(size);
        if (count == most) flush();
      }
    }
    flush();
  }

  // What a row attended to, over its source's tokens.
  const float* attention(int64_t row) const {
    return members_.size() == 1 ? members_[0].workspace.decoder.attention(row)
                                : attention_.data() + row * longest_source_;
  }

 private:
  // What a member makes of its states of the rows of sentences_.
  void find(const Member& member, const float* states, int64_t count, const int32_t* tokens,
            bool keep) {
    const bool alone = members_.size() == 1;
    member.workspace.next.find(member.model, states, static_cast<int64_t>(sentences_.size()),
                               alone ? count : 1, alone ? tokens : nullptr, !alone || keep,
                               parallel_);
  }

  // What all make of them.
  const NextTokens& found(int64_t count, const int32_t* tokens, bool keep) {
    if (members_.size() == 1) return members_[0].workspace.next;
    average_attention();
    std::vector<const NextTokens*> all;
    for (const Member& member : members_) all.push_back(&member.workspace.next);
    NextTokens& mean = members_[0].workspace.mean;
    mean.find_mean(all, count, tokens, keep, parallel_);
    return mean;
  }

  void average_attention() {
    if (members_[0].attention_layer < 0) return;
    const int64_t rows = static_cast<int64_t>(sentences_.size());
    attention_.assign(static_cast<size_t>(rows * longest_source_), 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      float* const sum = attention_.data() + r * longest_source_;
      const int64_t length =
          members_[0].workspace.sources.length(sentences_[static_cast<size_t>(r)]);
      for (const Member& member : members_) {
        const float* const row = member.workspace.decoder.attention(r);
        for (int64_t i = 0; i < length; ++i) sum[i] += row[i];
      }
      for (int64_t i = 0; i < length; ++i) sum[i] /= static_cast<float>(members_.size());
    }
  }

  const std::vector<Member>& members_;
  Parallel& parallel_;
  const BeforeStep& before_step_;
  int64_t longest_source_ = 0;
  std::vector<int32_t> sentences_;  // of the rows at hand
  std::vector<float> attention_;    // of an ensemble, [rows][longest_source_]
};

class SentenceSearch {
 public:
  SentenceSearch(int32_t number, const Request& request, const SearchOptions& options,
                 int64_t source_length)
      : request_(request), options_(options), source_length_(source_length) {
    Live first;
    first.row = number;
    if (options.coverage_penalty > 0.0) first.coverage.resize(static_cast<size_t>(source_length));
    live_.assign(static_cast<size_t>(options.sampling ? options.num_hypotheses : 1), first);
    for (size_t i = 0; i < live_.size(); ++i) live_[i].sample = static_cast<int32_t>(i);
    prepare();
  }

  Stop stop() const { return stop_; }
  const std::vector<Live>& live() const { return live_; }
  // What may follow each live hypothesis.
  const std::vector<TokenRules>& rules() const { return rules_; }
  int32_t newest(const Live& live) const {
    if (live.node >= 0) return nodes_[static_cast<size_t>(live.node)].token;
    return request_.prompt.empty() ? options_.start_id : request_.prompt.back();
  }

  // Of the next token of a live hypothesis.
  double uniform(const Live& live) const {
    return uniform_number(options_.seed, request_.number, static_cast<uint32_t>(live.sample),
                          static_cast<uint32_t>(steps_));
  }

  // One step; the live hypotheses are the decoder's rows first_row, first_row + 1, ..., and
  // candidates[row] may follow them (sampling: the one that was drawn, or none).
  void advance(const std::vector<std::vector<Candidate>>& candidates, const Step& step,
               int64_t first_row) {
    attention_begin_ = static_cast<int64_t>(attention_.size());
    attended_.clear();
    for (size_t i = 0; i < live_.size(); ++i) {
      live_[i].row = static_cast<int32_t>(first_row + static_cast<int64_t>(i));
      if (options_.return_attention) {
        const float* const row = step.attention(live_[i].row);
        attention_.insert(attention_.end(), row, row + source_length_);
      }
      if (options_.coverage_penalty > 0.0) attended_.push_back(step.attention(live_[i].row));
    }
    survivors_.clear();
    if (options_.sampling) {
      follow_samples(candidates);
    } else if (!follow_beam(candidates)) {
      stop_ = Stop::no_token;
      return;
    }
    std::swap(live_, survivors_);
    ++steps_;
    stop_ = options_.sampling ? reason_to_stop_sampling() : reason_to_stop();
    if (stop_ == Stop::none) prepare();
  }

  SearchResult result() {
    SearchResult result;
    result.stop = stop_;
    result.steps = steps_;
    if (stop_ == Stop::max_length || stop_ == Stop::no_token) {
      const End end = stop_ == Stop::max_length ? End::max_length : End::no_token;
      for (const Live& live : live_) finished_.push_back(hypothesis(live, nullptr, 0, end));
    }
    const bool ended_first = !options_.rank_unfinished;
    std::stable_sort(finished_.begin(), finished_.end(),
                     [&](const Hypothesis& a, const Hypothesis& b) {
                       const bool a_ended = a.end == End::eos;
                       const bool b_ended = b.end == End::eos;
                       if (ended_first && a_ended != b_ended) return a_ended;
                       return a.score > b.score;
                     });
    if (finished_.size() > static_cast<size_t>(options_.num_hypotheses)) {
      finished_.resize(static_cast<size_t>(options_.num_hypotheses));
    }
    result.hypotheses = std::move(finished_);
    return result;
  }

 private:
  struct Choice {
    const Candidate* candidate;
    double total;
    size_t live;
  };

  void prepare() {
    rules_.resize(live_.size());
    const bool forced = steps_ < static_cast<int64_t>(request_.prefix.size());
    const bool by_tokens =
        options_.tokens.no_repeat_ngram_size > 0 || options_.tokens.repetition_penalty != 1.0;
    for (size_t i = 0; i < live_.size(); ++i) {
      TokenRules& rules = rules_[i];
      rules.forced = forced ? request_.prefix[static_cast<size_t>(steps_)] : -1;
      rules.may_end = steps_ >= request_.minimum;
      if (by_tokens && !forced) {
        tokens_.clear();
        for (int32_t node = live_[i].node; node >= 0;) {
          tokens_.push_back(nodes_[static_cast<size_t>(node)].token);
          node = nodes_[static_cast<size_t>(node)].parent;
        }
        tokens_.insert(tokens_.end(), request_.prompt.rbegin(), request_.prompt.rend());
        std::reverse(tokens_.begin(), tokens_.end());
        rules.find(options_.tokens, tokens_);
      } else {
        rules.banned.clear();
        rules.repeated.clear();
      }
    }
  }

  // False where no token may follow any hypothesis.
  bool follow_beam(const std::vector<std::vector<Candidate>>& candidates) {
    choices_.clear();
    for (size_t i = 0; i < live_.size(); ++i) {
      for (const Candidate& candidate : candidates[static_cast<size_t>(live_[i].row)]) {
        choices_.push_back({&candidate, live_[i].total + candidate.adjusted, i});
      }
    }
    if (choices_.empty()) return false;
    const size_t considered =
        std::min(choices_.size(), static_cast<size_t>(2 * options_.beam_size));
    std::partial_sort(choices_.begin(), choices_.begin() + static_cast<std::ptrdiff_t>(considered),
                      choices_.end(), [](const Choice& a, const Choice& b) {
                        if (a.total != b.total) return a.total > b.total;
                        if (a.live != b.live) return a.live < b.live;
                        return a.candidate->token < b.candidate->token;
                      });
    const size_t beam_size = static_cast<size_t>(options_.beam_size);
    for (size_t rank = 0; rank < considered; ++rank) {
      const Choice& choice = choices_[rank];
      if (choice.candidate->token == options_.tokens.eos_id) {
        if (rank < beam_size) finish(choice.live, choice.candidate, End::eos);
      } else if (survivors_.size() < beam_size) {
        survive(choice.live, *choice.candidate);
      }
    }
    return true;
  }

  void follow_samples(const std::vector<std::vector<Candidate>>& candidates) {
    for (size_t i = 0; i < live_.size(); ++i) {
      const std::vector<Candidate>& drawn = candidates[static_cast<size_t>(live_[i].row)];
      if (drawn.empty()) {
        finish(i, nullptr, End::no_token);
      } else if (drawn[0].token == options_.tokens.eos_id) {
        finish(i, &drawn[0], End::eos);
      } else {
        survive(i, drawn[0]);
      }
    }
  }

  void finish(size_t live, const Candidate* end, End why) {
    finished_.push_back(hypothesis(live_[live], end, live, why));
  }

  void survive(size_t live, const Candidate& candidate) {
    const Live& from = live_[live];
    Live next = from;
    next.node = static_cast<int32_t>(nodes_.size());
    next.log_prob += candidate.log_prob;
    next.total += candidate.adjusted;
    if (!attended_.empty()) add_coverage(attended_[live], &next.coverage);
    nodes_.push_back({candidate.token, from.node, candidate.log_prob, attention_of(live)});
    survivors_.push_back(std::move(next));
  }

  int64_t attention_of(size_t live) const {
    return attention_begin_ + static_cast<int64_t>(live) * source_length_;
  }

  static void add_coverage(const float* attention, std::vector<double>* coverage) {
    for (size_t i = 0; i < coverage->size(); ++i) {
      (*coverage)[i] += static_cast<double>(attention[i]);
    }
  }

  // A live hypothesis as a result: ended by `end` in the step of number `index`, or as it is
  // (null).
  Hypothesis hypothesis(const Live& live, const Candidate* end, size_t index, End why) const {
    Hypothesis h;
    std::vector<int64_t> attention;
    for (int32_t i = live.node; i >= 0; i = nodes_[static_cast<size_t>(i)].parent) {
      const Node& node = nodes_[static_cast<size_t>(i)];
      h.tokens.push_back(node.token);
      h.token_scores.push_back(node.log_prob);
      attention.push_back(node.attention);
    }
    std::reverse(h.tokens.begin(), h.tokens.end());
    std::reverse(h.token_scores.begin(), h.token_scores.end());
    std::reverse(attention.begin(), attention.end());
    h.end = why;
    h.log_prob = live.log_prob;
    double total = live.total;
    std::vector<double> coverage = live.coverage;
    if (end != nullptr) {
      h.log_prob += end->log_prob;
      total += end->adjusted;
      h.token_scores.push_back(end->log_prob);
      attention.push_back(attention_of(index));
      if (!attended_.empty()) add_coverage(attended_[index], &coverage);
    }
    h.score =
        total / (end != nullptr ? options_.ended_penalty : options_.cut_penalty)[h.tokens.size()];
    if (options_.coverage_penalty > 0.0) {
      double sum = 0.0;
      for (const double c : coverage) sum += std::log(std::clamp(c, kLeastCoverage, 1.0));
      h.score += options_.coverage_penalty * sum;
    }
    if (options_.return_attention) {
      for (const int64_t begin : attention) {
        const auto row = attention_.begin() + static_cast<std::ptrdiff_t>(begin);
        h.attention.insert(h.attention.end(), row,
                           row + static_cast<std::ptrdiff_t>(source_length_));
      }
    }
    return h;
  }

  // The n-th best score of those that have ended; there must be so many.
  double ended_score(int64_t n) {
    scores_.clear();
    for (const Hypothesis& hypothesis : finished_) scores_.push_back(hypothesis.score);
    const auto at = scores_.begin() + static_cast<std::ptrdiff_t>(n - 1);
    std::nth_element(scores_.begin(), at, scores_.end(), std::greater<double>());
    return *at;
  }

  Stop reason_to_stop_sampling() const {
    if (live_.empty()) return Stop::sampled;
    return steps_ >= request_.limit ? Stop::max_length : Stop::none;
  }

  Stop reason_to_stop() {
    const int64_t ended = static_cast<int64_t>(finished_.size());
    if (options_.beam_size == 1 && ended > 0) return Stop::first;
    switch (options_.early_stopping) {
      case EarlyStopping::first:
        if (ended >= options_.num_hypotheses &&
            static_cast<double>(ended) >=
                options_.beam_patience * static_cast<double>(options_.beam_size)) {
          return Stop::first;
        }
        break;
      case EarlyStopping::heuristic:
        if (!live_.empty() && ended >= options_.beam_size &&
            live_[0].total / options_.cut_penalty[static_cast<size_t>(steps_)] <=
                ended_score(options_.beam_size)) {
          return Stop::heuristic;
        }
        break;
      case EarlyStopping::exact:
        // A total only falls from here on, a length penalty only grows with the length, and the
        // coverage penalty is never above 0: no descendant of the best live hypothesis can score
        // above this.
        if (!live_.empty() && ended >= options_.num_hypotheses &&
            live_[0].total / largest_penalty() <= ended_score(options_.num_hypotheses)) {
          return Stop::exact;
        }
        break;
    }
    if (live_.empty()) return Stop::exact;
    return steps_ >= request_.limit ? Stop::max_length : Stop::none;
  }

  double largest_penalty() const {
    const double largest = options_.ended_penalty[static_cast<size_t>(request_.limit - 1)];
    return options_.rank_unfinished
               ? std::max(largest, options_.cut_penalty[static_cast<size_t>(request_.limit)])
               : largest;
  }

  const Request& request_;
  const SearchOptions& options_;
  const int64_t source_length_;
  int64_t steps_ = 0;
  Stop stop_ = Stop::none;
  std::vector<Node> nodes_;
  std::vector<Live> live_;
  std::vector<Live> survivors_;
  std::vector<TokenRules> rules_;
  std::vector<Hypothesis> finished_;
  std::vector<float> attention_;  // rows of source_length_, one for each live one of each step
  int64_t attention_begin_ = 0;   // of the last step
  std::vector<const float*> attended_;  // of the last step, where coverage is needed
  std::vector<Choice> choices_;
  std::vector<int32_t> tokens_;
  std::vector<double> scores_;
};

void check_ids(const char* name, const std::vector<int32_t>& ids, int64_t vocabulary) {
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocabulary) {
      throw std::invalid_argument(std::string(name) + ": got " + std::to_string(id) +
                                  ", expected 0 to " + std::to_string(vocabulary - 1));
    }
  }
}

}  // namespace

std::vector<SearchResult> search(const std::vector<Member>& members,
                                 const std::vector<std::vector<int32_t>>& sources,
                                 const std::vector<Request>& requests, const SearchOptions& options,
                                 Parallel& parallel, const BeforeStep& before_step) {
  const int64_t vocabulary = members[0].model.config().target_vocabulary;
  check_ids("suppressed_tokens", options.tokens.suppressed, vocabulary);
  for (const Request& request : requests) {
    check_ids("prompt ids", request.prompt, vocabulary);
    check_ids("prefix ids", request.prefix, vocabulary);
  }
  Step step(members, sources, requests.size(), parallel, before_step);
  std::vector<SentenceSearch> searches;
  searches.reserve(requests.size());
  // What is fed before the token whose successor is the first of the output.
  std::vector<Given> given(requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    const int64_t source_length = sources.empty() ? 0 : static_cast<int64_t>(sources[i].size());
    searches.emplace_back(static_cast<int32_t>(i), requests[i], options, source_length);
    std::vector<int32_t>& fed = given[i].fed;
    if (options.start_id >= 0) fed.push_back(options.start_id);
    fed.insert(fed.end(), requests[i].prompt.begin(), requests[i].prompt.end());
    fed.pop_back();
  }
  step.feed(given, nullptr);

  const TokenOptions& token_options = options.tokens;
  // Of a row, in a beam: whatever the other rows have, no more than so many can survive or end.
  const int64_t wanted = options.sampling
                             ? (token_options.top_k > 0 ? token_options.top_k : vocabulary)
                             : 2 * options.beam_size;
  std::vector<Row> rows;
  std::vector<const TokenRules*> rules;
  std::vector<double> uniform;
  std::vector<int32_t> forced;
  std::vector<std::vector<Candidate>> candidates;
  for (;;) {
    rows.clear();
    rules.clear();
    forced.clear();
    uniform.clear();
    int64_t needed = 1;
    bool any_forced = false;
    for (size_t sentence = 0; sentence < searches.size(); ++sentence) {
      const SentenceSearch& search = searches[sentence];
      if (search.stop() != Stop::none) continue;
      for (size_t i = 0; i < search.live().size(); ++i) {
        const Live& live = search.live()[i];
        rows.push_back({static_cast<int32_t>(sentence), live.row, search.newest(live)});
        rules.push_back(&search.rules()[i]);
        forced.push_back(rules.back()->forced);
        any_forced = any_forced || forced.back() >= 0;
        needed = std::max(needed, rules.back()->needed(token_options, wanted));
        if (options.sampling) uniform.push_back(search.uniform(live));
      }
    }
    if (rows.empty()) break;
    const int64_t count = static_cast<int64_t>(rows.size());
    const bool keep = needed > kLongestList;
    const NextTokens& next =
        step.find(rows, keep ? 1 : needed, any_forced ? forced.data() : nullptr, keep);

    if (candidates.size() < rows.size()) candidates.resize(rows.size());
    const auto choose = [&](int64_t row) {
      const size_t r = static_cast<size_t>(row);
      if (options.sampling && forced[r] < 0) {
        const Candidate drawn =
            draw(next, row, *rules[r], token_options, uniform[r], &candidates[r]);
        candidates[r].clear();
        if (drawn.token >= 0) candidates[r].push_back(drawn);
      } else {
        find_candidates(next, row, *rules[r], token_options, wanted, &candidates[r]);
      }
    };
    if (keep) {
      parallel.for_each(count, choose);
    } else {
      for (int64_t row = 0; row < count; ++row) choose(row);
    }
    for (int64_t row = 0; row < count;) {
      SentenceSearch& search =
          searches[static_cast<size_t>(rows[static_cast<size_t>(row)].sentence)];
      const int64_t live = static_cast<int64_t>(search.live().size());
      search.advance(candidates, step, row);
      row += live;
    }
  }
  std::vector<SearchResult> results;
  results.reserve(searches.size());
  for (SentenceSearch& search : searches) results.push_back(search.result());
  return results;
}

std::vector<TargetScores> score(const std::vector<Member>& members,
                                const std::vector<std::vector<int32_t>>& sources,
                                const std::vector<std::vector<int32_t>>& targets, int32_t start_id,
                                Parallel& parallel, const BeforeStep& before_step) {
  for (const std::vector<int32_t>& target : targets) {
    check_ids("target ids", target, members[0].model.config().target_vocabulary);
  }
  Step step(members, sources, targets.size(), parallel, before_step);
  std::vector<Given> given(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    const std::vector<int32_t>& target = targets[i];
    if (target.empty()) continue;
    std::vector<int32_t>& fed = given[i].fed;
    if (start_id >= 0) fed.push_back(start_id);
    fed.insert(fed.end(), target.begin(), target.end() - 1);
    given[i].wanted.assign(start_id >= 0 ? target.begin() : target.begin() + 1, target.end());
  }
  std::vector<TargetScores> scores(targets.size());
  step.feed(given, [&](const std::vector<int32_t>& sentences, const NextTokens& next) {
    for (size_t r = 0; r < sentences.size(); ++r) {
      const size_t sentence = static_cast<size_t>(sentences[r]);
      const int64_t row = static_cast<int64_t>(r);
      scores[sentence].log_probs.push_back(next.wanted_log_prob(row));
      if (members[0].attention_layer >= 0) {
        const float* const attention = step.attention(row);
        scores[sentence].attention.insert(scores[sentence].attention.end(), attention,
                                          attention + sources[sentence].size());
      }
    }
  });
  return scores;
}

}  // namespace transformer_ext::engine
