#include "embedding/embedding.h"

#include <gtest/gtest.h>

#include <vector>

#include "common/thread_pool.h"

namespace transformer_ext {
namespace {

TEST(Embedding, ScalesAddsPositionsAndDrops) {
  Serial serial;
  const int64_t columns = 70;
  std::vector<float> weight, table;
  for (int64_t i = 0; i < 3 * columns; ++i) weight.push_back(static_cast<float>(i));
  for (int64_t i = 0; i < 2 * columns; ++i) table.push_back(static_cast<float>(-i));
  const std::vector<int64_t> ids = {2, 0, 1};
  const std::vector<int32_t> positions = {1, 0, 1};
  std::vector<float> out(static_cast<size_t>(3 * columns));
  const int64_t rng[3] = {1, 2, 3};
  const Dropout dropout = make_dropout(rng, 4, 0.5);
  embedding_kernels().forward_f32({{ids.data(), nullptr},
                                   weight.data(),
                                   2.0f,
                                   {nullptr, positions.data()},
                                   table.data(),
                                   out.data(),
                                   3,
                                   columns,
                                   dropout},
                                  serial);
  for (int64_t t = 0; t < 3; ++t) {
    for (int64_t c = 0; c < columns; ++c) {
      const float word = weight[static_cast<size_t>(ids[static_cast<size_t>(t)] * columns + c)];
      const float place =
          table[static_cast<size_t>(positions[static_cast<size_t>(t)] * columns + c)];
      EXPECT_EQ(out[static_cast<size_t>(t * columns + c)],
                dropout_keeps(dropout, t, c) ? 2.0f * (2.0f * word + place) : 0.0f);
    }
  }
}

TEST(Embedding, GradientRowsAreSumsOverTheirTokens) {
  const int64_t tokens = 5000, columns = 33, rows = 700;
  std::vector<int32_t> ids;
  std::vector<float> grad;
  for (int64_t t = 0; t < tokens; ++t) {
    // Half of the tokens share one id, as padding does.
    ids.push_back(t % 2 ? 0 : static_cast<int32_t>(t * 7919 % (rows - 1)));
    for (int64_t c = 0; c < columns; ++c) grad.push_back(static_cast<float>((t + c) % 5));
  }
  std::vector<float> expected(static_cast<size_t>(rows * columns), 0.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < columns; ++c) {
      expected[static_cast<size_t>(ids[static_cast<size_t>(t)] * columns + c)] +=
          0.5f * grad[static_cast<size_t>(t * columns + c)];
    }
  }
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    std::vector<float> got(expected.size(), -1.0f);
    embedding_kernels().backward_f32(
        {grad.data(), {nullptr, ids.data()}, 0.5f, got.data(), tokens, columns, rows, Dropout{}},
        pool);
    EXPECT_EQ(got, expected);  // halves of small integers: every sum is exact
  }
}

}  // namespace
}  // namespace transformer_ext
