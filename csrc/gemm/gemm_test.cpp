#include "gemm/gemm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/thread_pool.h"

namespace transformer_ext {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int64_t m, n, k;
};

const Shape kShapes[] = {{1, 1, 1},    {1, 200, 513},   {2, 3, 5},     {3, 65, 257}, {4, 7, 0},
                         {5, 64, 128}, {6, 130, 31},    {7, 129, 300}, {8, 1, 64},   {97, 129, 300},
                         {193, 70, 9}, {250, 600, 129}, {13, 70, 0}};

std::vector<float> random(int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = uniform(generator);
  return x;
}

// Rows `ld` apart; what lies between them is NaN, so that reading it shows.
std::vector<float> padded(const std::vector<float>& x, int64_t rows, int64_t columns, int64_t ld) {
  std::vector<float> out(static_cast<size_t>(rows * ld), kNaN);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      out[static_cast<size_t>(r * ld + c)] = x[static_cast<size_t>(r * columns + c)];
    }
  }
  return out;
}

struct Problem {
  explicit Problem(Shape s)
      : shape(s), x(random(s.m * s.k, 1)), w(random(s.n * s.k, 2)), bias(random(s.n, 3)) {}

  double exact(int64_t row, int64_t column) const {
    double sum = bias[static_cast<size_t>(column)];
    for (int64_t i = 0; i < shape.k; ++i) {
      sum += static_cast<double>(x[static_cast<size_t>(row * shape.k + i)]) *
             w[static_cast<size_t>(column * shape.k + i)];
    }
    return sum;
  }

  // Far above the rounding of k additions, far below a product too many or too few. How precise
  // it is beside other libraries is a matter of test_linear.py.
  double tolerance() const { return 1e-6 + 2e-7 * static_cast<double>(shape.k); }

  Shape shape;
  std::vector<float> x, w, bias;
};

TEST(Gemm, AgreesWithDoublePrecisionForAnyLeadingDimension) {
  Serial serial;
  for (const Shape s : kShapes) {
    const Problem p(s);
    const int64_t ldx = s.k + 3, ldw = s.k + 5, ldy = s.n + 2;
    const std::vector<float> x = padded(p.x, s.m, s.k, ldx), w = padded(p.w, s.n, s.k, ldw);
    std::vector<float> y(static_cast<size_t>(s.m * ldy), kNaN);
    PackedMatrix packed;
    packed.pack(w.data(), s.n, s.k, ldw, serial);
    EXPECT_EQ(packed.n(), s.n);
    EXPECT_EQ(packed.k(), s.k);
    gemm(x.data(), s.m, ldx, packed, p.bias.data(), y.data(), ldy, {}, serial);
    for (int64_t r = 0; r < s.m; ++r) {
      for (int64_t c = 0; c < s.n; ++c) {
        ASSERT_NEAR(y[static_cast<size_t>(r * ldy + c)], p.exact(r, c), p.tolerance())
            << s.m << " " << s.n << " " << s.k << " at " << r << ", " << c;
      }
      for (int64_t c = s.n; c < ldy; ++c) {
        ASSERT_TRUE(std::isnan(y[static_cast<size_t>(r * ldy + c)])) << "wrote past the columns";
      }
    }
  }
}

TEST(Gemm, ARowIsTheSameInAnyBatch) {
  Serial serial;
  const Shape s{257, 200, 300};
  const Problem p(s);
  PackedMatrix packed;
  packed.pack(p.w.data(), s.n, s.k, s.k, serial);
  const auto multiply = [&](int64_t first, int64_t rows) {
    std::vector<float> y(static_cast<size_t>(rows * s.n));
    gemm(p.x.data() + first * s.k, rows, s.k, packed, p.bias.data(), y.data(), s.n, {}, serial);
    return y;
  };
  const std::vector<float> whole = multiply(0, s.m);
  for (int64_t rows = 1; rows <= s.m; ++rows) {
    const std::vector<float> part = multiply(0, rows);
    ASSERT_EQ(std::memcmp(part.data(), whole.data(), part.size() * sizeof(float)), 0) << rows;
  }
  for (int64_t row = 0; row < s.m; row += 7) {
    const std::vector<float> one = multiply(row, 1);
    ASSERT_EQ(std::memcmp(one.data(), whole.data() + row * s.n, one.size() * sizeof(float)), 0);
  }
}

