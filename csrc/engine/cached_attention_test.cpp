#include "engine/cached_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/bfloat16.h"
#include "engine/testing.h"

namespace transformer_ext {
namespace {

// Rows of one sentence with a cache each for its own positions. What the kernel must not read is
// NaN.
struct CacheProblem {
  int64_t heads, kv_heads, head_dim, rows, length, shared;
  bool bfloat16;
  std::vector<float> query;                // [rows][heads, head_dim]
  std::vector<std::vector<float>> exact;   // of each pointer: key, value
  std::vector<std::vector<char>> memory;   // as the kernel reads it
  std::vector<const void*> paths;          // [rows][length]
  std::vector<std::vector<float>> stored;  // what of `exact` is in memory

  CacheProblem(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rows, int64_t length,
               int64_t shared, bool bfloat16)
      : heads(heads),
        kv_heads(kv_heads),
        head_dim(head_dim),
        rows(rows),
        length(length),
        shared(shared),
        bfloat16(bfloat16),
        query(random(static_cast<size_t>(rows * heads * head_dim), 1)) {
    paths.resize(static_cast<size_t>(rows * length));
    const int64_t size = 2 * kv_heads * head_dim;
    const size_t bytes = bfloat16 ? 2 : 4;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < length; ++i) {
        const void*& path = paths[static_cast<size_t>(row * length + i)];
        if (row > 0 && i < shared) {
          path = paths[static_cast<size_t>(i)];
          continue;
        }
        exact.push_back(random(static_cast<size_t>(size), static_cast<uint32_t>(2 + exact.size())));
        std::vector<char>& cell = memory.emplace_back((static_cast<size_t>(size) + 40) * bytes,
                                                      '\xff');  // NaN in both types
        char* const begin = cell.data() + 3 * bytes;
        cached_attention_kernels().store(exact.back().data(), size, bfloat16, begin);
        path = begin;
        std::vector<float>& values = stored.emplace_back();
        for (int64_t e = 0; e < size; ++e) {
          values.push_back(bfloat16 ? to_float(reinterpret_cast<const struct bfloat16*>(begin)[e])
                                    : reinterpret_cast<const float*>(begin)[e]);
        }
      }
    }
  }

  const std::vector<float>& at(const std::vector<std::vector<float>>& values, int64_t row,
                               int64_t i) const {
    if (i < shared) return values[static_cast<size_t>(i)];
    return values[static_cast<size_t>(
        row == 0 ? i : length + (row - 1) * (length - shared) + i - shared)];
  }

  // Attends from rows [begin, end) in one call; outputs with a gap between rows.
  void attend(int64_t begin, int64_t end, std::vector<float>* out, std::vector<float>* weights,
              bool in_parts = false) const {
    const int64_t width = heads * head_dim;
    out->assign(static_cast<size_t>((end - begin) * (width + 3)), NAN);
    weights->assign(static_cast<size_t>((end - begin) * (length + 2)), 0.0f);
    CachedAttention a{};
    a.query = query.data() + begin * width;
    a.query_stride = width;
    a.out = out->data();
    a.out_stride = width + 3;
    a.rows = end - begin;
    a.paths = paths.data() + begin * length;
    a.path_stride = length;
    a.shared = shared;
    a.length = length;
    a.value_offset = kv_heads * head_dim;
    a.bfloat16 = bfloat16;
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.head_dim = head_dim;
    a.kv_end = kv_heads;
    a.scale = 0.3f;
    a.weights = weights->data();
    a.weights_stride = length + 2;
    if (in_parts) {
      for (a.kv_begin = 0; a.kv_begin < kv_heads; ++a.kv_begin) {
        a.kv_end = a.kv_begin + 1;
        cached_attention_kernels().attend(a);
      }
    } else {
      cached_attention_kernels().attend(a);
    }
  }

  // The definition; each step's result rounded to bfloat16 if `rounded`.
  void define(const std::vector<std::vector<float>>& values, int64_t row, bool rounded,
              std::vector<double>* out, std::vector<double>* average) const {
    const auto in = [&](double x) {
      return rounded ? static_cast<double>(to_float(to_bfloat16(static_cast<float>(x)))) : x;
    };
    out->clear();
    average->assign(static_cast<size_t>(length), 0.0);
    for (int64_t h = 0; h < heads; ++h) {
      const float* const q = query.data() + (row * heads + h) * head_dim;
      const size_t key = static_cast<size_t>(h / (heads / kv_heads) * head_dim);
      const size_t value = key + static_cast<size_t>(kv_heads * head_dim);
      std::vector<double> weights;
      double sum = 0.0;
      for (int64_t i = 0; i < length; ++i) {
        double dot = 0.0;
        for (int64_t d = 0; d < head_dim; ++d) {
          dot += in(q[d]) * in(at(values, row, i)[key + static_cast<size_t>(d)]);
        }
        weights.push_back(std::exp(in(0.3 * in(dot))));
        sum += weights.back();
      }
      for (int64_t i = 0; i < length; ++i) {
        weights[static_cast<size_t>(i)] = in(weights[static_cast<size_t>(i)] / sum);
        (*average)[static_cast<size_t>(i)] +=
            weights[static_cast<size_t>(i)] / static_cast<double>(heads);
      }
      for (int64_t d = 0; d < head_dim; ++d) {
        double total = 0.0;
        for (int64_t i = 0; i < length; ++i) {
          total += weights[static_cast<size_t>(i)] *
                   in(at(values, row, i)[value + static_cast<size_t>(d)]);
        }
        out->push_back(in(total));
      }
    }
  }
};

