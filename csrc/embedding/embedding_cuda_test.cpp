#include "embedding/embedding_cuda.h"

#include <cmath>

#include "embedding/embedding.h"
#include "testing/cuda_test.h"

namespace transformer_ext {
namespace {

using namespace cuda_test;

const int64_t kRng[3] = {0x1111222233334444, 5, 3};
constexpr int64_t kSite = 2;

struct Case {
  int64_t tokens;
  int64_t rows;
  int64_t columns;
  bool wide;  // ids of 64 bits
  double p;
};

// One and two passes of the sort, one block and several; a frequent id; vectors and single
// elements; more columns than are summed at a time.
const Case kCases[] = {
    {1, 1, 1, true, 0.0},      {5, 3, 8, false, 0.5},    {300, 40, 16, true, 0.25},
    {520, 257, 9, false, 0.1}, {60, 20, 264, true, 0.1}, {33, 21, 301, false, 0.0},
};

struct Inputs {
  std::vector<int64_t> ids, positions;
  std::vector<int32_t> narrow_ids, narrow_positions;
  std::vector<float> weight, table, grad;

  explicit Inputs(const Case& c) {
    std::mt19937 random(3);
    for (int64_t t = 0; t < c.tokens; ++t) {
      // Every other token is the last id.
      ids.push_back(t % 2 == 0 ? c.rows - 1 : static_cast<int64_t>(random() % c.rows));
      positions.push_back(t % 7);
      narrow_ids.push_back(static_cast<int32_t>(ids.back()));
      narrow_positions.push_back(static_cast<int32_t>(positions.back()));
    }
    weight = random_values(c.rows * c.columns, 1);
    table = random_values(7 * c.columns, 2);
    grad = random_values(c.tokens * c.columns, 3);
    const Dropout dropout = make_dropout(kRng, kSite, c.p);
    for (size_t i = 0; c.p > 0 && i < grad.size(); ++i) {
      const int64_t token = static_cast<int64_t>(i) / c.columns;
      if (!dropout_keeps(dropout, token, static_cast<int64_t>(i) % c.columns)) grad[i] = kNan;
    }
  }

