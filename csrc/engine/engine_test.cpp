#include "engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/cached_attention.h"
#include "engine/top_scores.h"

namespace transformer_ext::engine {
namespace {

std::vector<float> random(size_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(n);
  for (float& value : values) value = normal(generator);
  return values;
}

// Rows of one sentence with a cache each for its own positions. What the kernel must not read is
// NaN.
struct CacheProblem {
  int64_t heads, kv_heads, head_dim, rows, length, shared;
  bool bfloat16;
  std::vector<float> query;                // [rows][heads, head_dim]
  std::vector<std::vector<float>> exact;   // of each pointer: key, value
  std::vector<std::vector<char>> memory;   // as the kernel reads it
  std::vector<const void*> paths;          // [rows][length]
  std::vector<std::vector<float>> stored;  // what of `exact` is in memory

  CacheProblem(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rows, int64_t length,
               int64_t shared, bool bfloat16)
      : heads(heads),
        kv_heads(kv_heads),
        head_dim(head_dim),
        rows(rows),
        length(length),
        shared(shared),
        bfloat16(bfloat16),
        query(random(static_cast<size_t>(rows * heads * head_dim), 1)) {
    paths.resize(static_cast<size_t>(rows * length));
    const int64_t size = 2 * kv_heads * head_dim;
    const size_t bytes = bfloat16 ? 2 : 4;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < length; ++i) {
        const void*& path = paths[static_cast<size_t>(row * length + i)];
        if (row > 0 && i < shared) {
          path = paths[static_cast<size_t>(i)];
          continue;
        }
        exact.push_back(random(static_cast<size_t>(size), static_cast<uint32_t>(2 + exact.size())));
        std::vector<char>& cell = memory.emplace_back((static_cast<size_t>(size) + 40) * bytes,
                                                      '\xff');  // NaN in both types
        char* const begin = cell.data() + 3 * bytes;
        cached_attention_kernels().store(exact.back().data(), size, bfloat16, begin);
        path = begin;
        std::vector<float>& values = stored.emplace_back();
        for (int64_t e = 0; e < size; ++e) {
          values.push_back(bfloat16 ? to_float(reinterpret_cast<const struct bfloat16*>(begin)[e])
                                    : reinterpret_cast<const float*>(begin)[e]);
        }
      }
    }
  }

  const std::vector<float>& at(const std::vector<std::vector<float>>& values, int64_t row,
                               int64_t i) const {
    if (i < shared) return values[static_cast<size_t>(i)];
    return values[static_cast<size_t>(
        row == 0 ? i : length + (row - 1) * (length - shared) + i - shared)];
  }

  // Attends from rows [begin, end) in one call; outputs with a gap between rows.
  void attend(int64_t begin, int64_t end, std::vector<float>* out, std::vector<float>* weights,
              bool in_parts = false) const {
    const int64_t width = heads * head_dim;
    out->assign(static_cast<size_t>((end - begin) * (width + 3)), NAN);
    weights->assign(static_cast<size_t>((end - begin) * (length + 2)), 0.0f);
    CachedAttention a{};
    a.query = query.data() + begin * width;
    a.query_stride = width;
    a.out = out->data();
    a.out_stride = width + 3;
    a.rows = end - begin;
    a.paths = paths.data() + begin * length;
    a.path_stride = length;
    a.shared = shared;
    a.length = length;
    a.value_offset = kv_heads * head_dim;
    a.bfloat16 = bfloat16;
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.head_dim = head_dim;
    a.kv_end = kv_heads;
    a.scale = 0.3f;
    a.weights = weights->data();
    a.weights_stride = length + 2;
    if (in_parts) {
      for (a.kv_begin = 0; a.kv_begin < kv_heads; ++a.kv_begin) {
        a.kv_end = a.kv_begin + 1;
        cached_attention_kernels().attend(a);
      }
    } else {
      cached_attention_kernels().attend(a);
    }
  }

