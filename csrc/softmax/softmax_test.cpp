#include "softmax/softmax.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "common/bfloat16.h"
#include "common/thread_pool.h"

namespace transformer_ext {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Shape [batch, heads, queries, keys], a mask [batch, 1, 1, keys] with NaN in the masked slots.
struct Problem {
  static constexpr int64_t kBatch = 3, kHeads = 2, kQueries = 5;
  int64_t keys;
  std::vector<float> x, grad;
  std::vector<uint8_t> mask;
  std::vector<int64_t> lengths;

  explicit Problem(int64_t keys, unsigned seed = 1) : keys(keys) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 4.0f);
    for (int64_t i = 0; i < kBatch * keys; ++i) mask.push_back(random() % 4 != 0);
    for (int64_t b = 0; b < kBatch; ++b) lengths.push_back(b == 1 ? 0 : 1 + (random() % keys));
    for (int64_t row = 0; row < rows(); ++row) {
      for (int64_t j = 0; j < keys; ++j) {
        x.push_back(kept(row, j) ? normal(random) : kNan);
        grad.push_back(kept(row, j) ? normal(random) : kNan);
      }
    }
  }

  int64_t rows() const { return kBatch * kHeads * kQueries; }

  bool kept(int64_t row, int64_t key) const {
    const int64_t b = row / (kHeads * kQueries);
    return mask[b * keys + key] != 0 && key < lengths[b] && key <= row % kQueries;
  }

  SoftmaxMask keep() const {
    SoftmaxMask keep;
    keep.mask = mask.data();
    keep.dims = 3;
    const int64_t sizes[] = {kBatch, kHeads, kQueries};
    for (int d = 0; d < 3; ++d) keep.sizes[d] = sizes[d];
    keep.strides[0] = keys;
    keep.column_stride = 1;
    keep.key_lengths = lengths.data();
    keep.causal = true;
    return keep;
  }
};

template <class T>
constexpr SoftmaxType type_of() {
  return std::is_same_v<T, float> ? SoftmaxType::float32 : SoftmaxType::bfloat16;
}

template <class T>
std::vector<T> convert(const std::vector<float>& x) {
  std::vector<T> out;
  for (float v : x) out.push_back(from_float<T>(v));
  return out;
}

template <class T>
void compare_with_definition(int64_t keys, bool log) {
  SCOPED_TRACE(testing::Message() << keys << " keys, log " << log);
  const Problem problem(keys);
  const int64_t rows = problem.rows();
  const std::vector<T> x = convert<T>(problem.x);
  const std::vector<T> grad = convert<T>(problem.grad);
  std::vector<T> out(x.size()), grad_x(x.size());
  ThreadPool pool(2);
  SoftmaxForward forward{x.data(), out.data(), rows, keys, problem.keep(), log};
  softmax_kernels().forward(forward, type_of<T>(), pool);
  SoftmaxBackward backward{grad.data(), out.data(), grad_x.data(), rows, keys, log};
  softmax_kernels().backward(backward, type_of<T>(), pool);

  const double relative = std::is_same_v<T, float> ? 2e-6 : 8e-3;
  for (int64_t r = 0; r < rows; ++r) {
    double top = -kInfinity, sum = 0, dot = 0, grad_sum = 0;
    for (int64_t j = 0; j < keys; ++j) {
      if (problem.kept(r, j)) top = std::fmax(top, to_float(x[r * keys + j]));
    }
    for (int64_t j = 0; j < keys; ++j) {
      if (problem.kept(r, j)) sum += std::exp(to_float(x[r * keys + j]) - top);
    }
    for (int64_t j = 0; j < keys; ++j) {
      if (!problem.kept(r, j)) continue;
      dot += to_float(grad[r * keys + j]) * std::exp(to_float(x[r * keys + j]) - top) / sum;
      grad_sum += to_float(grad[r * keys + j]);
    }
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t i = r * keys + j;
      if (!problem.kept(r, j)) {
        EXPECT_EQ(to_float(out[i]), log && sum > 0 ? -kInfinity : 0.0f) << r << ", " << j;
        EXPECT_EQ(to_float(grad_x[i]), 0.0f) << r << ", " << j;
        continue;
      }
      const double p = std::exp(to_float(x[i]) - top) / sum;
      const double y = log ? std::log(p) : p;
      const double g = log ? to_float(grad[i]) - p * grad_sum : p * (to_float(grad[i]) - dot);
      EXPECT_NEAR(to_float(out[i]), y, relative * (1 + std::fabs(y))) << r << ", " << j;
      EXPECT_NEAR(to_float(grad_x[i]), g, 4 * relative * (4 + std::fabs(grad_sum)))
          << r << ", " << j;
    }
  }
}

