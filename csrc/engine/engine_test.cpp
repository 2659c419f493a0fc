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

// Against the definition in float64, for head sizes that leave every kind of rest.
TEST(CachedAttention, EqualsTheDefinition) {
  for (const int64_t head_dim : {1, 5, 16, 24, 64, 80}) {
    for (const int64_t length : {1, 2, 15, 16, 33}) {
      const int64_t heads = 4;
      const int64_t kv_heads = 2;
      const size_t kv_width = static_cast<size_t>(kv_heads * head_dim);
      const std::vector<float> query = random(static_cast<size_t>(heads * head_dim), 1);
      // [length][key, value], in descending order of addresses.
      const std::vector<float> cache = random(static_cast<size_t>(length) * 2 * kv_width, 2);
      std::vector<const float*> keys;
      for (int64_t i = length - 1; i >= 0; --i) {
        keys.push_back(cache.data() + static_cast<size_t>(i) * 2 * kv_width);
      }
      std::vector<float> scores(static_cast<size_t>(length + 16));
      std::vector<float> out(query.size());
      std::vector<float> average(static_cast<size_t>(length));
      cached_attention_kernels().attend(
          {query.data(), keys.data(), 0, static_cast<int64_t>(kv_width), length, heads, kv_heads,
           head_dim, 0.3f, scores.data(), out.data(), average.data()});
      std::vector<double> expected_average(static_cast<size_t>(length));
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t shift = h / 2 * head_dim;
        std::vector<double> weights;
        double sum = 0.0;
        for (const float* key : keys) {
          double dot = 0.0;
          for (int64_t d = 0; d < head_dim; ++d) {
            dot += static_cast<double>(query[static_cast<size_t>(h * head_dim + d)]) *
                   static_cast<double>(key[shift + d]);
          }
          weights.push_back(std::exp(0.3 * dot));
          sum += weights.back();
        }
        for (int64_t d = 0; d < head_dim; ++d) {
          double expected = 0.0;
          for (size_t i = 0; i < keys.size(); ++i) {
            expected += weights[i] / sum *
                        static_cast<double>(keys[i][static_cast<size_t>(shift + d) + kv_width]);
          }
          EXPECT_NEAR(out[static_cast<size_t>(h * head_dim + d)], expected, 2e-5);
        }
        for (size_t i = 0; i < keys.size(); ++i) expected_average[i] += weights[i] / sum / 4.0;
      }
      for (size_t i = 0; i < keys.size(); ++i) EXPECT_NEAR(average[i], expected_average[i], 1e-6);
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

TEST(Engine, GivesEachSentenceTheSameInAnyBatchForAnyThreads) {
  const TestModel model;
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