  // The definition; each step's result rounded to bfloat16 if `rounded`.
  void define(const std::vector<std::vector<float>>& values, int64_t row, bool rounded,
              std::vector<double>* out, std::vector<double>* average) const {
    const auto in = [&](double x) {
      return rounded ? static_cast<double>(to_float(to_bfloat16(static_cast<float>(x)))) : x;
    };
    out->clear();
    average->assign(static_cast<size_t>(length), 0.0);
    for (int64_t h = 0; h < heads; ++h) {
      const float* const q = query.data() + (row * heads + h) * head_dim;
      const size_t key = static_cast<size_t>(h / (heads / kv_heads) * head_dim);
      const size_t value = key + static_cast<size_t>(kv_heads * head_dim);
      std::vector<double> weights;
      double sum = 0.0;
      for (int64_t i = 0; i < length; ++i) {
        double dot = 0.0;
        for (int64_t d = 0; d < head_dim; ++d) {
          dot += in(q[d]) * in(at(values, row, i)[key + static_cast<size_t>(d)]);
        }
        weights.push_back(std::exp(in(0.3 * in(dot))));
        sum += weights.back();
      }
      for (int64_t i = 0; i < length; ++i) {
        weights[static_cast<size_t>(i)] = in(weights[static_cast<size_t>(i)] / sum);
        (*average)[static_cast<size_t>(i)] +=
            weights[static_cast<size_t>(i)] / static_cast<double>(heads);
      }
      for (int64_t d = 0; d < head_dim; ++d) {
        double total = 0.0;
        for (int64_t i = 0; i < length; ++i) {
          total += weights[static_cast<size_t>(i)] *
                   in(at(values, row, i)[value + static_cast<size_t>(d)]);
        }
        out->push_back(in(total));
      }
    }
  }
};

// In float64 on what the cache holds, for head sizes that leave every kind of rest.
TEST(CachedAttention, EqualsTheDefinition) {
  for (const bool bfloat16 : {false, true}) {
    for (const int64_t head_dim : {1, 5, 16, 33, 40, 64, 80}) {
      for (const int64_t length : {1, 2, 15, 16, 33}) {
        for (const int64_t rows : {1, 4, 7}) {
          const CacheProblem problem(4, 2, head_dim, rows, length, length / 2, bfloat16);
          std::vector<float> out, weights;
          problem.attend(0, rows, &out, &weights);
          for (int64_t row = 0; row < rows; ++row) {
            std::vector<double> expected, average;
            problem.define(problem.stored, row, false, &expected, &average);
            for (size_t i = 0; i < expected.size(); ++i) {
              ASSERT_NEAR(out[static_cast<size_t>(row * (4 * head_dim + 3)) + i], expected[i],
                          2e-5);
            }
            for (size_t i = 0; i < average.size(); ++i) {
              ASSERT_NEAR(weights[static_cast<size_t>(row * (length + 2)) + i], average[i], 1e-6);
            }
          }
        }
      }
    }
  }
}

// The cache alone rounds: at most as far from the definition as bfloat16 all through.
TEST(CachedAttention, IsMoreExactThanBfloat16Throughout) {
  const CacheProblem problem(4, 4, 64, 3, 30, 20, true);
  std::vector<float> out, weights;
  problem.attend(0, 3, &out, &weights);
  double error = 0.0, allowed = 0.0;
  for (int64_t row = 0; row < 3; ++row) {
    std::vector<double> expected, rounded, average;
    problem.define(problem.exact, row, false, &expected, &average);
    problem.define(problem.exact, row, true, &rounded, &average);
    for (size_t i = 0; i < expected.size(); ++i) {
      error += std::pow(out[static_cast<size_t>(row * 259) + i] - expected[i], 2);
      allowed += std::pow(rounded[i] - expected[i], 2);
    }
  }
  EXPECT_LT(error, allowed);
  EXPECT_GT(error, 0.0);
}

