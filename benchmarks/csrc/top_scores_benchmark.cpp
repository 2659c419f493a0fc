// What is done with the scores of the vocabulary while they are in the second-level cache, 512 of a
// row at a time: highest few, and sum of exponentials. The exponential takes 8 multiply-adds a
// score (two for the reduction, six for the polynomial): so many, at the machine's peak, are the
// ceiling.
//
//     csrc_benchmarks --benchmark_filter=top_scores
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "ceiling.h"
#include "engine/top_scores.h"

namespace transformer_ext {
namespace {

constexpr int64_t kChunk = 512;
constexpr int64_t kRows = 64;
constexpr double kMultiplyAdds = 8.0;

void top_scores(benchmark::State& state) {
  const int64_t vocabulary = state.range(0);
  const int32_t count = static_cast<int32_t>(state.range(1));
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  // One chunk of each row after the other, as they come from the product.
  Aligned<float> scores(static_cast<size_t>(kRows * vocabulary));
  for (float& score : scores) score = normal(generator);
  std::vector<float> highest(static_cast<size_t>(count));
  std::vector<int32_t> ids(static_cast<size_t>(count));
  const double flop = 2.0 * kMultiplyAdds * static_cast<double>(kRows * vocabulary);
  against_arithmetic(state, flop, Arithmetic::float32, [&] {
    for (int64_t row = 0; row < kRows; ++row) {
      TopScores top{-INFINITY, 0.0f, 0, count, highest.data(), ids.data(), -INFINITY};
      for (int64_t column = 0; column < vocabulary; column += kChunk) {
        const int64_t n = std::min(kChunk, vocabulary - column);
        top_scores_kernels().scan(scores.data() + row * vocabulary + column, n,
                                  static_cast<int32_t>(column), &top);
      }
      benchmark::DoNotOptimize(top.sum);
    }
  });
  state.counters["ns_a_score"] =
      state.counters["us"] * 1e3 / static_cast<double>(kRows * vocabulary);
}

BENCHMARK(top_scores)
    ->Apply(in_turns)
    ->ArgNames({"vocabulary", "count"})
    ->Args({2048, 8})
    ->Args({2048, 2})
    ->Args({8000, 8})
    ->Args({8000, 64});

}  // namespace
}  // namespace transformer_ext
