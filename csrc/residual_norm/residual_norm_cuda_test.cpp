#include "residual_norm/residual_norm_cuda.h"

#include <cmath>

#include "residual_norm/residual_norm.h"
#include "testing/cuda_test.h"

namespace transformer_ext {
namespace {

using namespace cuda_test;

const int64_t kRng[3] = {0x123456789abc, 7, 2};
constexpr int64_t kSite = 5;

struct Case {
  int64_t rows;
  int64_t columns;
  bool residual;
  bool parameters;
  bool rms;
  double p;
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << c.rows << " x " << c.columns << ", residual " << c.residual << ", parameters "
       << c.parameters << ", rms " << c.rms << ", p " << c.p;
}

// Lanes by vectors and without, a warp a row (1, 2, 4 chunks a lane) and a block a row; more rows
// than one block takes; dropout with NaN where it drops.
const Case kCases[] = {
    {5, 8, true, true, false, 0.0},      {3, 1, true, true, false, 0.3},
    {66, 37, true, true, false, 0.3},    {6, 256, false, true, true, 0.0},
    {9, 300, true, false, true, 0.5},    {5, 512, true, true, false, 0.1},
    {4, 1000, false, false, false, 0.2}, {5, 1024, true, true, true, 0.1},
    {3, 1032, true, true, false, 0.1},   {34, 1101, true, true, false, 0.4},
    {2, 1280, false, true, true, 0.0},
};

struct Inputs {
  std::vector<float> x, residual, weight, bias, grad_normed, grad_sum;
  Dropout dropout;

  explicit Inputs(const Case& c) : dropout(make_dropout(kRng, kSite, c.p)) {
    const size_t size = static_cast<size_t>(c.rows * c.columns);
    x = random_values(size, 1);
    residual = random_values(size, 2);
    weight = random_values(static_cast<size_t>(c.columns), 3);
    bias = random_values(static_cast<size_t>(c.columns), 4);
    grad_normed = random_values(size, 5);
    grad_sum = random_values(size, 6);
    for (size_t i = 0; c.p > 0 && i < size; ++i) {
      const int64_t row = static_cast<int64_t>(i) / c.columns;
      if (!dropout_keeps(dropout, row, static_cast<int64_t>(i) % c.columns)) x[i] = kNan;
    }
  }
};

template <class T>
struct Results {
  std::vector<T> out, sum, normed, grad_x, grad_residual;
  std::vector<float> mean, rstd, grad_weight, grad_bias;

  explicit Results(const Case& c)
      : out(c.rows * c.columns, rounded<T>(kNan)),
        sum(out),
        normed(out),
        grad_x(out),
        grad_residual(out),
        mean(c.rows, kNan),
        rstd(mean),
        grad_weight(c.columns, kNan),
        grad_bias(grad_weight) {}

