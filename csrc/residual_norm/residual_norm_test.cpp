#include "residual_norm/residual_norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "common/thread_pool.h"

namespace transformer_ext {
namespace {

std::vector<float> normal(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> x(static_cast<size_t>(count));
  for (float& value : x) value = distribution(generator);
  return x;
}

Dropout dropout_of(double p) {
  const int64_t rng[3] = {11, 5, 2};
  return make_dropout(rng, 3, p);
}

// The mask that the kernel applies is the scalar one, whatever the instruction set.
TEST(ResidualNorm, DropoutIsThatOfTheScalarGenerator) {
  ThreadPool pool(2);
  for (const int64_t columns : {1, 8, 63, 64, 65, 200}) {
    const int64_t rows = 13;
    const std::vector<float> x(static_cast<size_t>(rows * columns), 1.0f);
    std::vector<float> out(x.size());
    const Dropout dropout = dropout_of(0.3);
    residual_norm_kernels().dropout_f32({x.data(), nullptr, out.data(), rows, columns, dropout},
                                        pool);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < columns; ++c) {
        EXPECT_EQ(out[static_cast<size_t>(row * columns + c)],
                  dropout_keeps(dropout, row, c) ? dropout.scale : 0.0f);
      }
    }
  }
}

struct Result {
  std::vector<float> sum, normed, mean, rstd, grad_x, grad_residual, grad_weight, grad_bias;
  bool operator==(const Result&) const = default;
};

Result run(int64_t rows, int64_t columns, bool rms, double p, Parallel& parallel) {
  const size_t size = static_cast<size_t>(rows * columns);
  const auto x = normal(rows * columns, 1);
  const auto residual = normal(rows * columns, 2);
  const auto weight = normal(columns, 3);
  const auto bias = normal(columns, 4);
  const auto grad = normal(rows * columns, 5);
  const auto grad_sum = normal(rows * columns, 6);
  const Dropout dropout = dropout_of(p);
  Result r;
  for (auto* m : {&r.sum, &r.normed, &r.grad_x, &r.grad_residual}) m->resize(size);
  for (auto* m : {&r.mean, &r.rstd}) m->resize(static_cast<size_t>(rows));
  for (auto* m : {&r.grad_weight, &r.grad_bias}) m->resize(static_cast<size_t>(columns));
  residual_norm_kernels().forward_f32(
      {x.data(), residual.data(), weight.data(), bias.data(), r.sum.data(), r.normed.data(),
       r.mean.data(), r.rstd.data(), rows, columns, rms, 1e-5f, dropout},
      parallel);
  residual_norm_kernels().backward_f32(
      {grad.data(), grad_sum.data(), r.sum.data(), rms ? nullptr : r.mean.data(), r.rstd.data(),
       weight.data(), r.grad_x.data(), r.grad_residual.data(), r.grad_weight.data(),
       r.grad_bias.data(), rows, columns, rms, dropout},
      parallel);
  return r;
}

TEST(ResidualNorm, SameBitsForAnyThreadCount) {
  Serial serial;
  for (const bool rms : {false, true}) {
    const Result one = run(301, 515, rms, 0.1, serial);
    for (const int threads : {2, 4}) {
      ThreadPool pool(threads);
      EXPECT_TRUE(run(301, 515, rms, 0.1, pool) == one) << threads << " threads";
    }
  }
}

TEST(ResidualNorm, NormedRowsHaveMeanZeroAndVarianceOne) {
  Serial serial;
  const int64_t rows = 3, columns = 77;
  const auto x = normal(rows * columns, 1);
  std::vector<float> normed(x.size());
  residual_norm_kernels().forward_f32({x.data(), nullptr, nullptr, nullptr, nullptr, normed.data(),
                                       nullptr, nullptr, rows, columns, false, 0.0f, Dropout{}},
                                      serial);
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0, squares = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const double v = normed[static_cast<size_t>(row * columns + c)];
      sum += v;
      squares += v * v;
    }
    EXPECT_NEAR(sum, 0.0, 1e-5);
    EXPECT_NEAR(squares / static_cast<double>(columns), 1.0, 1e-6);
  }
}

// The gradient of x from a difference of the loss sum(grad * normed) + sum(grad_sum * sum).
TEST(ResidualNorm, GradientIsThatOfADifference) {
  Serial serial;
  const int64_t rows = 2, columns = 19;
  const size_t size = static_cast<size_t>(rows * columns);
  auto x = normal(rows * columns, 1);
  const auto weight = normal(columns, 3);
  const auto grad = normal(rows * columns, 5);
  std::vector<float> sum(size), normed(size), mean(2), rstd(2), grad_x(size), grad_residual(size);
  const Dropout dropout = dropout_of(0.25);
  for (const bool rms : {false, true}) {
    const auto forward = [&] {
      residual_norm_kernels().forward_f32(
          {x.data(), nullptr, weight.data(), nullptr, sum.data(), normed.data(), mean.data(),
           rstd.data(), rows, columns, rms, 1e-5f, dropout},
          serial);
      double loss = 0;
      for (size_t i = 0; i < size; ++i) loss += static_cast<double>(grad[i]) * normed[i];
      return loss;
    };
    forward();
    residual_norm_kernels().backward_f32(
        {grad.data(), nullptr, sum.data(), rms ? nullptr : mean.data(), rstd.data(), weight.data(),
         grad_x.data(), nullptr, nullptr, nullptr, rows, columns, rms, dropout},
        serial);
    for (size_t i = 0; i < size; ++i) {
      const float before = x[i];
      x[i] = before + 0.01f;
      const double up = forward();
      x[i] = before - 0.01f;
      const double down = forward();
      x[i] = before;
      EXPECT_NEAR(grad_x[i], (up - down) / 0.02, 5e-3) << i;
    }
  }
}

}  // namespace
}  // namespace transformer_ext