TEST(CachedAttention, ARowIsTheSameAloneAndBesideOthers) {
  for (const bool bfloat16 : {false, true}) {
    for (const int64_t kv_heads : {1, 3}) {
      for (const int64_t head_dim : {33, 64}) {
        for (const int64_t shared : {0, 3, 16, 21}) {
          for (const int64_t rows : {2, 3, 5, 8}) {
            const CacheProblem problem(3, kv_heads, head_dim, rows, 21, shared, bfloat16);
            std::vector<float> out, weights, alone, weights_alone;
            problem.attend(0, rows, &out, &weights);
            problem.attend(0, rows, &alone, &weights_alone, true);
            for (int64_t row = 0; row < rows; ++row) {
              ASSERT_TRUE(std::equal(alone.begin() + row * (3 * head_dim + 3),
                                     alone.begin() + (row + 1) * (3 * head_dim + 3) - 3,
                                     out.begin() + row * (3 * head_dim + 3)));
            }
            for (int64_t row = 0; row < rows; ++row) {
              problem.attend(row, row + 1, &alone, &weights_alone);
              ASSERT_TRUE(std::equal(alone.begin(), alone.end() - 3,
                                     out.begin() + row * (3 * head_dim + 3)));
              ASSERT_TRUE(std::equal(weights_alone.begin(), weights_alone.end(),
                                     weights.begin() + row * 23));
            }
          }
        }
      }
    }
  }
}

TEST(TopScores, FindsTheHighestAndTheSum) {
  for (const size_t n : {1, 3, 17, 64, 200, 1000}) {
    std::vector<float> scores = random(n, 3, 4.0f);
    // Ties, which go to the lower id.
    for (size_t i = 0; i + 7 < n; i += 5) scores[i + 7] = scores[i];
    constexpr int32_t kCapacity = 9;
    std::vector<float> top_scores(kCapacity);
    std::vector<int32_t> ids(kCapacity);
    TopScores top{-INFINITY, 0.0f, 0, kCapacity, top_scores.data(), ids.data(), -INFINITY};
    const size_t half = n / 3;
    top_scores_kernels().scan(scores.data(), static_cast<int64_t>(half), 0, &top);
    top_scores_kernels().scan(scores.data() + half, static_cast<int64_t>(n - half),
                              static_cast<int32_t>(half), &top);
    std::vector<int32_t> order(n);
    for (size_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
    });
    ASSERT_EQ(top.count, static_cast<int32_t>(std::min<size_t>(n, kCapacity)));
    for (int32_t i = 0; i < top.count; ++i) {
      EXPECT_EQ(ids[static_cast<size_t>(i)], order[static_cast<size_t>(i)]);
    }
    double sum = 0.0;
    for (const float score : scores) sum += std::exp(static_cast<double>(score));
    EXPECT_NEAR(std::log(static_cast<double>(top.sum)) + static_cast<double>(top.maximum),
                std::log(sum), 1e-5);
  }
}

// The floor is inclusive, equal scores go to the lower id, and neither depends on how many entries
// are wanted beside how many lanes there are.
TEST(TopScores, LeavesOutWhatIsBelowTheFloor) {
  std::vector<float> scores(300, 0.0f);
  for (size_t i = 0; i < scores.size(); i += 7) scores[i] = static_cast<float>(i % 5);
  for (const int32_t capacity : {1, 2, 8, 40}) {
    for (const float floor : {-1.0f, 0.0f, 3.0f, 4.0f, 5.0f}) {
      std::vector<int32_t> expected;
      for (int32_t i = 0; i < 300; ++i) {
        if (scores[static_cast<size_t>(i)] >= floor) expected.push_back(i);
      }
      std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) {
        return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
      });
      if (expected.size() > static_cast<size_t>(capacity)) {
        expected.resize(static_cast<size_t>(capacity));
      }
      std::vector<float> top_scores(static_cast<size_t>(capacity));
      std::vector<int32_t> ids(static_cast<size_t>(capacity));
      TopScores top{-INFINITY, 0.0f, 0, capacity, top_scores.data(), ids.data(), floor};
      top_scores_kernels().scan(scores.data(), 211, 0, &top);
      top_scores_kernels().scan(scores.data() + 211, 89, 211, &top);
      ids.resize(static_cast<size_t>(top.count));
      EXPECT_EQ(ids, expected) << capacity << " above " << floor;
    }
  }
}

