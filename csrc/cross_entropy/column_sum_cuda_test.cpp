#include "cross_entropy/column_sum_cuda.h"

#include <cmath>

#include "testing/cuda_test.h"

namespace transformer_ext {
namespace {

using namespace cuda_test;

template <class T>
void compare(int64_t rows, int64_t columns, int64_t stride, bool accumulate) {
  SCOPED_TRACE(testing::Message() << rows << " x " << columns << ", stride " << stride
                                  << ", accumulate " << accumulate);
  std::vector<float> wide(rows * stride, kNan);
  const std::vector<float> values = random_values(rows * stride, 1);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) wide[r * stride + c] = values[r * stride + c];
  }
  const std::vector<T> x = convert<T>(wide);
  const std::vector<float> out = for_each_schedule([&] {
    std::vector<float> out(columns, accumulate ? 5.0f : kNan);
    std::vector<float> scratch(column_sum_scratch(rows, columns), kNan);
    EXPECT_LAUNCHED(
        column_sum_cuda({x.data(), stride, rows, columns, accumulate, out.data(), scratch.data()},
                        float_type<T>(), nullptr));
    return out;
  });
  for (int64_t c = 0; c < columns; ++c) {
    double sum = accumulate ? 5.0 : 0.0;
    for (int64_t r = 0; r < rows; ++r) sum += value(x[r * stride + c]);
    EXPECT_NEAR(out[c], sum, 1e-6 * (10 + static_cast<double>(rows))) << c;
  }
}

template <class T>
void compare_all() {
  compare<T>(1, 1, 1, false);
  compare<T>(70, 40, 48, true);
  compare<T>(33, 37, 41, false);
  compare<T>(130, 301, 301, true);
  compare<T>(0, 20, 20, true);
  compare<T>(0, 20, 20, false);
}

TEST(ColumnSumCuda, IsTheSumInFloat32) { compare_all<float>(); }
TEST(ColumnSumCuda, IsTheSumInBfloat16) { compare_all<bfloat16>(); }
TEST(ColumnSumCuda, IsTheSumInFloat16) { compare_all<half>(); }

}  // namespace
}  // namespace transformer_ext
