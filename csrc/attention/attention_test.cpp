#include "attention/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/bfloat16.h"
#include "common/thread_pool.h"

namespace transformer_ext {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  std::vector<int32_t> query_lengths, key_lengths;
  int64_t heads, kv_heads, head_dim;
  bool causal;
};

// Packed tensors with slack rows full of NaN, and the formula in double.
template <class T>
struct Problem {
  static constexpr int64_t kSlack = 3;

  explicit Problem(const Shape& shape) : shape(shape) {
    const auto pack = [](const std::vector<int32_t>& lengths, std::vector<int32_t>& ends) {
      ends = {0};
      int32_t longest = 0;
      for (const int32_t n : lengths) {
        ends.push_back(ends.back() + n);
        longest = std::max(longest, n);
      }
      return longest;
    };
    const int32_t longest_query = pack(shape.query_lengths, query_ends);
    const int32_t longest_key = pack(shape.key_lengths, key_ends);
    query = fill(query_ends.back(), shape.heads, 1);
    key = fill(key_ends.back(), shape.kv_heads, 2);
    value = fill(key_ends.back(), shape.kv_heads, 3);
    grad_out = fill(query_ends.back(), shape.heads, 4);
    out = grad_query = std::vector<T>(query.size(), from_float<T>(kNaN));
    grad_key = grad_value = std::vector<T>(key.size(), from_float<T>(kNaN));
    const int64_t rows = query_ends.back() + kSlack;
    statistics.resize(static_cast<size_t>(2 * shape.heads * rows));
    args.bfloat16 = sizeof(T) == 2;
    args.batch = static_cast<int64_t>(shape.query_lengths.size());
    args.heads = shape.heads;
    args.kv_heads = shape.kv_heads;
    args.head_dim = shape.head_dim;
    args.query_length = rows;
    args.key_length = key_ends.back() + kSlack;
    args.max_query_length = longest_query;
    args.max_key_length = longest_key;
    args.cu_seqlens_q = query_ends.data();
    args.cu_seqlens_k = key_ends.data();
    args.causal = shape.causal;
    args.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
    args.query = view(query, shape.heads);
    args.key = view(key, shape.kv_heads);
    args.value = view(value, shape.kv_heads);
    args.out = view(out, shape.heads);
    args.grad_out = view(grad_out, shape.heads);
    args.grad_query = view(grad_query, shape.heads);
    args.grad_key = view(grad_key, shape.kv_heads);
    args.grad_value = view(grad_value, shape.kv_heads);
    args.statistics = statistics.data();
  }

  std::vector<T> fill(int64_t tokens, int64_t heads, unsigned seed) const {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<T> x(static_cast<size_t>((tokens + kSlack) * heads * shape.head_dim),
                     from_float<T>(kNaN));
    for (int64_t i = 0; i < tokens * heads * shape.head_dim; ++i) {
      x[static_cast<size_t>(i)] = from_float<T>(to_float(to_bfloat16(normal(random))));
    }
    return x;
  }

  AttentionTensor view(std::vector<T>& x, int64_t heads) const {
    return {x.data(), 0, heads * shape.head_dim, shape.head_dim};
  }

  void run(Parallel& parallel) {
    attention_kernels().forward(args, parallel);
    attention_kernels().backward(args, parallel);
  }

  // Output, gradients of query, key and value.
  std::vector<std::vector<double>> exact() const {
    std::vector<std::vector<double>> result{
        std::vector<double>(query.size()), std::vector<double>(query.size()),
        std::vector<double>(key.size()), std::vector<double>(key.size())};
    const int64_t size = shape.head_dim;
    for (size_t b = 0; b < shape.query_lengths.size(); ++b) {
      for (int64_t h = 0; h < shape.heads; ++h) {
        const int64_t kv = h / (shape.heads / shape.kv_heads);
        for (int64_t i = 0; i < shape.query_lengths[b]; ++i) {
          const int64_t q = ((query_ends[b] + i) * shape.heads + h) * size;
          const int64_t keys =
              shape.causal ? std::min<int64_t>(shape.key_lengths[b], i + 1) : shape.key_lengths[b];
          std::vector<double> p(static_cast<size_t>(keys)), dp(p);
          double sum = 0.0;
          double delta = 0.0;
          const auto row = [&](int64_t j) {
            return ((key_ends[b] + j) * shape.kv_heads + kv) * size;
          };
          for (int64_t j = 0; j < keys; ++j) {
            double& score = p[static_cast<size_t>(j)];
            for (int64_t d = 0; d < size; ++d) {
              score += at(query, q + d) * at(key, row(j) + d) / std::sqrt(size);
              dp[static_cast<size_t>(j)] += at(grad_out, q + d) * at(value, row(j) + d);
            }
            score = std::exp(score);
            sum += score;
          }
          for (size_t j = 0; j < p.size(); ++j) delta += (p[j] /= sum) * dp[j];
          for (int64_t j = 0; j < keys; ++j) {
            const double weight = p[static_cast<size_t>(j)];
            const double ds = weight * (dp[static_cast<size_t>(j)] - delta) / std::sqrt(size);
            for (int64_t d = 0; d < size; ++d) {
              add(result[0], q + d, weight * at(value, row(j) + d));
              add(result[1], q + d, ds * at(key, row(j) + d));
              add(result[2], row(j) + d, ds * at(query, q + d));
              add(result[3], row(j) + d, weight * at(grad_out, q + d));
            }
          }
        }
      }
    }
    return result;
  }

