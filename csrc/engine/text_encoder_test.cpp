#include "engine/text_encoder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/testing.h"

namespace transformer_ext::engine {
namespace {

constexpr int64_t kVocabulary = 301;
constexpr int64_t kWidth = 36;
constexpr int64_t kLabels = 3;

// BERT in small, with odd sizes.
struct TestEncoder : TestWeights {
  explicit TestEncoder(Pooling pooling = Pooling::first, int64_t layers = 2) {
    config.kind = Kind::encoder_only;
    config.source_vocabulary = kVocabulary;
    config.width = kWidth;
    config.heads = 3;
    config.kv_heads = 3;
    config.head_dim = 12;
    config.encoder_layers = layers;
    config.inner = 51;
    config.activation = Activation::gelu;
    config.positions = Positions::learned;
    config.max_positions = 40;
    config.scale_embedding = false;
    config.embedding_norm = true;
    config.output_bias = true;
    config.token_types = 2;
    config.pooling = pooling;
    config.pooler = pooling == Pooling::first;
    config.normalize = pooling == Pooling::mean;
    config.labels = kLabels;
    config.masked_lm_head = true;
    add("embedding.weight", {kVocabulary, kWidth}, 1.0f);
    add("encoder.positions.weight", {40, kWidth}, 1.0f);
    add("encoder.token_types.weight", {2, kWidth}, 1.0f);
    norm("encoder.embedding_norm");
    for (int64_t i = 0; i < layers; ++i) layer("encoder.layers." + std::to_string(i));
    linear("pooler", kWidth, kWidth);
    linear("generator", kLabels, kWidth);
    linear("masked_lm_head.projection", kWidth, kWidth);
    norm("masked_lm_head.norm");
    add("masked_lm_head.bias", {kVocabulary}, 0.1f);
  }
};

// What all calls give for the texts, one vector of values for each text and call.
struct Results {
  std::vector<std::vector<float>> states, pooled, labels, tokens;
  bool operator==(const Results&) const = default;
};

const std::vector<std::vector<int32_t>> kIds = {
    {5, 9, 11, 3, 300},
    {7},
    {20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 3, 1, 2, 3, 4, 5},
    {8, 8}};
const std::vector<std::vector<int32_t>> kTypes = {
    {0, 0, 1, 1, 1}, {1}, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1}, {0, 1}};
const std::vector<std::vector<int32_t>> kPositions = {{4, 0, 4}, {0}, {}, {1}};

std::vector<std::vector<float>> rows(const std::vector<float>& values, size_t count) {
  std::vector<std::vector<float>> result;
  const size_t size = values.size() / count;
  for (size_t i = 0; i < count; ++i) {
    result.emplace_back(values.begin() + static_cast<int64_t>(i * size),
                        values.begin() + static_cast<int64_t>((i + 1) * size));
  }
  return result;
}

Results run(Engine& engine, const Texts& texts,
            const std::vector<std::vector<int32_t>>& positions) {
  const size_t count = texts.ids.size();
  Results results;
  std::vector<float*> states, tokens;
  for (size_t i = 0; i < count; ++i) {
    results.states.emplace_back(texts.ids[i].size() * kWidth);
    results.tokens.emplace_back(positions[i].size() * kVocabulary);
  }
  for (auto& each : results.states) states.push_back(each.data());
  for (auto& each : results.tokens) tokens.push_back(each.data());
  std::vector<float> pooled(count * kWidth);
  std::vector<float> labels(count * kLabels);
  engine.states(texts, states);
  engine.pooled(texts, pooled.data());
  engine.label_scores(texts, labels.data());
  engine.token_scores(texts, positions, tokens);
  results.pooled = rows(pooled, count);
  results.labels = rows(labels, count);
  return results;
}

void expect_the_same_in_any_batch_for_any_threads(GemmType type) {
  for (const Pooling pooling : {Pooling::first, Pooling::mean}) {
    for (const int64_t layers : {0, 2}) {
      TestEncoder model(pooling, layers);
      model.config.compute = type;
      Engine one(model.config, model, 1);
      Engine four(model.config, model, 4);
      const Results together = run(four, {kIds, kTypes}, kPositions);
      EXPECT_EQ(run(one, {kIds, kTypes}, kPositions), together);
      for (size_t i = 0; i < kIds.size(); ++i) {
        const Results alone = run(one, {{kIds[i]}, {kTypes[i]}}, {kPositions[i]});
        EXPECT_EQ(alone.states[0], together.states[i]);
        EXPECT_EQ(alone.pooled[0], together.pooled[i]);
        EXPECT_EQ(alone.labels[0], together.labels[i]);
        EXPECT_EQ(alone.tokens[0], together.tokens[i]);
      }
      for (const auto& states : together.states) {
        for (const float value : states) ASSERT_TRUE(std::isfinite(value));
      }
    }
  }
}

TEST(TextEncoder, GivesEachTextTheSameInAnyBatchForAnyThreads) {
  expect_the_same_in_any_batch_for_any_threads(GemmType::float32);
}

TEST(TextEncoder, GivesEachTextTheSameInLowerPrecision) {
  for (const GemmType type : {GemmType::bfloat16, GemmType::int8}) {
    if (gemm_has(type)) expect_the_same_in_any_batch_for_any_threads(type);
  }
}

TEST(TextEncoder, HeadsAreMadeOfTheStates) {
  // The mean of the states, of length 1.
  const TestEncoder model(Pooling::mean);
  Engine engine(model.config, model, 2);
  const Results results = run(engine, {kIds, kTypes}, kPositions);
  for (size_t i = 0; i < kIds.size(); ++i) {
    std::vector<double> mean(kWidth, 0.0);
    for (size_t at = 0; at < results.states[i].size(); ++at) {
      mean[at % kWidth] += static_cast<double>(results.states[i][at]);
    }
    double squares = 0.0;
    for (const double value : mean) squares += value * value;
    for (size_t j = 0; j < kWidth; ++j) {
      EXPECT_NEAR(results.pooled[i][j], mean[j] / std::sqrt(squares), 1e-6);
    }
    const float* const labels = model("generator.weight").data;
    for (size_t label = 0; label < kLabels; ++label) {
      double score = static_cast<double>(model("generator.bias").data[label]);
      for (size_t j = 0; j < kWidth; ++j) {
        score += static_cast<double>(labels[label * kWidth + j]) *
                 static_cast<double>(results.pooled[i][j]);
      }
      EXPECT_NEAR(results.labels[i][label], score, 1e-5);
    }
  }
  // The last position of the first text was asked for twice.
  const std::vector<float>& tokens = results.tokens[0];
  EXPECT_TRUE(
      std::equal(tokens.begin(), tokens.begin() + kVocabulary, tokens.begin() + 2 * kVocabulary));
}

TEST(TextEncoder, NoTokenTypesAreTypes0) {
  const TestEncoder model;
  Engine engine(model.config, model, 1);
  std::vector<std::vector<int32_t>> zeros;
  for (const auto& ids : kIds) zeros.emplace_back(ids.size(), 0);
  EXPECT_EQ(run(engine, {kIds, {}}, kPositions), run(engine, {kIds, zeros}, kPositions));
}

TEST(TextEncoder, ScoresMoreTokensThanAreMadeAtOnce) {
  const TestEncoder model;
  Engine engine(model.config, model, 2);
  Texts texts;
  std::vector<std::vector<int32_t>> positions;
  for (int32_t text = 0; text < 5; ++text) {
    texts.ids.emplace_back();
    positions.emplace_back();
    for (int32_t i = 0; i < 40; ++i) {
      texts.ids.back().push_back(i * 7 + text);
      positions.back().push_back(39 - i);
    }
  }
  const Results together = run(engine, texts, positions);
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(run(engine, {{texts.ids[i]}, {}}, {positions[i]}).tokens[0], together.tokens[i]);
  }
}