TEST(TopScores, KeepsNaNInTheSumAndLeavesOutMinusInfinity) {
  const std::vector<float> scores = {-INFINITY, 1.0f, -INFINITY, 0.0f};
  std::vector<float> top_scores(4);
  std::vector<int32_t> ids(4);
  TopScores top{-INFINITY, 0.0f, 0, 4, top_scores.data(), ids.data(), -INFINITY};
  top_scores_kernels().scan(scores.data(), 1, 0, &top);
  EXPECT_EQ(top.count, 0);
  top_scores_kernels().scan(scores.data() + 1, 3, 1, &top);
  EXPECT_EQ(top.count, 2);
  EXPECT_NEAR(top.sum, 1.0f + std::exp(-1.0f), 1e-6f);
  const float nan = NAN;
  top_scores_kernels().scan(&nan, 1, 4, &top);
  EXPECT_TRUE(std::isnan(top.sum));
}

// A small model with random weights, kept alive beside the views of them.
struct TestModel {
  ModelConfig config;
  std::vector<std::vector<float>> memory;
  std::map<std::string, Array> arrays;

  Array operator()(const std::string& name) const {
    const auto found = arrays.find(name);
    return found == arrays.end() ? Array() : found->second;
  }
  void add(const std::string& name, const std::vector<int64_t>& shape, float scale) {
    size_t size = 1;
    for (const int64_t n : shape) size *= static_cast<size_t>(n);
    memory.push_back(random(size, static_cast<uint32_t>(memory.size()), scale));
    arrays[name] = {memory.back().data(), shape};
  }
  void linear(const std::string& name, int64_t rows, int64_t columns) {
    add(name + ".weight", {rows, columns}, 1.0f / std::sqrt(static_cast<float>(columns)));
    add(name + ".bias", {rows}, 0.1f);
  }
  void norm(const std::string& name) {
    add(name + ".weight", {config.width}, 1.0f);
    add(name + ".bias", {config.width}, 0.1f);
  }

  TestModel() {
    config.source_vocabulary = 50;
    config.target_vocabulary = 600;
    config.width = 32;
    config.heads = 4;
    config.kv_heads = 2;
    config.head_dim = 8;
    config.encoder_layers = 1;
    config.decoder_layers = 2;
    config.inner = 40;
    config.tie = Tying::target;
    const int64_t kv = config.kv_width();
    add("source_embedding.weight", {50, 32}, 1.0f);
    add("target_embedding.weight", {600, 32}, 1.0f);
    for (const char* name : {"encoder.layers.0", "decoder.layers.0", "decoder.layers.1"}) {
      const std::string layer = name;
      linear(layer + ".self_attention.in_projection", 32 + 2 * kv, 32);
      linear(layer + ".self_attention.out_projection", 32, 32);
      norm(layer + ".self_attention_norm");
      linear(layer + ".feed_forward.in_projection", 40, 32);
      linear(layer + ".feed_forward.out_projection", 32, 40);
      norm(layer + ".feed_forward_norm");
      if (layer[0] == 'e') continue;
      linear(layer + ".cross_attention.query_projection", 32, 32);
      linear(layer + ".cross_attention.key_value_projection", 2 * kv, 32);
      linear(layer + ".cross_attention.out_projection", 32, 32);
      norm(layer + ".cross_attention_norm");
    }
  }
};

SearchOptions options(int64_t limit) {
  SearchOptions options;
  options.num_hypotheses = 3;
  options.start_id = 2;
  options.tokens.eos_id = 3;
  options.tokens.suppressed = {0, 2};
  for (int64_t n = 0; n <= limit; ++n) {
    options.ended_penalty.push_back(std::pow((6.0 + static_cast<double>(n)) / 6.0, 0.6));
    options.cut_penalty.push_back(std::pow((5.0 + static_cast<double>(n)) / 6.0, 0.6));
  }
  return options;
}

void expect_equal(const SearchResult& a, const SearchResult& b) {
  ASSERT_EQ(a.hypotheses.size(), b.hypotheses.size());
  for (size_t i = 0; i < a.hypotheses.size(); ++i) {
    EXPECT_EQ(a.hypotheses[i].tokens, b.hypotheses[i].tokens);
    EXPECT_EQ(a.hypotheses[i].token_scores, b.hypotheses[i].token_scores);
    EXPECT_EQ(a.hypotheses[i].score, b.hypotheses[i].score);
    EXPECT_EQ(a.hypotheses[i].end, b.hypotheses[i].end);
    EXPECT_EQ(a.hypotheses[i].attention, b.hypotheses[i].attention);
  }
}