  static double at(const std::vector<T>& x, int64_t i) {
    return to_float(x[static_cast<size_t>(i)]);
  }
  static void add(std::vector<double>& x, int64_t i, double y) { x[static_cast<size_t>(i)] += y; }

  Shape shape;
  std::vector<int32_t> query_ends, key_ends;
  std::vector<T> query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  std::vector<float> statistics;
  AttentionBackwardArgs args;
};

const Shape kShapes[] = {
    {{1}, {1}, 1, 1, 1, false},
    {{5, 0, 33}, {5, 0, 33}, 2, 2, 64, true},
    {{7, 20, 3}, {40, 1, 0}, 4, 2, 17, false},
    {{130}, {257}, 2, 1, 33, false},
    {{600}, {600}, 1, 1, 8, true},
};

template <class T>
void expect_near(const std::vector<T>& got, const std::vector<double>& exact, double tolerance) {
  ASSERT_EQ(got.size(), exact.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(to_float(got[i]), exact[i], tolerance * (1.0 + std::abs(exact[i]))) << "at " << i;
  }
}

template <class T>
void compare(double tolerance) {
  for (const Shape& shape : kShapes) {
    Problem<T> problem(shape);
    Serial serial;
    problem.run(serial);
    const auto exact = problem.exact();
    expect_near(problem.out, exact[0], tolerance);
    expect_near(problem.grad_query, exact[1], tolerance);
    expect_near(problem.grad_key, exact[2], tolerance);
    expect_near(problem.grad_value, exact[3], tolerance);
  }
}

TEST(Attention, Float32FollowsTheFormula) { compare<float>(2e-5); }
TEST(Attention, Bfloat16FollowsTheFormula) { compare<bfloat16>(3e-2); }

TEST(Attention, SameBitsForAnyNumberOfThreads) {
  for (const Shape& shape : kShapes) {
    Problem<float> alone(shape);
    Serial serial;
    alone.run(serial);
    for (const int threads : {2, 4}) {
      ThreadPool pool(threads);
      Problem<float> shared(shape);
      shared.run(pool);
      EXPECT_EQ(alone.out, shared.out);
      EXPECT_EQ(alone.grad_query, shared.grad_query);
      EXPECT_EQ(alone.grad_key, shared.grad_key);
      EXPECT_EQ(alone.grad_value, shared.grad_value);
    }
  }
}

TEST(Attention, ForwardWithoutStatistics) {
  Problem<float> with(kShapes[1]);
  Problem<float> without(kShapes[1]);
  without.args.statistics = nullptr;
  Serial serial;
  attention_kernels().forward(with.args, serial);
  attention_kernels().forward(without.args, serial);
  EXPECT_EQ(with.out, without.out);
}

TEST(Attention, DropoutKeepsTheMaskOfItsHeader) {
  Shape shape{{6, 9}, {6, 9}, 2, 2, 16, false};
  Problem<float> problem(shape);
  const int64_t rng[3] = {7, 8, 9};
  problem.args.dropout = make_dropout(rng, 3, 0.5);
  // One value is 1, all others 0: the output is one dropped weight.
  for (int64_t token = 0; token < 15; ++token) {
    std::fill(problem.value.begin(), problem.value.end(), 0.0f);
    for (int64_t i = 0; i < 32; ++i) problem.value[static_cast<size_t>(token * 32 + i)] = 1.0f;
    Serial serial;
    attention_kernels().forward(problem.args, serial);
    const int64_t sequence = token < 6 ? 0 : 1;
    for (int64_t q = problem.query_ends[static_cast<size_t>(sequence)];
         q < problem.query_ends[static_cast<size_t>(sequence + 1)]; ++q) {
      for (int64_t h = 0; h < 2; ++h) {
        const bool kept = dropout_keeps(problem.args.dropout, q * 2 + h, token - 6 * sequence);
        EXPECT_EQ(problem.out[static_cast<size_t>((q * 2 + h) * 16)] != 0.0f, kept);
      }
    }
  }
}

}  // namespace
}  // namespace transformer_ext