  Indices id_indices(bool wide) const {
    return {wide ? ids.data() : nullptr, wide ? nullptr : narrow_ids.data()};
  }
  Indices position_indices(bool wide) const {
    return {wide ? positions.data() : nullptr, wide ? nullptr : narrow_positions.data()};
  }
};

template <class T>
void compare(const Case& c) {
  SCOPED_TRACE(testing::Message() << c.tokens << " tokens, " << c.rows << " x " << c.columns
                                  << ", p " << c.p);
  const Inputs input(c);
  const std::vector<T> grad = convert<T>(input.grad);
  const CudaDropout cuda = cuda_dropout(c.p > 0 ? kRng : nullptr, kSite, c.p);
  std::vector<T> out;
  std::vector<float> grad_weight;
  for_each_schedule([&] {
    out.assign(grad.size(), rounded<T>(kNan));
    grad_weight.assign(input.weight.size(), kNan);
    EXPECT_LAUNCHED(
        embedding_forward_cuda({input.id_indices(c.wide), input.weight.data(), c.rows, 3.0f,
                                input.position_indices(!c.wide), input.table.data(), 7, out.data(),
                                c.tokens, c.columns, cuda},
                               float_type<T>(), nullptr));
    std::vector<int32_t> scratch(embedding_backward_scratch(c.tokens, c.rows), -1);
    EXPECT_LAUNCHED(
        embedding_backward_cuda({grad.data(), input.id_indices(c.wide), 3.0f, grad_weight.data(),
                                 scratch.data(), c.tokens, c.columns, c.rows, cuda},
                                float_type<T>(), nullptr));
    std::vector<float> all = widen(out);
    all.insert(all.end(), grad_weight.begin(), grad_weight.end());
    return all;
  });

  Serial serial;
  const Dropout dropout = c.p > 0 ? make_dropout(kRng, kSite, c.p) : Dropout{};
  const std::vector<float> wide_grad = widen(grad);
  std::vector<float> expected(grad.size()), expected_weight(input.weight.size());
  embedding_kernels().forward_f32(
      {input.id_indices(true), input.weight.data(), 3.0f, input.position_indices(true),
       input.table.data(), expected.data(), c.tokens, c.columns, dropout},
      serial);
  embedding_kernels().backward_f32({wide_grad.data(), input.id_indices(true), 3.0f,
                                    expected_weight.data(), c.tokens, c.columns, c.rows, dropout},
                                   serial);
  expect_near(out, expected, 2 * unit<T>() + 1e-6, "out");
  expect_near(grad_weight, expected_weight, 1e-4, "grad_weight");
  for (size_t i = 0; i < expected.size(); ++i) {
    if (expected[i] == 0.0f) {
      EXPECT_EQ(value(out[i]), 0.0f) << i;
    }
  }
}

TEST(EmbeddingCuda, AgreesWithTheCpuInFloat32) {
  for (const Case& c : kCases) compare<float>(c);
}
// The sort, which is the same for all types, is the slow part.
TEST(EmbeddingCuda, AgreesWithTheCpuInBfloat16) {
  for (const Case& c : kCases) {
    if (c.tokens < 100) compare<bfloat16>(c);
  }
}
TEST(EmbeddingCuda, AgreesWithTheCpuInFloat16) {
  for (const Case& c : kCases) {
    if (c.tokens < 100) compare<half>(c);
  }
}

TEST(EmbeddingCuda, AnIdOutsideOfTheTableGivesNanAndNoGradient) {
  const std::vector<int32_t> ids = {1, -1, 2, 3, 0};
  const std::vector<float> weight = {1, 2, 3};
  std::vector<float> out(5), grad_weight(3, kNan);
  EXPECT_LAUNCHED(embedding_forward_cuda(
      {{nullptr, ids.data()}, weight.data(), 3, 1.0f, {}, nullptr, 0, out.data(), 5, 1, {}},
      FloatType::float32, nullptr));
  EXPECT_EQ(out[0], 2.0f);
  EXPECT_TRUE(std::isnan(out[1]) && std::isnan(out[3]));
  EXPECT_EQ(out[4], 1.0f);
  const std::vector<float> grad(5, 1.0f);
  std::vector<int32_t> scratch(embedding_backward_scratch(5, 3), -1);
  EXPECT_LAUNCHED(embedding_backward_cuda(
      {grad.data(), {nullptr, ids.data()}, 1.0f, grad_weight.data(), scratch.data(), 5, 1, 3, {}},
      FloatType::float32, nullptr));
  EXPECT_EQ(grad_weight, std::vector<float>(3, 1.0f));
}

// More tokens than the threads of a block have blocks: their counts are summed in two parts.
TEST(EmbeddingCuda, SortsTokensOfManyBlocks) {
  constexpr int64_t kTokens = 257 * 256;
  std::vector<int32_t> ids(kTokens);
  std::vector<float> grad(kTokens), expected(3, 0.0f), grad_weight(3, kNan);
  for (int64_t i = 0; i < kTokens; ++i) {
    ids[size_t(i)] = int32_t(i % 7 % 3);
    grad[size_t(i)] = float(i % 5);
    expected[size_t(ids[size_t(i)])] += grad[size_t(i)];  // whole numbers, all exact
  }
  std::vector<int32_t> scratch(size_t(embedding_backward_scratch(kTokens, 3)), -1);
  EXPECT_LAUNCHED(embedding_backward_cuda({grad.data(),
                                           {nullptr, ids.data()},
                                           1.0f,
                                           grad_weight.data(),
                                           scratch.data(),
                                           kTokens,
                                           1,
                                           3,
                                           {}},
                                          FloatType::float32, nullptr));
  EXPECT_EQ(grad_weight, expected);
}

TEST(EmbeddingCuda, WithoutTokensTheGradientIsZero) {
  std::vector<float> grad_weight(4, kNan);
  std::vector<int32_t> scratch(embedding_backward_scratch(0, 2), -1);
  EXPECT_LAUNCHED(
      embedding_backward_cuda({nullptr, {}, 1.0f, grad_weight.data(), scratch.data(), 0, 2, 2, {}},
                              FloatType::float32, nullptr));
  EXPECT_EQ(grad_weight, std::vector<float>(4, 0.0f));
}

}  // namespace
}  // namespace transformer_ext
