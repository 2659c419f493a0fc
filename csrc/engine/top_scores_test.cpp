#include "engine/top_scores.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/testing.h"

namespace transformer_ext {
namespace {

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

}  // namespace
}  // namespace transformer_ext
