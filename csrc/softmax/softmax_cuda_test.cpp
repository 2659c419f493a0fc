#include "softmax/softmax_cuda.h"

#include "testing/cuda_test.h"

namespace transformer_ext {
namespace {

using namespace cuda_test;

template <class T>
constexpr SoftmaxType type_of() {
  if (std::is_same_v<T, float>) return SoftmaxType::float32;
  return std::is_same_v<T, half> ? SoftmaxType::float16 : SoftmaxType::bfloat16;
}

// Shape [batch, queries, keys]; a row without a kept slot, and NaN in what is not kept.
struct Problem {
  static constexpr int64_t kBatch = 3, kQueries = 2;
  int64_t keys;
  bool masked;
  std::vector<uint8_t> mask;
  std::vector<int64_t> lengths;
  std::vector<float> x, grad;

  Problem(int64_t keys, bool masked) : keys(keys), masked(masked) {
    std::mt19937 random(static_cast<unsigned>(keys));
    for (int64_t i = 0; i < kBatch * keys; ++i) mask.push_back(random() % 4 != 0);
    for (int64_t b = 0; b < kBatch; ++b) lengths.push_back(b == 1 ? 0 : keys - keys / 3);
    x = random_values(kBatch * kQueries * keys, 1, 4.0f);
    grad = random_values(x.size(), 2);
    for (int64_t row = 0; masked && row < rows(); ++row) {
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t b = row / kQueries;
        if (mask[b * keys + j] == 0 || j >= lengths[b]) x[row * keys + j] = kNan;
        if (std::isnan(x[row * keys + j])) grad[row * keys + j] = kNan;
      }
    }
  }

  int64_t rows() const { return kBatch * kQueries; }

  SoftmaxMask keep() const {
    SoftmaxMask keep;
    if (!masked) return keep;
    keep.mask = mask.data();
    keep.dims = 2;
    keep.sizes[0] = kBatch;
    keep.sizes[1] = kQueries;
    keep.strides[0] = keys;
    keep.column_stride = 1;
    keep.key_lengths = lengths.data();
    return keep;
  }
};

template <class T>
void compare_with_cpu(int64_t keys, bool masked, bool log) {
  SCOPED_TRACE(testing::Message() << keys << " keys, masked " << masked << ", log " << log);
  const Problem problem(keys, masked);
  const std::vector<T> x = convert<T>(problem.x);
  const std::vector<T> grad = convert<T>(problem.grad);
  const std::vector<T> both = for_each_schedule([&] {
    std::vector<T> out(x.size(), rounded<T>(kNan)), grad_x = out;
    EXPECT_LAUNCHED(softmax_forward_cuda(
        {x.data(), out.data(), problem.rows(), keys, problem.keep(), log}, type_of<T>(), nullptr));
    EXPECT_LAUNCHED(
        softmax_backward_cuda({grad.data(), out.data(), grad_x.data(), problem.rows(), keys, log},
                              type_of<T>(), nullptr));
    out.insert(out.end(), grad_x.begin(), grad_x.end());
    return out;
  });
  Serial serial;
  const std::vector<float> wide_x = widen(x), wide_grad = widen(grad);
  std::vector<float> out(x.size()), grad_x(x.size());
  softmax_kernels().forward({wide_x.data(), out.data(), problem.rows(), keys, problem.keep(), log},
                            SoftmaxType::float32, serial);
  softmax_kernels().backward(
      {wide_grad.data(), out.data(), grad_x.data(), problem.rows(), keys, log},
      SoftmaxType::float32, serial);
  for (size_t i = 0; i < x.size(); ++i) {
    const float got = value(both[i]), got_grad = value(both[x.size() + i]);
    if (std::isinf(out[i]) || out[i] == 0.0f) {
      EXPECT_EQ(got, out[i]) << i;
    } else {
      EXPECT_NEAR(got, out[i], (2 * unit<T>() + 1e-6) * (1 + std::fabs(out[i]))) << i;
    }
    EXPECT_NEAR(got_grad, grad_x[i], (8 * unit<T>() + 4e-6) * (1 + std::fabs(grad_x[i]))) << i;
    if (masked && std::isnan(problem.x[i])) {
      EXPECT_EQ(got_grad, 0.0f) << i;
    }
  }
}

template <class T>
void compare_all() {
  // One warp a row with vectors and without, one block a row.
  for (int64_t keys : {1, 3, 64, 129, 500, 1024, 1500}) {
    for (bool masked : {false, true}) {
      for (bool log : {false, true}) compare_with_cpu<T>(keys, masked, log);
    }
  }
}

TEST(SoftmaxCuda, AgreesWithTheCpuInFloat32) { compare_all<float>(); }
TEST(SoftmaxCuda, AgreesWithTheCpuInBfloat16) { compare_all<bfloat16>(); }
TEST(SoftmaxCuda, AgreesWithTheCpuInFloat16) { compare_all<half>(); }

TEST(SoftmaxCuda, ReadsRowsThatAreNotAligned) {
  std::vector<float> x = random_values(5 * 8 + 1, 4);
  std::vector<float> out(x.size()), expected(5 * 8);
  EXPECT_LAUNCHED(softmax_forward_cuda({x.data() + 1, out.data() + 1, 5, 8, {}, false},
                                       SoftmaxType::float32, nullptr));
  Serial serial;
  softmax_kernels().forward({x.data() + 1, expected.data(), 5, 8, {}, false}, SoftmaxType::float32,
                            serial);
  for (int i = 0; i < 40; ++i) EXPECT_NEAR(out[i + 1], expected[i], 1e-6);
}

}  // namespace
}  // namespace transformer_ext