  // All bytes, to be compared between schedules.
  std::vector<float> all() const {
    std::vector<float> values;
    for (const auto* part : {&out, &sum, &normed, &grad_x, &grad_residual}) {
      for (T v : *part) values.push_back(value(v));
    }
    for (const auto* part : {&mean, &rstd, &grad_weight, &grad_bias}) {
      values.insert(values.end(), part->begin(), part->end());
    }
    return values;
  }
};

// `input` in T; sum as the forward pass rounds it.
template <class T>
Results<T> run_cuda(const Case& c, const Inputs& input) {
  const std::vector<T> x = convert<T>(input.x), residual = convert<T>(input.residual);
  const std::vector<T> grad_normed = convert<T>(input.grad_normed);
  const std::vector<T> grad_sum = convert<T>(input.grad_sum);
  const CudaDropout dropout = cuda_dropout(c.p > 0 ? kRng : nullptr, kSite, c.p);
  const bool has_sum = c.residual || c.p > 0;
  Results<T> r(c);
  EXPECT_LAUNCHED(residual_dropout_cuda(
      {x.data(), c.residual ? residual.data() : nullptr, r.out.data(), c.rows, c.columns, dropout},
      float_type<T>(), nullptr));
  EXPECT_LAUNCHED(residual_norm_forward_cuda(
      {x.data(), c.residual ? residual.data() : nullptr,
       c.parameters ? input.weight.data() : nullptr, c.parameters ? input.bias.data() : nullptr,
       has_sum ? r.sum.data() : nullptr, r.normed.data(), c.rms ? nullptr : r.mean.data(),
       r.rstd.data(), c.rows, c.columns, c.rms, 1e-5f, dropout},
      float_type<T>(), nullptr));
  std::vector<float> scratch(residual_norm_backward_scratch(c.rows, c.columns), kNan);
  EXPECT_LAUNCHED(residual_norm_backward_cuda(
      {grad_normed.data(), c.residual ? grad_sum.data() : nullptr,
       has_sum ? r.sum.data() : x.data(), c.rms ? nullptr : r.mean.data(), r.rstd.data(),
       c.parameters ? input.weight.data() : nullptr, c.p > 0 ? r.grad_x.data() : nullptr,
       r.grad_residual.data(), c.parameters ? r.grad_weight.data() : nullptr,
       c.parameters ? r.grad_bias.data() : nullptr, scratch.data(), c.rows, c.columns, c.rms,
       dropout},
      float_type<T>(), nullptr));
  return r;
}

// The CPU's float32 kernels on the same rounded input; `sum` and the statistics are the GPU's, so
// that only the backward pass itself is compared.
template <class T>
Results<float> run_cpu(const Case& c, const Inputs& input, const Results<T>& cuda) {
  Serial serial;
  const std::vector<float> x = widen(convert<T>(input.x));
  const std::vector<float> residual = widen(convert<T>(input.residual));
  const std::vector<float> grad_normed = widen(convert<T>(input.grad_normed));
  const std::vector<float> grad_sum = widen(convert<T>(input.grad_sum));
  const bool has_sum = c.residual || c.p > 0;
  const std::vector<float> sum = has_sum ? widen(cuda.sum) : x;
  const Dropout dropout = c.p > 0 ? input.dropout : Dropout{};
  Results<float> r(c);
  residual_norm_kernels().dropout_f32(
      {x.data(), c.residual ? residual.data() : nullptr, r.out.data(), c.rows, c.columns, dropout},
      serial);
  residual_norm_kernels().forward_f32(
      {x.data(), c.residual ? residual.data() : nullptr,
       c.parameters ? input.weight.data() : nullptr, c.parameters ? input.bias.data() : nullptr,
       has_sum ? r.sum.data() : nullptr, r.normed.data(), c.rms ? nullptr : r.mean.data(),
       r.rstd.data(), c.rows, c.columns, c.rms, 1e-5f, dropout},
      serial);
  residual_norm_kernels().backward_f32(
      {grad_normed.data(), c.residual ? grad_sum.data() : nullptr, sum.data(),
       c.rms ? nullptr : cuda.mean.data(), cuda.rstd.data(),
       c.parameters ? input.weight.data() : nullptr, c.p > 0 ? r.grad_x.data() : nullptr,
       r.grad_residual.data(), c.parameters ? r.grad_weight.data() : nullptr,
       c.parameters ? r.grad_bias.data() : nullptr, c.rows, c.columns, c.rms, dropout},
      serial);
  return r;
}

template <class T>
void compare(const Case& c) {
  SCOPED_TRACE(testing::PrintToString(c));
  const Inputs input(c);
  Results<T> cuda(c);
  for_each_schedule([&] {
    cuda = run_cuda<T>(c, input);
    return cuda.all();
  });
  const Results<float> cpu = run_cpu<T>(c, input, cuda);
  const double relative = 2 * unit<T>() + 1e-6;
  expect_near(cuda.out, cpu.out, relative, "out");
  if (c.residual || c.p > 0) expect_near(cuda.sum, cpu.sum, relative, "sum");
  // The rounding of the sum is divided by the standard deviation of the row, and multiplied by the
  // weight.
  expect_near(cuda.normed, cpu.normed, c.columns == 1 ? 4.0 : 16 * unit<T>() + 1e-5, "normed");
  expect_near(cuda.rstd, cpu.rstd, c.columns == 1 ? 1e9 : 8 * unit<T>() + 1e-5, "rstd");
  const double gradient = 2 * unit<T>() + 1e-5;
  if (c.columns > 1) {
    expect_near(cuda.grad_residual, cpu.grad_residual, gradient, "grad_residual");
    if (c.p > 0) expect_near(cuda.grad_x, cpu.grad_x, gradient, "grad_x");
  }
  for (size_t i = 0; c.p > 0 && i < cuda.grad_x.size(); ++i) {
    if (std::isnan(input.x[i])) {
      EXPECT_EQ(value(cuda.grad_x[i]), 0.0f) << i;
    }
  }
  if (!c.parameters) return;
  expect_near(cuda.grad_weight, cpu.grad_weight, 2e-5, "grad_weight");
  expect_near(cuda.grad_bias, cpu.grad_bias, 2e-5, "grad_bias");
}

class ResidualNormCuda : public testing::TestWithParam<Case> {};
TEST_P(ResidualNormCuda, AgreesWithTheCpuInFloat32) { compare<float>(GetParam()); }
TEST_P(ResidualNormCuda, AgreesWithTheCpuInBfloat16) { compare<bfloat16>(GetParam()); }
TEST_P(ResidualNormCuda, AgreesWithTheCpuInFloat16) { compare<half>(GetParam()); }
INSTANTIATE_TEST_SUITE_P(Cases, ResidualNormCuda, testing::ValuesIn(kCases));

TEST(ResidualNormCudaEdges, RowsThatAreNotAligned) {
  const Case c{3, 16, false, false, false, 0.0};
  const std::vector<float> x = random_values(3 * 16 + 1, 9);
  std::vector<float> normed(x.size(), kNan), expected(3 * 16);
  ResidualNormForwardCuda a;
  a.x = x.data() + 1;
  a.normed = normed.data() + 1;
  a.rows = c.rows;
  a.columns = c.columns;
  a.eps = 1e-5f;
  EXPECT_LAUNCHED(residual_norm_forward_cuda(a, FloatType::float32, nullptr));
  Serial serial;
  residual_norm_kernels().forward_f32({x.data() + 1,
                                       nullptr,
                                       nullptr,
                                       nullptr,
                                       nullptr,
                                       expected.data(),
                                       nullptr,
                                       nullptr,
                                       3,
                                       16,
                                       false,
                                       1e-5f,
                                       {}},
                                      serial);
  for (int i = 0; i < 3 * 16; ++i) EXPECT_NEAR(normed[i + 1], expected[i], 1e-5);
}

TEST(ResidualNormCudaEdges, WithoutRowsTheParametersGetZeros) {
  std::vector<float> weight(5, kNan), bias(5, kNan);
  ResidualNormBackwardCuda a;
  a.grad_weight = weight.data();
  a.grad_bias = bias.data();
  a.columns = 5;
  EXPECT_LAUNCHED(residual_norm_backward_cuda(a, FloatType::float32, nullptr));
  EXPECT_EQ(weight, std::vector<float>(5, 0.0f));
  EXPECT_EQ(bias, std::vector<float>(5, 0.0f));
}

}  // namespace
}  // namespace transformer_ext