TEST(Gemm, TheSameForAnyNumberOfThreads) {
  const Shape s{250, 600, 300};
  const Problem p(s);
  std::vector<float> first;
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    PackedMatrix packed;
    packed.pack(p.w.data(), s.n, s.k, s.k, pool);
    std::vector<float> y(static_cast<size_t>(s.m * s.n));
    gemm(p.x.data(), s.m, s.k, packed, p.bias.data(), y.data(), s.n, {}, pool);
    if (first.empty()) first = y;
    EXPECT_EQ(std::memcmp(first.data(), y.data(), y.size() * sizeof(float)), 0) << threads;
  }
}

TEST(Gemm, MatmulTakesATransposedAndGivesWhatPackedWeightsGive) {
  Serial serial;
  for (const Shape s : kShapes) {
    const Problem p(s);
    const int64_t lda = s.m + 1, ldb = s.n + 3;
    std::vector<float> a(static_cast<size_t>(s.k * lda), kNaN);
    std::vector<float> b(static_cast<size_t>(s.k * ldb), kNaN);
    for (int64_t i = 0; i < s.k; ++i) {
      for (int64_t r = 0; r < s.m; ++r) {
        a[static_cast<size_t>(i * lda + r)] = p.x[static_cast<size_t>(r * s.k + i)];
      }
      for (int64_t c = 0; c < s.n; ++c) {
        b[static_cast<size_t>(i * ldb + c)] = p.w[static_cast<size_t>(c * s.k + i)];
      }
    }
    const size_t size = static_cast<size_t>(s.m * s.n);
    std::vector<float> y(size, kNaN), expected(size, kNaN);
    gemm_matmul(GemmInput{a.data(), GemmType::float32, 1, lda}, s.m, b.data(), s.n, s.k, ldb,
                y.data(), s.n, {}, serial);
    PackedMatrix packed;
    packed.pack(p.w.data(), s.n, s.k, s.k, serial);
    gemm(p.x.data(), s.m, s.k, packed, nullptr, expected.data(), s.n, {}, serial);
    EXPECT_EQ(std::memcmp(y.data(), expected.data(), size * sizeof(float)), 0)
        << s.m << " " << s.n << " " << s.k;
  }
}

std::vector<bfloat16> rounded(const std::vector<float>& x) {
  std::vector<bfloat16> out;
  for (const float v : x) out.push_back(to_bfloat16(v));
  return out;
}

