#include "cross_entropy/cross_entropy_cuda.h"

#include <cmath>

#include "cross_entropy/cross_entropy.h"
#include "testing/cuda_test.h"

namespace transformer_ext {
namespace {

using namespace cuda_test;

constexpr int64_t kIgnored = -100;
constexpr int64_t kRowCount = 5;

// Row 1 has no target and holds NaN; the target of row 2 is its greatest logit, those of row 3 are
// all equal, one of row 4 is -infinity.
template <class T>
void compare_with_cpu(int64_t columns, float smoothing, bool with_bias, bool in_place,
                      int64_t offset) {
  SCOPED_TRACE(testing::Message() << columns << " columns, smoothing " << smoothing << ", bias "
                                  << with_bias << ", in place " << in_place << ", offset "
                                  << offset);
  std::vector<float> exact = random_values(size_t(kRowCount * columns), 1, 3.0f);
  std::vector<int64_t> targets = {0, kIgnored, columns / 2, columns - 1, columns / 3};
  std::fill_n(exact.begin() + columns, columns, kNan);
  exact[size_t(2 * columns + targets[2])] = 20.0f;
  std::fill_n(exact.begin() + 3 * columns, columns, 0.5f);
  if (smoothing == 0.0f && columns > 4) {
    exact[size_t(5 * columns - 1)] = -std::numeric_limits<float>::infinity();
  }
  const std::vector<float> bias = random_values(size_t(columns), 2);
  const float scale = 0.25f;

  std::vector<double> sums;
  const std::vector<T> got = for_each_schedule([&] {
    std::vector<T> logits = convert<T>(exact);
    logits.insert(logits.begin(), size_t(offset), rounded<T>(0.0f));
    std::vector<T> grad(logits.size(), rounded<T>(kNan));
    std::vector<float> row_sums(size_t(3 * kRowCount), kNan);
    sums.assign(3, 0.0);
    CrossEntropyCuda a;
    a.logits = logits.data() + offset;
    a.logits_stride = a.grad_stride = columns;
    a.grad = (in_place ? logits : grad).data() + offset;
    a.bias = with_bias ? bias.data() : nullptr;
    a.targets = targets.data();
    a.rows = kRowCount;
    a.columns = columns;
    a.label_smoothing = smoothing;
    a.scale = &scale;
    a.row_sums = row_sums.data();
    a.sums = sums.data();
    EXPECT_LAUNCHED(cross_entropy_cuda(a, float_type<T>(), nullptr));
    return std::vector<T>((in_place ? logits : grad).begin() + offset,
                          (in_place ? logits : grad).end());
  });

  const std::vector<float> rounded_logits = widen(convert<T>(exact));
  std::vector<float> grad(exact.size());
  CrossEntropy<float> a;
  a.logits = rounded_logits.data();
  a.logits_stride = a.grad_stride = columns;
  a.grad = grad.data();
  a.bias = with_bias ? bias.data() : nullptr;
  a.targets = targets.data();
  a.rows = kRowCount;
  a.columns = columns;
  a.label_smoothing = smoothing;
  a.scale = scale;
  Serial serial;
  const CrossEntropySums expected = cross_entropy_kernels().cross_entropy_float32(a, serial);
  EXPECT_NEAR(sums[0], expected.loss, 1e-5 * (1 + std::fabs(expected.loss)));
  EXPECT_NEAR(sums[1], expected.nll, 1e-5 * (1 + std::fabs(expected.nll)));
  EXPECT_EQ(sums[2], expected.correct);
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(value(got[i]), grad[i], (2 * unit<T>() + 1e-6) * (0.01 + std::fabs(grad[i])) + 1e-7)
        << i;
    if (int64_t(i) / columns == 1) {
      ASSERT_EQ(value(got[i]), 0.0f) << i;
    }
  }
}

template <class T>
void compare_all() {
  for (const int64_t columns : {1, 3, 64, 1000, 2049}) {
    compare_with_cpu<T>(columns, 0.1f, false, true, 0);
    compare_with_cpu<T>(columns, 0.0f, true, false, 0);
  }
  compare_with_cpu<T>(64, 0.1f, true, true, 1);
  compare_with_cpu<T>(4200, 0.1f, false, true, 0);
}

TEST(CrossEntropyCuda, AgreesWithTheCpuInFloat32) { compare_all<float>(); }
TEST(CrossEntropyCuda, AgreesWithTheCpuInBfloat16) { compare_all<bfloat16>(); }
TEST(CrossEntropyCuda, AgreesWithTheCpuInFloat16) { compare_all<half>(); }

TEST(CrossEntropyCuda, ATargetOutsideOfTheVocabularyIsNan) {
  const std::vector<float> logits = random_values(20, 3);
  std::vector<float> grad(20, kNan), row_sums(6);
  const std::vector<int64_t> targets = {4, 10};
  std::vector<double> sums(3);
  CrossEntropyCuda a;
  a.logits = logits.data();
  a.logits_stride = a.grad_stride = 10;
  a.grad = grad.data();
  a.targets = targets.data();
  a.rows = 2;
  a.columns = 10;
  a.row_sums = row_sums.data();
  a.sums = sums.data();
  EXPECT_LAUNCHED(cross_entropy_cuda(a, FloatType::float32, nullptr));
  EXPECT_TRUE(std::isnan(sums[0]) && std::isnan(sums[1]));
  for (int i = 0; i < 20; ++i) EXPECT_EQ(grad[size_t(i)] == 0.0f, i >= 10);
}

// What a GPU's sums are of rows that hold -infinity alone, and of rows without a word.
TEST(CrossEntropyCuda, RowsWithoutANumber) {
  const float none = -std::numeric_limits<float>::infinity();
  const std::vector<float> logits(20, none);
  std::vector<float> row_sums(6, 7.0f);
  const std::vector<int64_t> targets = {4, -100};
  std::vector<double> sums(3);
  CrossEntropyCuda a;
  a.logits = logits.data();
  a.logits_stride = a.grad_stride = 10;
  a.targets = targets.data();
  a.rows = 2;
  a.row_sums = row_sums.data();
  a.sums = sums.data();
  for (const int64_t columns : {10, 0}) {
    a.columns = columns;
    EXPECT_LAUNCHED(cross_entropy_cuda(a, FloatType::float32, nullptr));
    EXPECT_TRUE(std::isnan(sums[0]) && std::isnan(sums[1])) << columns;
    EXPECT_EQ(sums[2], 0.0) << columns;
  }
}

TEST(CrossEntropyCuda, WithoutRowsTheSumsAreZero) {
  std::vector<double> sums(3, 7.0);
  CrossEntropyCuda a;
  a.columns = 10;
  a.sums = sums.data();
  EXPECT_LAUNCHED(cross_entropy_cuda(a, FloatType::float32, nullptr));
  EXPECT_EQ(sums, std::vector<double>(3, 0.0));
}

}  // namespace
}  // namespace transformer_ext
