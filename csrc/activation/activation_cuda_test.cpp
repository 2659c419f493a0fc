#include "activation/activation_cuda.h"

#include <cmath>

#include "activation/activation.h"
#include "testing/cuda_test.h"

namespace transformer_ext {
namespace {

using namespace cuda_test;

const int64_t kRng[3] = {0x9876543210, 3, 1};
constexpr int64_t kSite = 11;

struct Size {
  int64_t rows;
  int64_t columns;
};

// Vectors and single elements; more columns than a tile has, more rows than one tile takes.
constexpr Size kSizes[] = {{5, 8}, {1, 1}, {70, 37}, {9, 264}, {34, 301}};

struct Inputs {
  std::vector<float> x, bias, grad;
  Dropout dropout;

  Inputs(Size size, int factor, double p) : dropout(make_dropout(kRng, kSite, p)) {
    x = random_values(size.rows * size.columns * factor, 1, 2.0f);
    bias = random_values(size.columns * factor, 2);
    grad = random_values(size.rows * size.columns, 3);
    for (size_t i = 0; p > 0 && i < grad.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i) / size.columns;
      if (!dropout_keeps(dropout, row, static_cast<int64_t>(i) % size.columns)) grad[i] = kNan;
    }
  }
};

template <class T>
void compare(Activation kind, Size size, bool with_bias, double p) {
  SCOPED_TRACE(testing::Message() << "kind " << static_cast<int>(kind) << ", " << size.rows << " x "
                                  << size.columns << ", bias " << with_bias << ", p " << p);
  const int factor = is_gated(kind) ? 2 : 1;
  const Inputs input(size, factor, p);
  const std::vector<T> x = convert<T>(input.x);
  const std::vector<T> grad = convert<T>(input.grad);
  const float* const bias = with_bias ? input.bias.data() : nullptr;
  const CudaDropout cuda = cuda_dropout(p > 0 ? kRng : nullptr, kSite, p);
  const size_t bias_size = with_bias ? input.bias.size() : 0;

  std::vector<T> out, grad_x;
  std::vector<float> grad_bias;
  for_each_schedule([&] {
    out.assign(grad.size(), rounded<T>(kNan));
    grad_x.assign(x.size(), rounded<T>(kNan));
    grad_bias.assign(bias_size, kNan);
    std::vector<float> scratch(
        with_bias ? activation_backward_scratch(size.rows, size.columns, kind) : 0, kNan);
    EXPECT_LAUNCHED(
        activation_forward_cuda({x.data(), bias, out.data(), size.rows, size.columns, kind, cuda},
                                float_type<T>(), nullptr));
    const T* const saved = kind == Activation::relu ? out.data() : x.data();
    EXPECT_LAUNCHED(activation_backward_cuda(
        {grad.data(), saved, bias, grad_x.data(), with_bias ? grad_bias.data() : nullptr,
         scratch.data(), size.rows, size.columns, kind, cuda},
        float_type<T>(), nullptr));
    std::vector<float> all = widen(out);
    const std::vector<float> wide = widen(grad_x);
    all.insert(all.end(), wide.begin(), wide.end());
    all.insert(all.end(), grad_bias.begin(), grad_bias.end());
    return all;
  });

  Serial serial;
  const Dropout dropout = p > 0 ? input.dropout : Dropout{};
  const std::vector<float> wide_x = widen(x), wide_grad = widen(grad), wide_out = widen(out);
  std::vector<float> expected(grad.size()), expected_x(x.size()), expected_bias(bias_size);
  activation_kernels().forward_f32(
      {wide_x.data(), bias, expected.data(), size.rows, size.columns, kind, dropout}, serial);
  activation_kernels().backward_f32(
      {wide_grad.data(), kind == Activation::relu ? wide_out.data() : wide_x.data(), bias,
       expected_x.data(), with_bias ? expected_bias.data() : nullptr, size.rows, size.columns, kind,
       dropout},
      serial);
  const double relative = 2 * unit<T>() + 2e-6;
  expect_near(out, expected, relative, "out");
  expect_near(grad_x, expected_x, relative, "grad_x");
  expect_near(grad_bias, expected_bias, 3e-5, "grad_bias");
  for (size_t i = 0; p > 0 && i < out.size(); ++i) {
    if (std::isnan(input.grad[i])) {
      EXPECT_EQ(value(out[i]), 0.0f) << i;
    }
  }
  for (T v : grad_x) EXPECT_FALSE(std::isnan(value(v)));
}

template <class T>
void compare_all() {
  for (int kind = 0; kind < kActivations; ++kind) {
    for (Size size : kSizes) {
      compare<T>(static_cast<Activation>(kind), size, size.columns != 8, 0.25);
    }
    compare<T>(static_cast<Activation>(kind), {3, 24}, true, 0.0);
  }
}

TEST(ActivationCuda, AgreesWithTheCpuInFloat32) { compare_all<float>(); }
TEST(ActivationCuda, AgreesWithTheCpuInBfloat16) { compare_all<bfloat16>(); }
TEST(ActivationCuda, AgreesWithTheCpuInFloat16) { compare_all<half>(); }

TEST(ActivationCuda, NanPassesRelu) {
  const std::vector<float> x = {kNan, -1.0f, 2.0f};
  std::vector<float> out(3);
  EXPECT_LAUNCHED(activation_forward_cuda(
      {x.data(), nullptr, out.data(), 1, 3, Activation::relu, {}}, FloatType::float32, nullptr));
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_EQ(out[1], 0.0f);
  EXPECT_EQ(out[2], 2.0f);
}

TEST(ActivationCuda, WithoutRowsTheBiasGetsZeros) {
  std::vector<float> grad_bias(6, kNan);
  ActivationBackwardCuda a;
  a.kind = Activation::swiglu;
  a.columns = 3;
  a.grad_bias = grad_bias.data();
  EXPECT_LAUNCHED(activation_backward_cuda(a, FloatType::float32, nullptr));
  EXPECT_EQ(grad_bias, std::vector<float>(6, 0.0f));
}

}  // namespace
}  // namespace transformer_ext
