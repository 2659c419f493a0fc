#include "engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/testing.h"

namespace transformer_ext::engine {
namespace {

struct TestModel : TestWeights {
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
    add("source_embedding.weight", {50, 32}, 1.0f);
    add("target_embedding.weight", {600, 32}, 1.0f);
    for (const char* name : {"encoder.layers.0", "decoder.layers.0", "decoder.layers.1"}) {
      layer(name);
      const std::string cross = std::string(name) + ".cross_attention";
      if (name[0] == 'e') continue;
      linear(cross + ".query_projection", 32, 32);
      linear(cross + ".key_value_projection", 2 * config.kv_width(), 32);
      linear(cross + ".out_projection", 32, 32);
      norm(cross + "_norm");
    }
  }
};

// Its decoder alone, without attention to sources.
struct TestLanguageModel : TestModel {
  TestLanguageModel() {
    config.kind = Kind::decoder_only;
    config.source_vocabulary = 0;
    config.encoder_layers = 0;
    config.positions = Positions::rope;
    arrays["embedding.weight"] = arrays["target_embedding.weight"];
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

// Without a start token; the longest is taken in several calls.
std::vector<Request> prompts() {
  std::vector<Request> all;
  for (const size_t length : {3, 1, 700, 9, 40, 512}) {
    Request request{{}, 12, 2, all.size()};
    for (size_t i = 0; i < length; ++i) {
      request.prompt.push_back(static_cast<int32_t>(4 + (i * i + 7 * all.size()) % 590));
    }
    all.push_back(std::move(request));
  }
  return all;
}

TEST(Engine, ContinuesEachPromptTheSameInAnyBatchForAnyThreads) {
  SearchOptions plain = options(16);
  plain.start_id = -1;
  SearchOptions rules = plain;
  rules.tokens.no_repeat_ngram_size = 1;
  rules.tokens.repetition_penalty = 1.3;
  SearchOptions sampling = plain;
  sampling.sampling = true;
  sampling.seed = 3;
  sampling.tokens.penalty_on_logits = true;
  sampling.tokens.repetition_penalty = 1.3;
  for (const GemmType type : {GemmType::float32, GemmType::bfloat16, GemmType::int8}) {
    if (!gemm_has(type)) continue;
    TestLanguageModel model;
    model.config.compute = type;
    Engine one(model.config, model, 1);
    Engine four(model.config, model, 4);
    for (const SearchOptions& each : {plain, rules, sampling}) {
      const std::vector<Request> all = prompts();
      const auto together = four.search({}, all, each);
      for (size_t i = 0; i < all.size(); ++i) {
        expect_equal(one.search({}, {all[i]}, each)[0], together[i]);
        ASSERT_EQ(together[i].hypotheses.size(), 3u);
        for (const Hypothesis& hypothesis : together[i].hypotheses) {
          EXPECT_LE(hypothesis.tokens.size(), 12u);
          EXPECT_GE(hypothesis.tokens.size(), 2u);
          if (each.tokens.no_repeat_ngram_size == 0) continue;
          for (const int32_t token : hypothesis.tokens) {
            EXPECT_EQ(std::count(all[i].prompt.begin(), all[i].prompt.end(), token), 0);
          }
        }
      }
    }
  }
}

// One token after the other, as a prefix of the output is taken, or all at once.
TEST(Engine, GivenTokensHaveTheSameBitsStepByStep) {
  for (const GemmType type : {GemmType::float32, GemmType::bfloat16, GemmType::int8}) {
    if (!gemm_has(type)) continue;
    TestLanguageModel model;
    model.config.compute = type;
    Engine engine(model.config, model, 2);
    SearchOptions plain = options(90);
    plain.start_id = -1;
    for (const size_t length : {2, 9, 60}) {
      Request whole{{}, 12, 0, 0};
      for (size_t i = 0; i < length; ++i) {
        whole.prompt.push_back(static_cast<int32_t>(4 + i * i % 590));
      }
      Request stepwise{{whole.prompt.begin() + 1, whole.prompt.end()},
                       12 + static_cast<int64_t>(length) - 1,
                       0,
                       0,
                       {whole.prompt[0]}};
      SearchOptions greedy = plain;
      greedy.beam_size = 1;
      greedy.num_hypotheses = 1;
      const Hypothesis expected = engine.search({}, {stepwise}, greedy)[0].hypotheses[0];
      const Hypothesis found = engine.search({}, {whole}, greedy)[0].hypotheses[0];
      const auto added = static_cast<std::ptrdiff_t>(length - 1);
      EXPECT_EQ(found.tokens,
                std::vector<int32_t>(expected.tokens.begin() + added, expected.tokens.end()));
      EXPECT_EQ(found.token_scores, std::vector<double>(expected.token_scores.begin() + added,
                                                        expected.token_scores.end()));
      // And so do scores of given texts, whose first token has none.
      std::vector<int32_t> text = whole.prompt;
      text.insert(text.end(), found.tokens.begin(), found.tokens.end());
      if (found.end == End::eos) text.push_back(3);
      const auto scores = engine.score({}, {{9}, text}, -1);
      EXPECT_TRUE(scores[0].log_probs.empty());
      EXPECT_EQ(scores[1].log_probs, expected.token_scores);
    }
  }
}

TEST(Engine, TeamsContinuePromptsAsOneThreadDoes) {
  const TestLanguageModel model;
  std::vector<Request> asked;
  for (size_t i = 0; i < 110; ++i) {
    asked.push_back({{}, 3 + static_cast<int64_t>(i % 4), 0, i, {static_cast<int32_t>(5 + i)}});
    if (i % 3 == 0) asked.back().prompt.push_back(77);
  }
  SearchOptions beam = options(16);
  beam.start_id = -1;
  Engine one(model.config, model, 1);
  Engine several(model.config, model, 3);
  ASSERT_EQ(several.team_count(asked.size(), beam), 3);
  const auto expected = one.search({}, asked, beam);
  const auto found = several.search({}, asked, beam);
  for (size_t i = 0; i < found.size(); ++i) expect_equal(found[i], expected[i]);
}

TEST(Engine, RefusesPromptsThatDoNotFit) {
  TestLanguageModel model;
  model.config.positions = Positions::learned;
  model.config.max_positions = 8;
  model.add("decoder.positions.weight", {8, 32}, 1.0f);
  Engine engine(model.config, model, 1);
  SearchOptions plain = options(16);
  plain.start_id = -1;
  const auto asked = [](std::vector<int32_t> prompt, int64_t limit) {
    return std::vector<Request>{{{}, limit, 0, 0, std::move(prompt)}};
  };
  EXPECT_THROW(engine.search({{5}}, asked({4}, 5), plain), std::invalid_argument);
  EXPECT_THROW(engine.search({}, asked({}, 5), plain), std::invalid_argument);
  EXPECT_THROW(engine.search({}, asked({600}, 5), plain), std::invalid_argument);
  EXPECT_THROW(engine.search({}, asked({-1}, 5), plain), std::invalid_argument);
  EXPECT_THROW(engine.search({}, asked({4, 5, 6, 7, 8, 9, 10, 11, 12}, 1), plain),
               std::invalid_argument);
  EXPECT_EQ(engine.search({}, asked({4, 5, 6, 7, 8, 9, 10, 11}, 1), plain)[0].steps, 1);
  SearchOptions attending = plain;
  attending.return_attention = true;
  EXPECT_THROW(engine.search({}, asked({4}, 5), attending, {{}, {0}}), std::invalid_argument);
  EXPECT_TRUE(engine.search({}, {}, plain).empty());
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
