#include "engine/token_rules.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "dropout/philox.h"

namespace transformer_ext::engine {

namespace {

constexpr double kImpossible = -std::numeric_limits<double>::infinity();

// How many candidates are sorted at first: a draw rarely needs more.
constexpr size_t kSortedAtFirst = 64;

void sort_unique(std::vector<int32_t>* ids) {
  std::sort(ids->begin(), ids->end());
  ids->erase(std::unique(ids->begin(), ids->end()), ids->end());
}

bool contains(const std::vector<int32_t>& ascending, int32_t id) {
  return !ascending.empty() && std::binary_search(ascending.begin(), ascending.end(), id);
}

bool is_better(const Candidate& a, const Candidate& b) {
  return a.adjusted != b.adjusted ? a.adjusted > b.adjusted : a.token < b.token;
}

}  // namespace

void TokenRules::find(const TokenOptions& options, const std::vector<int32_t>& tokens) {
  banned.clear();
  repeated.clear();
  if (options.repetition_penalty != 1.0) {
    repeated = tokens;
    sort_unique(&repeated);
  }
  const size_t n = static_cast<size_t>(options.no_repeat_ngram_size);
  if (n == 0 || tokens.size() < n) return;
  const auto context = tokens.end() - static_cast<std::ptrdiff_t>(n - 1);
  for (size_t begin = 0; begin + n <= tokens.size(); ++begin) {
    if (std::equal(context, tokens.end(), tokens.begin() + static_cast<std::ptrdiff_t>(begin))) {
      banned.push_back(tokens[begin + n - 1]);
    }
  }
  sort_unique(&banned);
}

int64_t TokenRules::needed(const TokenOptions& options, int64_t count) const {
  if (forced >= 0) return 1;
  return count + static_cast<int64_t>(options.suppressed.size() + banned.size() + repeated.size()) +
         1;
}

void find_candidates(const NextTokens& next, int64_t row, const TokenRules& rules,
                     const TokenOptions& options, int64_t count,
                     std::vector<Candidate>* candidates) {
  candidates->clear();
  if (rules.forced >= 0) {
    const double log_prob = next.wanted_log_prob(row);
    if (log_prob != kImpossible) candidates->push_back({rules.forced, log_prob, log_prob});
    return;
  }
  const auto consider = [&](int32_t token, double log_prob) {
    if (token == options.eos_id && !rules.may_end) return;
    if (contains(options.suppressed, token) || contains(rules.banned, token)) return;
    double adjusted = log_prob;
    if (contains(rules.repeated, token)) {
      // The softmax of scores of which some have changed is not taken again: it would be the same
      // shift for every token of the row.
      const double log_sum = options.penalty_on_logits ? next.log_sum(row) : 0.0;
      const double score = log_prob + log_sum;
      adjusted =
          (score > 0.0 ? score / options.repetition_penalty : score * options.repetition_penalty) -
          log_sum;
    }
    candidates->push_back({token, log_prob, adjusted});
  };
  if (!next.kept()) {
    for (int64_t rank = 0; rank < next.count(); ++rank) {
      const double log_prob = next.log_prob(row, rank);
      if (log_prob == kImpossible) break;
      consider(next.id(row, rank), log_prob);
    }
    return;
  }
  for (int64_t token = 0; token < next.vocabulary(); ++token) {
    const double log_prob = next.kept_log_prob(row, token);
    if (log_prob != kImpossible) consider(static_cast<int32_t>(token), log_prob);
  }
  if (static_cast<int64_t>(candidates->size()) > count) {
    std::nth_element(candidates->begin(), candidates->begin() + count, candidates->end(),
                     is_better);
    candidates->resize(static_cast<size_t>(count));
  }
}

Candidate draw(const NextTokens& next, int64_t row, const TokenRules& rules,
               const TokenOptions& options, double uniform, std::vector<Candidate>* candidates) {
  const int64_t limit = options.top_k > 0 ? options.top_k : next.vocabulary();
  find_candidates(next, row, rules, options, limit, candidates);
  if (candidates->empty()) return {-1, 0.0, 0.0};
  const auto begin = candidates->begin();
  size_t size = candidates->size();
  // Sorted as far as the sum over the first ones asks for.
  size_t sorted = 0;
  const auto sort_to = [&](size_t end) {
    end = std::min(end, size);
    if (end <= sorted) return;
    std::partial_sort(begin + static_cast<std::ptrdiff_t>(sorted),
                      begin + static_cast<std::ptrdiff_t>(end),
                      begin + static_cast<std::ptrdiff_t>(size), is_better);
    sorted = end;
  };
  sort_to(std::max(kSortedAtFirst, static_cast<size_t>(options.top_k)));
  if (options.top_k > 0) size = std::min(size, static_cast<size_t>(options.top_k));
  const double highest = (*candidates)[0].adjusted;
  const auto weight = [&](size_t i) {
    return std::exp(((*candidates)[i].adjusted - highest) / options.temperature);
  };
  // The first entry at which the sum of the weights has passed a bound; the sum so far goes to
  // *sum.
  const auto passes = [&](double bound, bool at, double* sum) {
    *sum = 0.0;
    for (size_t i = 0; i < size; ++i) {
      if (i == sorted) sort_to(8 * sorted);
      *sum += weight(i);
      if (at ? *sum >= bound : *sum > bound) return i;
    }
    return size - 1;
  };
  double total = 0.0;
  for (size_t i = 0; i < size; ++i) total += weight(i);
  if (options.top_p < 1.0) {
    double kept = 0.0;
    size = passes(options.top_p * total, true, &kept) + 1;
    total = kept;
  }
  double passed = 0.0;
  return (*candidates)[passes(uniform * total, false, &passed)];
}

double uniform_number(uint64_t seed, uint64_t sentence, uint32_t sample, uint32_t step) {
  const PhiloxWords words = philox4x32(
      {{step, sample, static_cast<uint32_t>(sentence), static_cast<uint32_t>(sentence >> 32)}},
      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint64_t bits = (static_cast<uint64_t>(words.word[0]) << 21) | (words.word[1] >> 11);
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace transformer_ext::engine