TEST(TextEncoder, ACallIsEndedBeforeALayer) {
  const TestEncoder model;
  Engine engine(model.config, model, 3);
  std::vector<float> out(kWidth);
  int layers = 0;
  const auto ended = [&] {
    if (++layers == 2) throw std::runtime_error("ended");
  };
  EXPECT_THROW(engine.pooled({{kIds[0]}, {}}, out.data(), ended), std::runtime_error);
  EXPECT_EQ(layers, 2);
  engine.pooled({{kIds[0]}, {}}, out.data());
  EXPECT_EQ(run(engine, {{kIds[0]}, {}}, {{}}).pooled[0], out);
}

TEST(TextEncoder, ServesSeveralThreads) {
  const TestEncoder model;
  Engine engine(model.config, model, 2);
  const Results expected = run(engine, {kIds, kTypes}, kPositions);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int round = 0; round < 5; ++round) {
        EXPECT_EQ(run(engine, {kIds, kTypes}, kPositions), expected);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(TextEncoder, RefusesWhatDoesNotFit) {
  TestEncoder model;
  Engine engine(model.config, model, 1);
  std::vector<float> out(kWidth);
  const auto refuses = [&](const Texts& texts) {
    EXPECT_THROW(engine.pooled(texts, out.data()), std::invalid_argument);
  };
  refuses({{{}}, {}});
  refuses({{{kVocabulary}}, {}});
  refuses({{{-1}}, {}});
  refuses({{std::vector<int32_t>(41, 5)}, {}});
  refuses({{{5}}, {{2}}});
  refuses({{{5}}, {{-1}}});
  refuses({{{5}}, {{0, 0}}});
  refuses({{{5}}, {{0}, {0}}});
  EXPECT_THROW(engine.token_scores({{{5}}, {}}, {{1}}, {out.data()}), std::invalid_argument);
  EXPECT_THROW(engine.token_scores({{{5}}, {}}, {{-1}}, {out.data()}), std::invalid_argument);
  EXPECT_THROW(engine.token_scores({{{5}}, {}}, {}, {}), std::invalid_argument);
  EXPECT_THROW(engine.score({{5}}, {{5}}, 2), std::invalid_argument);
  engine.pooled({{std::vector<int32_t>(40, 5)}, {}}, out.data());
  model.config.labels = 0;
  model.config.masked_lm_head = false;
  model.config.token_types = 0;
  Engine bare(model.config, model, 1);
  EXPECT_THROW(bare.label_scores({{{5}}, {}}, out.data()), std::invalid_argument);
  EXPECT_THROW(bare.token_scores({{{5}}, {}}, {{0}}, {out.data()}), std::invalid_argument);
  EXPECT_THROW(bare.pooled({{{5}}, {{0}}}, out.data()), std::invalid_argument);
  bare.pooled({{{5}}, {}}, out.data());
  model.arrays.erase("encoder.positions.weight");
  EXPECT_THROW(Engine(model.config, model, 1), std::invalid_argument);
}

}  // namespace
}  // namespace transformer_ext::engine