TEST(Softmax, FollowsItsDefinition) {
  for (int64_t keys : {1, 2, 7, 16, 33, 64, 65, 200}) {
    for (bool log : {false, true}) {
      compare_with_definition<float>(keys, log);
      compare_with_definition<bfloat16>(keys, log);
    }
  }
}

TEST(Softmax, AMaskOfOneValueARowIsBroadcast) {
  const std::vector<float> x(4 * 40, 1.0f);
  const std::vector<uint8_t> mask = {1, 0, 0, 1};
  std::vector<float> out(x.size(), kNan);
  SoftmaxForward forward{x.data(), out.data(), 4, 40, {}, false};
  forward.keep.mask = mask.data();
  forward.keep.dims = 1;
  forward.keep.sizes[0] = 4;
  forward.keep.strides[0] = 1;
  Serial serial;
  softmax_kernels().forward(forward, SoftmaxType::float32, serial);
  for (int64_t i = 0; i < 4 * 40; ++i) {
    EXPECT_FLOAT_EQ(out[i], mask[i / 40] ? 1.0f / 40 : 0.0f);
  }
}

// A NaN of the scores themselves, as a training that diverges has it: the kept slots of its row
// tell, the masked ones stay as they are, and no other row knows.
TEST(Softmax, ANanLeavesMaskedSlotsAsTheyAre) {
  for (const bool log : {false, true}) {
    for (const int64_t keys : {7, 33}) {
      SCOPED_TRACE(testing::Message() << keys << " keys, log " << log);
      std::vector<float> x(2 * keys, 1.0f), out(x.size());
      x[1] = kNan;
      std::vector<uint8_t> mask(keys, 1);
      mask[0] = mask[keys - 2] = 0;
      SoftmaxForward forward{x.data(), out.data(), 2, keys, {}, log};
      forward.keep.mask = mask.data();
      forward.keep.column_stride = 1;
      Serial serial;
      softmax_kernels().forward(forward, SoftmaxType::float32, serial);
      const float kept = 1.0f / static_cast<float>(keys - 2);
      for (int64_t j = 0; j < keys; ++j) {
        if (mask[j]) {
          EXPECT_TRUE(std::isnan(out[j])) << j;
          EXPECT_NEAR(out[keys + j], log ? std::log(kept) : kept, 1e-6) << j;
        } else {
          EXPECT_EQ(out[j], log ? -kInfinity : 0.0f) << j;
          EXPECT_EQ(out[keys + j], log ? -kInfinity : 0.0f) << j;
        }
      }
    }
  }
}

TEST(Softmax, SameBitsForAnyThreadCount) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> x(2000 * 129);
  for (float& v : x) v = normal(random);
  std::vector<std::vector<float>> results;
  for (int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    std::vector<float> out(x.size()), grad_x(x.size());
    softmax_kernels().forward({x.data(), out.data(), 2000, 129, {}, false}, SoftmaxType::float32,
                              pool);
    softmax_kernels().backward({x.data(), out.data(), grad_x.data(), 2000, 129, false},
                               SoftmaxType::float32, pool);
    out.insert(out.end(), grad_x.begin(), grad_x.end());
    results.push_back(out);
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

}  // namespace
}  // namespace transformer_ext
