#include "gemm/gemm.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
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

class GemmOfType : public testing::TestWithParam<GemmType> {
  void SetUp() override {
    if (!gemm_has(GetParam())) GTEST_SKIP() << "no bfloat16 dot products";
  }
};

INSTANTIATE_TEST_SUITE_P(All, GemmOfType,
                         testing::Values(GemmType::float32, GemmType::bfloat16, GemmType::int8));

TEST_P(GemmOfType, ARowIsTheSameInAnyBatch) {
  Serial serial;
  const Shape s{257, 200, 300};
  const Problem p(s);
  PackedMatrix packed;
  packed.pack(p.w.data(), s.n, s.k, s.k, serial, GetParam());
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

TEST_P(GemmOfType, TheSameForAnyNumberOfThreads) {
  const Shape s{250, 600, 300};
  const Problem p(s);
  std::vector<float> first;
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    PackedMatrix packed;
    packed.pack(p.w.data(), s.n, s.k, s.k, pool, GetParam());
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

// --- int8 ---------------------------------------------------------------------------------------

struct Integers {
  std::vector<int> values;
  std::vector<float> scales;  // of each row
};

// As gemm.h says.
Integers quantized(const std::vector<float>& x, int64_t rows, int64_t k) {
  Integers q;
  for (int64_t r = 0; r < rows; ++r) {
    float largest = 0;
    for (int64_t i = 0; i < k; ++i) {
      largest = std::max(largest, std::fabs(x[static_cast<size_t>(r * k + i)]));
    }
    q.scales.push_back(largest / 127);
    for (int64_t i = 0; i < k; ++i) {
      const float inverse = largest > 0 ? 127 / largest : 0;
      q.values.push_back(
          static_cast<int>(std::nearbyint(x[static_cast<size_t>(r * k + i)] * inverse)));
    }
  }
  return q;
}

TEST(Gemm, IntegersAreMultipliedExactly) {
  ThreadPool pool(2);
  std::vector<Shape> shapes(std::begin(kShapes), std::end(kShapes));
  shapes.push_back({300, 200, 1102});
  for (const Shape s : shapes) {
    const Problem p(s);
    const Integers x = quantized(p.x, s.m, s.k), w = quantized(p.w, s.n, s.k);
    PackedMatrix packed;
    packed.pack(p.w.data(), s.n, s.k, s.k, pool, GemmType::int8);
    EXPECT_EQ(packed.bytes(), gemm_packed_bytes(s.n, s.k, GemmType::int8));
    const int64_t ldx = s.k + 3, ldy = s.n + 2;
    const std::vector<float> rows = padded(p.x, s.m, s.k, ldx);
    std::vector<float> y(static_cast<size_t>(s.m * ldy), kNaN), converted(y);
    gemm(rows.data(), s.m, ldx, packed, p.bias.data(), y.data(), ldy, {}, pool);
    for (int64_t r = 0; r < s.m; ++r) {
      for (int64_t c = 0; c < s.n; ++c) {
        int64_t sum = 0;
        for (int64_t i = 0; i < s.k; ++i) {
          sum += x.values[static_cast<size_t>(r * s.k + i)] *
                 w.values[static_cast<size_t>(c * s.k + i)];
        }
        const double expected = static_cast<double>(sum) * x.scales[static_cast<size_t>(r)] *
                                    w.scales[static_cast<size_t>(c)] +
                                p.bias[static_cast<size_t>(c)];
        ASSERT_NEAR(y[static_cast<size_t>(r * ldy + c)], expected, 4e-7 * (1 + std::fabs(expected)))
            << s.m << " " << s.n << " " << s.k << " at " << r << ", " << c;
      }
      for (int64_t c = s.n; c < ldy; ++c) {
        ASSERT_TRUE(std::isnan(y[static_cast<size_t>(r * ldy + c)])) << "wrote past the columns";
      }
    }
    std::vector<char> memory(gemm_converted_bytes(s.m, s.k, GemmType::int8));
    const GemmInput once =
        gemm_convert(rows.data(), s.m, s.k, ldx, GemmType::int8, memory.data(), pool);
    gemm(once, s.m, packed, p.bias.data(), converted.data(), ldy, {}, pool);
    EXPECT_EQ(std::memcmp(converted.data(), y.data(), y.size() * sizeof(float)), 0);
    if (s.m > 1) {
      gemm(once.rows_from(1), s.m - 1, packed, p.bias.data(), converted.data(), ldy, {}, pool);
      EXPECT_EQ(std::memcmp(converted.data(), y.data() + ldy,
                            static_cast<size_t>((s.m - 1) * ldy) * sizeof(float)),
                0);
    }
  }
}

TEST(Gemm, IntegersHaveALongestSum) {
  Serial serial;
  const int64_t k = kGemmMostIntegers;
  const std::vector<float> x(static_cast<size_t>(k + 1), 1.0f);
  PackedMatrix packed;
  packed.pack(x.data(), 1, k, k, serial, GemmType::int8);
  float y;
  gemm(x.data(), 1, k, packed, nullptr, &y, 1, {}, serial);
  EXPECT_NEAR(y, k, 0.1);
  EXPECT_THROW(packed.pack(x.data(), 1, k + 1, k + 1, serial, GemmType::int8),
               std::invalid_argument);
}

TEST(Gemm, IntegersOfZeroesAndOfWhatIsNotFinite) {
  Serial serial;
  const int64_t k = 37;
  const std::vector<float> w = random(3 * k, 1);
  PackedMatrix packed;
  packed.pack(w.data(), 3, k, k, serial, GemmType::int8);
  std::vector<float> x = random(5 * k, 2), y(5 * 3);
  std::fill_n(x.begin(), k, 0.0f);
  std::fill_n(x.begin() + k, k, 1e-40f);
  x[static_cast<size_t>(2 * k + 36)] = kNaN;
  x[static_cast<size_t>(3 * k + 5)] = -std::numeric_limits<float>::infinity();
  gemm(x.data(), 5, k, packed, nullptr, y.data(), 3, {}, serial);
  for (size_t c = 0; c < 3; ++c) {
    EXPECT_EQ(y[c], 0.0f);
    EXPECT_EQ(y[3 + c], 0.0f);
    EXPECT_TRUE(std::isnan(y[6 + c]));
    EXPECT_TRUE(std::isnan(y[9 + c]));
    EXPECT_FALSE(std::isnan(y[12 + c]));
  }
}

#if defined(__x86_64__)
struct Level {
  Isa isa;
  bool vnni;
  const GemmKernels& kernels;
  const GemmInt8Kernels& int8;

  bool runs_here() const { return isa <= best_isa() && (!vnni || has_vnni(isa)); }
};

const Level kLevels[] = {
    {Isa::baseline, false, baseline::gemm_kernels, baseline::gemm_int8_kernels},
    {Isa::avx2, false, avx2::gemm_kernels, avx2::gemm_int8_kernels},
    {Isa::avx2, true, avx2::gemm_kernels, avx2_vnni::gemm_int8_kernels},
    {Isa::avx512, false, avx512::gemm_kernels, avx512::gemm_int8_kernels},
    {Isa::avx512, true, avx512::gemm_kernels, avx512_vnni::gemm_int8_kernels},
    {Isa::avx512_bf16, true, avx512_bf16::gemm_kernels, avx512_bf16::gemm_int8_kernels},
};

// The same bits with and without VNNI, with AVX-512 and with AVX2. (Without FMA, scale and bias are
// rounded one after the other.)
TEST(Gemm, IntegersAreTheSameOnEveryInstructionSet) {
  Serial serial;
  // All heights of a tile; a part of a panel and of a word; one row, and two panels at once.
  for (const Shape s : {Shape{23, 200, 333}, Shape{1, 130, 64}, Shape{3, 257, 31}, Shape{6, 64, 4},
                        Shape{100, 70, 515}}) {
    const Problem p(s);
    std::vector<float> first;
    for (const Level& level : kLevels) {
      if (!level.runs_here()) continue;
      const int64_t width = level.kernels.panel_columns;
      const int64_t columns = (s.n + width - 1) / width * width;
      const int64_t panels = columns * ((s.k + 3) / 4 * 4);
      std::vector<char> packed(static_cast<size_t>(panels + columns * 4));
      level.int8.int8.pack(p.w.data(), s.n, s.k, s.k, 1, packed.data(), serial);
      std::vector<float> y(static_cast<size_t>(s.m * s.n));
      const PackedView view{packed.data(), s.n, s.k, GemmType::int8,
                            reinterpret_cast<const float*>(packed.data() + panels)};
      level.int8.int8.gemm({s.m,
                            {p.x.data(), GemmType::float32, s.k, 1},
                            view,
                            nullptr,
                            0,
                            p.bias.data(),
                            y.data(),
                            GemmType::float32,
                            s.n,
                            {}},
                           serial);
      if (level.isa <= Isa::avx2 && !level.vnni) first = y;
      for (size_t i = 0; i < y.size(); ++i) {
        ASSERT_NEAR(y[i], first[i], level.isa == Isa::baseline ? 1e-6 : 0.0)
            << isa_name(level.isa) << ", " << level.int8.instruction << ": " << s.m << " " << s.n
            << " " << s.k << " at " << i;
      }
    }
  }
}

// Sums at their ends, where 16 bits would have overflowed and a saturating instruction stopped.
TEST(Gemm, IntegersDoNotSaturateOnAnyInstructionSet) {
  Serial serial;
  const int64_t k = kGemmMostIntegers;
  for (const Level& level : kLevels) {
    if (!level.runs_here()) continue;
    for (const float sign : {1.0f, -1.0f}) {
      const std::vector<float> x(static_cast<size_t>(k), sign), w(static_cast<size_t>(k), 1.0f);
      std::vector<char> packed(static_cast<size_t>(level.kernels.panel_columns * (k + 4)));
      level.int8.int8.pack(w.data(), 1, k, k, 1, packed.data(), serial);
      const PackedView view{
          packed.data(), 1, k, GemmType::int8,
          reinterpret_cast<const float*>(packed.data() + level.kernels.panel_columns * k)};
      float y = 0;
      level.int8.int8.gemm({1,
                            {x.data(), GemmType::float32, k, 1},
                            view,
                            nullptr,
                            0,
                            nullptr,
                            &y,
                            GemmType::float32,
                            1,
                            {}},
                           serial);
      EXPECT_NEAR(y, sign * static_cast<float>(k), 0.1) << level.int8.instruction;
    }
  }
}

TEST(Gemm, IntegersAreMultipliedByVnniWhereTheMachineHasIt) {
  for (const Level& level : kLevels) {
    if (level.isa == active_isa() && level.vnni == has_vnni(active_isa())) {
      EXPECT_STREQ(gemm_int8_instruction(), level.int8.instruction);
      EXPECT_EQ(&gemm_int8_kernels(), &level.int8);
    }
  }
}
#endif

TEST(Gemm, UnpackGivesWhatIsMultipliedWith) {
  Serial serial;
  const int64_t n = 131, k = 37;
  const std::vector<float> w = random(n * k, 1);
  const Integers integers = quantized(w, n, k);
  for (const GemmType type : {GemmType::float32, GemmType::bfloat16, GemmType::int8}) {
    if (!gemm_has(type)) continue;
    PackedMatrix packed;
    packed.pack(w.data(), n, k, k, serial, type);
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t c = 0; c < n; ++c) {
      gemm_unpack(packed, c, row.data());
      for (int64_t i = 0; i < k; ++i) {
        const size_t at = static_cast<size_t>(c * k + i);
        const float expected =
            type == GemmType::float32 ? w[at]
            : type == GemmType::bfloat16
                ? to_float(to_bfloat16(w[at]))
                : static_cast<float>(integers.values[at]) * integers.scales[static_cast<size_t>(c)];
        ASSERT_EQ(row[static_cast<size_t>(i)], expected);
      }
    }
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