// With factors that bfloat16 holds exactly, it must give what float32 gives but for the order of
// the sum.
TEST(Gemm, Bfloat16) {
  if (!gemm_has(GemmType::bfloat16)) GTEST_SKIP() << "no bfloat16 dot products";
  ThreadPool pool(2);
  std::vector<Shape> shapes(std::begin(kShapes), std::end(kShapes));
  shapes.push_back({300, 200, 1100});
  for (const Shape s : shapes) {
    Problem p(s);
    const std::vector<bfloat16> x = rounded(p.x), w = rounded(p.w);
    for (size_t i = 0; i < x.size(); ++i) p.x[i] = to_float(x[i]);
    for (size_t i = 0; i < w.size(); ++i) p.w[i] = to_float(w[i]);
    PackedMatrix packed;
    packed.pack(p.w.data(), s.n, s.k, s.k, pool, GemmType::bfloat16);
    EXPECT_EQ(packed.bytes(), gemm_packed_bytes(s.n, s.k, GemmType::bfloat16));
    const size_t size = static_cast<size_t>(s.m * s.n);
    std::vector<float> y(size, kNaN), from_float(size, kNaN);
    std::vector<bfloat16> low(size);
    GemmArguments a{s.m,      GemmInput{x.data(), GemmType::bfloat16, s.k, 1},
                    packed,   nullptr,
                    0,        p.bias.data(),
                    y.data(), GemmType::float32,
                    s.n,      {}};
    gemm(a, pool);
    for (int64_t r = 0; r < s.m; ++r) {
      for (int64_t c = 0; c < s.n; ++c) {
        ASSERT_NEAR(y[static_cast<size_t>(r * s.n + c)], p.exact(r, c), p.tolerance())
            << s.m << " " << s.n << " " << s.k << " at " << r << ", " << c;
      }
    }
    gemm(p.x.data(), s.m, s.k, packed, p.bias.data(), from_float.data(), s.n, {}, pool);
    EXPECT_EQ(std::memcmp(from_float.data(), y.data(), size * sizeof(float)), 0);
    a.y = low.data();
    a.y_type = GemmType::bfloat16;
    gemm(a, pool);
    for (size_t i = 0; i < size; ++i) ASSERT_EQ(low[i].bits, to_bfloat16(y[i]).bits);

    // The same product from factors as they lie, both turned.
    std::vector<bfloat16> xt(x.size()), wt(w.size());
    for (int64_t i = 0; i < s.k; ++i) {
      for (int64_t r = 0; r < s.m; ++r) {
        xt[static_cast<size_t>(i * s.m + r)] = x[static_cast<size_t>(r * s.k + i)];
      }
      for (int64_t c = 0; c < s.n; ++c) {
        wt[static_cast<size_t>(i * s.n + c)] = w[static_cast<size_t>(c * s.k + i)];
      }
    }
    gemm(p.x.data(), s.m, s.k, packed, nullptr, y.data(), s.n, {}, pool);
    gemm_matmul(GemmInput{xt.data(), GemmType::bfloat16, 1, s.m}, s.m, wt.data(), s.n, s.k, s.n,
                from_float.data(), s.n, {}, pool);
    EXPECT_EQ(std::memcmp(from_float.data(), y.data(), size * sizeof(float)), 0)
        << s.m << " " << s.n << " " << s.k;
  }
}

TEST(Gemm, Epilogues) {
  Serial serial;
  const Shape s{9, 70, 300};
  const Problem p(s);
  PackedMatrix packed;
  packed.pack(p.w.data(), s.n, s.k, s.k, serial);
  const size_t size = static_cast<size_t>(s.m * s.n);
  std::vector<float> plain(size), relu(size), sum(size, 2.0f);
  Epilogue with_relu, accumulate;
  with_relu.activation = GemmActivation::relu;
  accumulate.accumulate = true;
  gemm(p.x.data(), s.m, s.k, packed, p.bias.data(), plain.data(), s.n, {}, serial);
  gemm(p.x.data(), s.m, s.k, packed, p.bias.data(), relu.data(), s.n, with_relu, serial);
  gemm(p.x.data(), s.m, s.k, packed, p.bias.data(), sum.data(), s.n, accumulate, serial);
  for (size_t i = 0; i < size; ++i) {
    ASSERT_EQ(relu[i], plain[i] > 0 ? plain[i] : 0.0f);
    ASSERT_NEAR(sum[i], plain[i] + 2, 1e-5);
  }
  std::vector<float> x = p.x;
  x[static_cast<size_t>(4 * s.k + 1)] = kNaN;
  gemm(x.data(), s.m, s.k, packed, nullptr, relu.data(), s.n, with_relu, serial);
  for (int64_t c = 0; c < s.n; ++c) {
    ASSERT_TRUE(std::isnan(relu[static_cast<size_t>(4 * s.n + c)]));
    ASSERT_FALSE(std::isnan(relu[static_cast<size_t>(5 * s.n + c)]));
  }
}

TEST(Gemm, PackedMatrixMovesAndRepacks) {
  Serial serial;
  const std::vector<float> w = random(70 * 9, 1);
  PackedMatrix a;
  a.pack(w.data(), 70, 9, 9, serial);
  const void* const data = PackedView(a).data;
  PackedMatrix b = std::move(a);
  EXPECT_EQ(PackedView(b).data, data);
  b.pack(w.data(), 9, 70, 70, serial);
  EXPECT_EQ(b.n(), 9);
  EXPECT_EQ(b.bytes(), gemm_packed_bytes(9, 70, GemmType::float32));
  a = std::move(b);
  EXPECT_EQ(a.k(), 70);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(PackedView(a).data) % 64, 0u);
}

}  // namespace
}  // namespace transformer_ext