// In float64 on what the cache holds, for head sizes that leave every kind of rest.
TEST(CachedAttention, EqualsTheDefinition) {
  for (const bool bfloat16 : {false, true}) {
    for (const int64_t head_dim : {1, 5, 16, 33, 40, 64, 80}) {
      for (const int64_t length : {1, 2, 15, 16, 33}) {
        for (const int64_t rows : {1, 4, 7}) {
          const CacheProblem problem(4, 2, head_dim, rows, length, length / 2, bfloat16);
          std::vector<float> out, weights;
          problem.attend(0, rows, &out, &weights);
          for (int64_t row = 0; row < rows; ++row) {
            std::vector<double> expected, average;
            problem.define(problem.stored, row, false, &expected, &average);
            for (size_t i = 0; i < expected.size(); ++i) {
              ASSERT_NEAR(out[static_cast<size_t>(row * (4 * head_dim + 3)) + i], expected[i],
                          2e-5);
            }
            for (size_t i = 0; i < average.size(); ++i) {
              ASSERT_NEAR(weights[static_cast<size_t>(row * (length + 2)) + i], average[i], 1e-6);
            }
          }
        }
      }
    }
  }
}

// The cache alone rounds: at most as far from the definition as bfloat16 all through.
TEST(CachedAttention, IsMoreExactThanBfloat16Throughout) {
  const CacheProblem problem(4, 4, 64, 3, 30, 20, true);
  std::vector<float> out, weights;
  problem.attend(0, 3, &out, &weights);
  double error = 0.0, allowed = 0.0;
  for (int64_t row = 0; row < 3; ++row) {
    std::vector<double> expected, rounded, average;
    problem.define(problem.exact, row, false, &expected, &average);
    problem.define(problem.exact, row, true, &rounded, &average);
    for (size_t i = 0; i < expected.size(); ++i) {
      error += std::pow(out[static_cast<size_t>(row * 259) + i] - expected[i], 2);
      allowed += std::pow(rounded[i] - expected[i], 2);
    }
  }
  EXPECT_LT(error, allowed);
  EXPECT_GT(error, 0.0);
}

TEST(CachedAttention, ARowIsTheSameAloneAndBesideOthers) {
  for (const bool bfloat16 : {false, true}) {
    for (const int64_t kv_heads : {1, 3}) {
      for (const int64_t head_dim : {33, 64}) {
        for (const int64_t shared : {0, 3, 16, 21}) {
          for (const int64_t rows : {2, 3, 5, 8}) {
            const CacheProblem problem(3, kv_heads, head_dim, rows, 21, shared, bfloat16);
            std::vector<float> out, weights, alone, weights_alone;
            problem.attend(0, rows, &out, &weights);
            problem.attend(0, rows, &alone, &weights_alone, true);
            for (int64_t row = 0; row < rows; ++row) {
              ASSERT_TRUE(std::equal(alone.begin() + row * (3 * head_dim + 3),
                                     alone.begin() + (row + 1) * (3 * head_dim + 3) - 3,
                                     out.begin() + row * (3 * head_dim + 3)));
            }
            for (int64_t row = 0; row < rows; ++row) {
              problem.attend(row, row + 1, &alone, &weights_alone);
              ASSERT_TRUE(std::equal(alone.begin(), alone.end() - 3,
                                     out.begin() + row * (3 * head_dim + 3)));
              ASSERT_TRUE(std::equal(weights_alone.begin(), weights_alone.end(),
                                     weights.begin() + row * 23));
            }
          }
        }
      }
    }
  }
}

TEST(CachedAttention, RowsThatFollowOneAnotherAreThoseAlone) {
  for (const bool bfloat16 : {false, true}) {
    for (const int64_t kv_heads : {1, 3}) {
      for (const int64_t head_dim : {33, 64}) {
        for (const int64_t length : {8, 21, 40}) {
          for (const int64_t rows : {1, 2, 3, 5, 8}) {
            const CacheProblem problem(3, kv_heads, head_dim, rows, length, length, bfloat16);
            const int64_t width = 3 * head_dim;
            std::vector<float> together(static_cast<size_t>(rows * width), NAN);
            std::vector<float> alone(static_cast<size_t>(width), NAN);
            CachedAttention a{};
            a.query = problem.query.data();
            a.query_stride = width;
            a.out = together.data();
            a.out_stride = width;
            a.rows = rows;
            a.paths = problem.paths.data();
            a.path_stride = 0;
            a.shared = length;
            a.length = length;
            a.causal = true;
            a.value_offset = kv_heads * head_dim;
            a.bfloat16 = bfloat16;
            a.heads = 3;
            a.kv_heads = kv_heads;
            a.head_dim = head_dim;
            a.kv_end = kv_heads;
            a.scale = 0.3f;
            cached_attention_kernels().attend(a);
            a.rows = 1;
            a.causal = false;
            a.out = alone.data();
            for (int64_t row = 0; row < rows; ++row) {
              a.query = problem.query.data() + row * width;
              a.length = length - rows + 1 + row;
              a.shared = a.length;
              cached_attention_kernels().attend(a);
              ASSERT_TRUE(std::equal(alone.begin(), alone.end(), together.begin() + row * width));
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace transformer_ext
