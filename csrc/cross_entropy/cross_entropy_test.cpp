#include "cross_entropy/cross_entropy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "common/thread_pool.h"

namespace transformer_ext {
namespace {

constexpr int64_t kIgnored = -100;

template <class T>
CrossEntropySums run(const CrossEntropy<T>& arguments, Parallel& parallel) {
  if constexpr (std::is_same_v<T, float>) {
    return cross_entropy_kernels().cross_entropy_float32(arguments, parallel);
  } else {
    return cross_entropy_kernels().cross_entropy_bfloat16(arguments, parallel);
  }
}

// Rows of logits with a gap between them, so that a write beyond a row is seen.
template <class T>
struct Problem {
  int64_t rows, columns, stride;
  std::vector<T> logits;
  std::vector<float> bias;
  std::vector<int64_t> targets;

  Problem(int64_t rows, int64_t columns, unsigned seed = 1)
      : rows(rows), columns(columns), stride(columns + 3), logits(rows * stride), bias(columns) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 3.0f);
    for (T& x : logits) x = from_float<T>(normal(random));
    for (float& x : bias) x = normal(random);
    for (int64_t r = 0; r < rows; ++r) {
      targets.push_back(r % 4 == 3 ? kIgnored : static_cast<int64_t>(random() % columns));
    }
  }

  CrossEntropy<T> arguments(bool with_bias, float label_smoothing, float scale) {
    CrossEntropy<T> a;
    a.logits = logits.data();
    a.logits_stride = stride;
    a.grad = logits.data();
    a.grad_stride = stride;
    a.bias = with_bias ? bias.data() : nullptr;
    a.targets = targets.data();
    a.rows = rows;
    a.columns = columns;
    a.ignore_index = kIgnored;
    a.label_smoothing = label_smoothing;
    a.scale = scale;
    return a;
  }
};

template <class T>
void compare_with_definition(int64_t rows, int64_t columns, bool with_bias, float label_smoothing) {
  SCOPED_TRACE(testing::Message() << rows << " x " << columns << ", bias " << with_bias
                                  << ", label_smoothing " << label_smoothing);
  Problem<T> problem(rows, columns);
  const std::vector<T> before = problem.logits;
  const double scale = 0.25;
  ThreadPool pool(2);
  const CrossEntropySums sums =
      run(problem.arguments(with_bias, label_smoothing, static_cast<float>(scale)), pool);

  const double tolerance = std::is_same_v<T, float> ? 2e-6 : 4e-3;
  double loss = 0, nll = 0, correct = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t target = problem.targets[r];
    const T* const grad = problem.logits.data() + r * problem.stride;
    std::vector<double> x(columns);
    double top = -std::numeric_limits<double>::infinity();
    int64_t arg_max = 0;
    for (int64_t c = 0; c < columns; ++c) {
      x[c] = to_float(before[r * problem.stride + c]);
      if (with_bias) x[c] = static_cast<float>(x[c]) + problem.bias[c];
      if (x[c] > top) {
        top = x[c];
        arg_max = c;
      }
    }
    double sum = 0;
    for (double v : x) sum += std::exp(v - top);
    for (int64_t c = 0; c < columns; ++c) {
      const double log_probability = x[c] - top - std::log(sum);
      const double wanted = label_smoothing / columns + (c == target ? 1.0 - label_smoothing : 0.0);
      if (target == kIgnored) {
        EXPECT_EQ(to_float(grad[c]), 0.0f);
      } else {
        loss -= wanted * log_probability;
        const double expected = scale * (std::exp(log_probability) - wanted);
        EXPECT_NEAR(to_float(grad[c]), expected, tolerance * scale) << r << ", " << c;
      }
      if (c == target) nll -= log_probability;
    }
    correct += target == arg_max;
    for (int64_t c = columns; c < problem.stride; ++c) {
      EXPECT_EQ(to_float(grad[c]), to_float(before[r * problem.stride + c])) << "written to";
    }
  }
  EXPECT_NEAR(sums.loss, loss, 3e-6 * (1 + loss));
  EXPECT_NEAR(sums.nll, nll, 3e-6 * (1 + nll));
  EXPECT_EQ(sums.correct, correct);
}

TEST(CrossEntropy, FollowsItsDefinition) {
  for (int64_t columns : {1, 2, 15, 16, 17, 33, 100, 1031}) {
    for (bool with_bias : {false, true}) {
      for (float label_smoothing : {0.0f, 0.1f, 1.0f}) {
        compare_with_definition<float>(9, columns, with_bias, label_smoothing);
        compare_with_definition<bfloat16>(9, columns, with_bias, label_smoothing);
      }
    }
  }
}

TEST(CrossEntropy, WithoutGradientLeavesTheLogits) {
  Problem<float> problem(8, 77);
  const std::vector<float> before = problem.logits;
  Serial serial;
  CrossEntropy<float> arguments = problem.arguments(true, 0.1f, 1.0f);
  arguments.grad = nullptr;
  const CrossEntropySums alone = run(arguments, serial);
  EXPECT_EQ(problem.logits, before);
  const CrossEntropySums with_gradient = run(problem.arguments(true, 0.1f, 1.0f), serial);
  EXPECT_EQ(alone.loss, with_gradient.loss);
  EXPECT_EQ(alone.nll, with_gradient.nll);
  EXPECT_EQ(alone.correct, with_gradient.correct);
}

TEST(CrossEntropy, SameBitsForAnyThreadCount) {
  std::vector<std::vector<float>> results;
  for (int threads : {1, 2, 4}) {
    Problem<float> problem(200, 1000);
    ThreadPool pool(threads);
    const CrossEntropySums sums = run(problem.arguments(false, 0.1f, 0.5f), pool);
    std::vector<float> columns(1000);
    cross_entropy_kernels().column_sum_float32(problem.logits.data(), problem.stride, 200, 1000,
                                               false, columns.data(), pool);
    problem.logits.insert(problem.logits.end(), columns.begin(), columns.end());
    problem.logits.push_back(static_cast<float>(sums.loss));
    results.push_back(problem.logits);
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

TEST(CrossEntropy, NothingToDo) {
  Serial serial;
  EXPECT_EQ(run(CrossEntropy<float>{}, serial).loss, 0.0);
  cross_entropy_kernels().column_sum_float32(nullptr, 0, 0, 0, false, nullptr, serial);
}

}  // namespace
}  // namespace transformer_ext