const std::vector<std::vector<int32_t>> kSources = {
    {5, 9, 11, 3}, {7, 3}, {20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 3}, {8, 8, 8, 8, 3}};
const std::vector<int64_t> kLimits = {12, 5, 16, 1};

Request request(int64_t limit, uint64_t number = 0) { return {{}, limit, 0, number}; }

std::vector<Request> requests() {
  std::vector<Request> all;
  for (size_t i = 0; i < kLimits.size(); ++i) all.push_back(request(kLimits[i], i));
  return all;
}

// With the attention of the last layer, where the options need one.
Ensemble ensemble(const SearchOptions& options, std::vector<Engine*> others) {
  Ensemble ensemble{std::move(others), {}};
  if (options.return_attention || options.coverage_penalty > 0.0) {
    ensemble.attention_layers.assign(ensemble.others.size() + 1, 1);
  }
  return ensemble;
}

void expect_the_same_in_any_batch_for_any_threads(GemmType type) {
  TestModel model;
  model.config.compute = type;
  Engine one(model.config, model, 1);
  Engine four(model.config, model, 4);
  SearchOptions rules = options(16);
  rules.tokens.no_repeat_ngram_size = 2;
  rules.tokens.repetition_penalty = 1.3;
  rules.coverage_penalty = 0.2;
  rules.return_attention = true;
  SearchOptions sampling = options(16);
  sampling.sampling = true;
  sampling.seed = 3;
  SearchOptions nucleus = sampling;
  nucleus.tokens.top_k = 300;
  nucleus.tokens.top_p = 0.9;
  for (const SearchOptions& each : {options(16), rules, sampling, nucleus}) {
    const auto together = four.search(kSources, requests(), each, ensemble(each, {}));
    for (size_t i = 0; i < kSources.size(); ++i) {
      const auto alone =
          one.search({kSources[i]}, {request(kLimits[i], i)}, each, ensemble(each, {}));
      expect_equal(alone[0], together[i]);
      ASSERT_EQ(alone[0].hypotheses.size(), 3u);
      EXPECT_LE(alone[0].steps, kLimits[i]);
    }
  }
}

TEST(Engine, GivesEachSentenceTheSameInAnyBatchForAnyThreads) {
  expect_the_same_in_any_batch_for_any_threads(GemmType::float32);
}

TEST(Engine, GivesEachSentenceTheSameInLowerPrecision) {
  for (const GemmType type : {GemmType::bfloat16, GemmType::int8}) {
    if (gemm_has(type)) expect_the_same_in_any_batch_for_any_threads(type);
  }
}

TEST(Engine, EnsembleIsTheMeanOfTheProbabilities) {
  const TestModel model;
  TestModel other;
  for (float& value : other.memory[1]) value *= 0.7f;
  Engine first(model.config, model, 2);
  Engine second(other.config, other, 1);
  const std::vector<std::vector<int32_t>> target = {{40, 7, 599, 3}};
  const auto mine = first.score({kSources[0]}, target, 2)[0].log_probs;
  const auto theirs = second.score({kSources[0]}, target, 2)[0].log_probs;
  const auto mean = first.score({kSources[0]}, target, 2, {{&second}, {}})[0].log_probs;
  for (size_t i = 0; i < mean.size(); ++i) {
    EXPECT_NEAR(mean[i], std::log((std::exp(mine[i]) + std::exp(theirs[i])) / 2.0), 1e-5);
  }
  // Alone and in a batch.
  SearchOptions attending = options(16);
  attending.return_attention = true;
  for (const SearchOptions& each : {options(16), attending}) {
    const Ensemble both = ensemble(each, {&second});
    const auto together = first.search(kSources, requests(), each, both);
    for (size_t i = 0; i < kSources.size(); ++i) {
      expect_equal(first.search({kSources[i]}, {request(kLimits[i], i)}, each, both)[0],
                   together[i]);
    }
  }
  // Twice the same model is that model.
  const auto alone = first.search(kSources, requests(), options(16));
  const auto twice = first.search(kSources, requests(), options(16), {{&first}, {}});
  for (size_t i = 0; i < alone.size(); ++i) {
    EXPECT_EQ(alone[i].hypotheses[0].tokens, twice[i].hypotheses[0].tokens);
    EXPECT_NEAR(alone[i].hypotheses[0].score, twice[i].hypotheses[0].score, 1e-4);
  }
}

