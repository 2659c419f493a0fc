#include "activation/activation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "common/thread_pool.h"

namespace transformer_ext {
namespace {

double exact(Activation kind, double x) {
  switch (kind) {
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    default:
      return x / (1 + std::exp(-x));
  }
}

TEST(Activation, ValuesAndSlopes) {
  Serial serial;
  std::vector<float> x;
  for (int i = -1200; i <= 1200; ++i) x.push_back(static_cast<float>(i) * 0.01f);
  const int64_t columns = static_cast<int64_t>(x.size());
  const std::vector<float> ones(x.size(), 1.0f);
  std::vector<float> out(x.size()), slope(x.size());
  for (const Activation kind :
       {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu}) {
    activation_kernels().forward_f32({x.data(), nullptr, out.data(), 1, columns, kind, Dropout{}},
                                     serial);
    activation_kernels().backward_f32(
        {ones.data(), kind == Activation::relu ? out.data() : x.data(), nullptr, slope.data(),
         nullptr, 1, columns, kind, Dropout{}},
        serial);
    for (size_t i = 0; i < x.size(); ++i) {
      const double v = x[i];
      const double scale = std::fmax(1.0, std::fabs(v));
      EXPECT_NEAR(out[i], exact(kind, v), 3e-7 * scale) << v;
      if (kind == Activation::relu && v == 0) continue;
      EXPECT_NEAR(slope[i], (exact(kind, v + 1e-5) - exact(kind, v - 1e-5)) / 2e-5, 1e-6) << v;
    }
  }
}

TEST(Activation, GatedKindsMultiplyTheSecondHalf) {
  Serial serial;
  const std::vector<float> x = {2.0f, -1.0f, 0.5f, 3.0f, 5.0f, 7.0f};
  std::vector<float> out(3);
  activation_kernels().forward_f32(
      {x.data(), nullptr, out.data(), 1, 3, Activation::reglu, Dropout{}}, serial);
  EXPECT_EQ(out, (std::vector<float>{6.0f, 0.0f, 3.5f}));
}

TEST(Activation, ANanIsNotHidden) {
  Serial serial;
  const std::vector<float> x(5, std::numeric_limits<float>::quiet_NaN());
  std::vector<float> out(5);
  for (int kind = 0; kind < 4; ++kind) {
    activation_kernels().forward_f32(
        {x.data(), nullptr, out.data(), 1, 5, static_cast<Activation>(kind), Dropout{}}, serial);
    for (const float y : out) EXPECT_TRUE(std::isnan(y));
  }
}

TEST(Activation, ReluBackwardNeedsOnlyTheOutput) {
  Serial serial;
  const int64_t rows = 5, columns = 83;
  const int64_t rng[3] = {1, 2, 3};
  const Dropout dropout = make_dropout(rng, 4, 0.3);
  std::vector<float> x, grad;
  for (int64_t i = 0; i < rows * columns; ++i) {
    x.push_back(std::sin(static_cast<float>(i)));
    grad.push_back(std::cos(static_cast<float>(i)));
  }
  const std::vector<float> bias(static_cast<size_t>(columns), 0.1f);
  std::vector<float> out(x.size()), grad_x(x.size()), grad_bias(bias.size());
  activation_kernels().forward_f32(
      {x.data(), bias.data(), out.data(), rows, columns, Activation::relu, dropout}, serial);
  activation_kernels().backward_f32({grad.data(), out.data(), nullptr, grad_x.data(),
                                     grad_bias.data(), rows, columns, Activation::relu, dropout},
                                    serial);
  for (int64_t c = 0; c < columns; ++c) {
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const size_t at = static_cast<size_t>(row * columns + c);
      const bool open = x[at] + 0.1f > 0 && dropout_keeps(dropout, row, c);
      EXPECT_EQ(grad_x[at], open ? grad[at] * dropout.scale : 0.0f);
      sum += grad_x[at];
    }
    EXPECT_NEAR(grad_bias[static_cast<size_t>(c)], sum, 1e-5);
  }
}

TEST(Activation, SameBitsForAnyThreadCount) {
  const int64_t rows = 301, columns = 515;
  std::vector<float> x, grad;
  for (int64_t i = 0; i < rows * columns * 2; ++i) x.push_back(std::sin(static_cast<float>(i)));
  for (int64_t i = 0; i < rows * columns; ++i) grad.push_back(std::cos(static_cast<float>(i)));
  const std::vector<float> bias(static_cast<size_t>(2 * columns), 0.1f);
  const int64_t rng[3] = {1, 2, 3};
  std::vector<std::vector<float>> results;
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    std::vector<float> grad_x(x.size()), grad_bias(bias.size());
    activation_kernels().backward_f32(
        {grad.data(), x.data(), bias.data(), grad_x.data(), grad_bias.data(), rows, columns,
         Activation::swiglu, make_dropout(rng, 4, 0.1)},
        pool);
    grad_x.insert(grad_x.end(), grad_bias.begin(), grad_bias.end());
    results.push_back(grad_x);
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

}  // namespace
}  // namespace transformer_ext