TEST(Engine, TakesAPrefixAsItIs) {
  const TestModel model;
  Engine engine(model.config, model, 1);
  const Request wanted{{7, 2, 7}, 9, 0, 0};
  const auto results = engine.search({kSources[0], kSources[1]}, {wanted, request(5)}, options(16));
  for (const Hypothesis& hypothesis : results[0].hypotheses) {
    ASSERT_GE(hypothesis.tokens.size(), 3u);
    EXPECT_EQ(hypothesis.tokens[0], 7);
    EXPECT_EQ(hypothesis.tokens[1], 2);
    EXPECT_EQ(hypothesis.tokens[2], 7);
  }
  expect_equal(results[1], engine.search({kSources[1]}, {request(5)}, options(16))[0]);
}

TEST(TokenRules, BansWhatWouldRepeat) {
  TokenOptions options;
  options.no_repeat_ngram_size = 2;
  options.repetition_penalty = 1.5;
  TokenRules rules;
  rules.find(options, {4, 5, 4, 6, 4});
  EXPECT_EQ(rules.banned, (std::vector<int32_t>{5, 6}));
  EXPECT_EQ(rules.repeated, (std::vector<int32_t>{4, 5, 6}));
  EXPECT_EQ(rules.needed(options, 8), 14);
  options.no_repeat_ngram_size = 1;
  rules.find(options, {9, 8, 9});
  EXPECT_EQ(rules.banned, (std::vector<int32_t>{8, 9}));
  options.no_repeat_ngram_size = 4;
  rules.find(options, {9, 8, 9});
  EXPECT_TRUE(rules.banned.empty());
}

TEST(UniformNumber, IsThatOfPython) {
  // transformer_ext.inference.search.uniform_number of the same arguments.
  EXPECT_EQ(uniform_number(0, 0, 0, 0), 0x1.7dbedc243624ep-2);
  EXPECT_EQ(uniform_number((1ULL << 40) + 5, (1ULL << 33) + 7, 3, 11), 0x1.8008c390706f8p-3);
}

TEST(Engine, ScoresAreThoseOfTheSearch) {
  const TestModel model;
  Engine engine(model.config, model, 2);
  const auto results = engine.search(kSources, requests(), options(16));
  for (size_t i = 0; i < kSources.size(); ++i) {
    for (const Hypothesis& hypothesis : results[i].hypotheses) {
      std::vector<int32_t> target = hypothesis.tokens;
      if (hypothesis.end == End::eos) target.push_back(3);
      EXPECT_EQ(engine.score({kSources[i]}, {target}, 2)[0].log_probs, hypothesis.token_scores);
    }
  }
}

TEST(Engine, TeamsOfThreadsFindWhatOneThreadFinds) {
  const TestModel model;
  std::vector<std::vector<int32_t>> sources;
  std::vector<Request> asked;
  for (size_t i = 0; i < 110; ++i) {
    sources.push_back(kSources[i % kSources.size()]);
    asked.push_back(request(3 + static_cast<int64_t>(i % 4), i));
  }
  SearchOptions beam = options(16);
  beam.beam_size = 4;
  SearchOptions sampled = beam;
  sampled.sampling = true;
  sampled.num_hypotheses = 4;
  Engine one(model.config, model, 1);
  for (const SearchOptions& each : {beam, sampled}) {
    EXPECT_EQ(one.team_count(sources.size(), each), 1);
    const auto expected = one.search(sources, asked, each);
    for (const int threads : {2, 3, 5}) {
      Engine several(model.config, model, threads);
      ASSERT_EQ(several.team_count(sources.size(), each), std::min(threads, 3));
      EXPECT_EQ(several.team_count(2, each), 1);
      const auto found = several.search(sources, asked, each);
      ASSERT_EQ(found.size(), expected.size());
      for (size_t i = 0; i < found.size(); ++i) expect_equal(found[i], expected[i]);
      // An error in one team is the call's, and the next call is served.
      auto broken = sources;
      broken.back() = {9999};
      EXPECT_THROW(several.search(broken, asked, each), std::invalid_argument);
      expect_equal(several.search(sources, asked, each)[7], expected[7]);
    }
  }
}

TEST(Engine, ACallIsEndedBeforeAStep) {
  const TestModel model;
  Engine engine(model.config, model, 3);
  const SearchOptions beam = options(16);
  for (const size_t copies : {1, 100}) {  // alone, and in teams
    std::vector<std::vector<int32_t>> sources;
    std::vector<Request> asked;
    for (size_t i = 0; i < copies; ++i) {
      sources.push_back(kSources[0]);
      asked.push_back(request(16, i));
    }
    int steps = 0;
    Ensemble ended;
    ended.before_step = [&] {
      if (++steps == 3) throw std::runtime_error("ended");
    };
    EXPECT_THROW(engine.search(sources, asked, beam, ended), std::runtime_error);
    EXPECT_EQ(steps, 3);
    EXPECT_EQ(engine.search(sources, asked, beam).size(), copies);
  }
}

TEST(Engine, ServesSeveralThreads) {
  const TestModel model;
  Engine engine(model.config, model, 2);
  SearchOptions sampled = options(16);
  sampled.sampling = true;
  const std::vector<SearchOptions> asked = {options(16), sampled};
  std::vector<std::vector<SearchResult>> expected;
  for (const SearchOptions& each : asked) {
    expected.push_back(engine.search(kSources, requests(), each));
  }
  const auto scores = engine.score(kSources, kSources, 2);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t round = t; round < t + 9; ++round) {
        if (round % 3 == 2) {
          const auto found = engine.score(kSources, kSources, 2);
          for (size_t i = 0; i < found.size(); ++i) {
            EXPECT_EQ(found[i].log_probs, scores[i].log_probs);
          }
        } else {
          const auto results = engine.search(kSources, requests(), asked[round % 3]);
          for (size_t i = 0; i < results.size(); ++i) {
            expect_equal(results[i], expected[round % 3][i]);
          }
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(Engine, RefusesWhatDoesNotFit) {
  TestModel model;
  Engine engine(model.config, model, 1);
  EXPECT_THROW(engine.search({{}}, {request(5)}, options(16)), std::invalid_argument);
  EXPECT_THROW(engine.search({{50}}, {request(5)}, options(16)), std::invalid_argument);
  EXPECT_THROW(engine.search({{5}}, {request(0)}, options(16)), std::invalid_argument);
  EXPECT_THROW(engine.search({{5}}, {request(17)}, options(16)), std::invalid_argument);
  EXPECT_THROW(engine.search({{5}}, {request(5), request(5)}, options(16)), std::invalid_argument);
  EXPECT_THROW(engine.search({{5}}, {{{600}, 5, 0, 0}}, options(16)), std::invalid_argument);
  EXPECT_THROW(engine.search({{5}}, {{{6, 6}, 2, 0, 0}}, options(16)), std::invalid_argument);
  SearchOptions attending = options(16);
  attending.return_attention = true;
  EXPECT_THROW(engine.search({{5}}, {request(5)}, attending), std::invalid_argument);
  EXPECT_THROW(engine.search({{5}}, {request(5)}, attending, {{}, {2}}), std::invalid_argument);
  EXPECT_THROW(engine.search({{5}}, {request(5)}, attending, {{&engine}, {1}}),
               std::invalid_argument);
  EXPECT_THROW(engine.score({{5}}, {{600}}, 2), std::invalid_argument);
  EXPECT_EQ(engine.search({{5, 3}}, {request(4)}, options(16)).size(), 1u);
  model.arrays.erase("decoder.layers.1.cross_attention_norm.bias");
  EXPECT_THROW(Engine(model.config, model, 1), std::invalid_argument);
}

}  // namespace
}  // namespace transformer_ext::engine
