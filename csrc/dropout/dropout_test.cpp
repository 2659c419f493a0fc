#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "dropout/philox.h"

namespace transformer_ext {
namespace {

using Words = std::array<uint32_t, 4>;

Words philox(Words counter, uint32_t key0, uint32_t key1) {
  const PhiloxWords words =
      philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key0, key1);
  return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

// The known answers that the authors of Random123 publish for philox4x32 with 7 rounds.
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox({0, 0, 0, 0}, 0, 0), (Words{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}));
  EXPECT_EQ(philox({~0u, ~0u, ~0u, ~0u}, ~0u, ~0u),
            (Words{0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0),
            (Words{0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}));
}

TEST(Dropout, ThresholdRoundsTiesToEven) {
  EXPECT_EQ(dropout_threshold(0.0), 0u);
  EXPECT_EQ(dropout_threshold(0.1), 6554u);
  EXPECT_EQ(dropout_threshold(0.5), 32768u);
  EXPECT_EQ(dropout_threshold(0.5 / 65536), 0u);
  EXPECT_EQ(dropout_threshold(1.5 / 65536), 2u);
  EXPECT_EQ(dropout_threshold(2.5 / 65536), 2u);
  EXPECT_EQ(dropout_threshold(1.0), 65536u);
  EXPECT_EQ(dropout_scale(32768), 2.0f);
  EXPECT_EQ(dropout_scale(65536), 0.0f);
}

TEST(Dropout, OffWithoutNumbersOrProbability) {
  const int64_t rng[3] = {1, 2, 3};
  EXPECT_EQ(make_dropout(nullptr, 0, 0.5).threshold, 0u);
  EXPECT_EQ(make_dropout(rng, 0, 0.0).threshold, 0u);
  EXPECT_EQ(make_dropout(rng, 0, 1e-6).threshold, 0u);
}

TEST(Dropout, CounterAndKeyAreMadeOfTheArguments) {
  const int64_t rng[3] = {-5, (int64_t{7} << 32) + 3, 65537};
  const Dropout dropout = make_dropout(rng, 300, 0.25);
  EXPECT_EQ(dropout.key0, 0xfffffffbu);
  EXPECT_EQ(dropout.key1, 0xffffffffu);
  EXPECT_EQ(dropout.step, 3u);
  EXPECT_EQ(dropout.site, 300u + (1u << 16));
  const int64_t row = (int64_t{1} << 33) + 9;
  const Words words = philox({2, 9, 3, 300u + (1u << 16)}, 0xfffffffbu, 0xffffffffu);
  for (int64_t column = 16; column < 24; ++column) {
    const uint32_t word = words[static_cast<size_t>((column - 16) / 2)];
    const uint32_t value = column % 2 ? word >> 16 : word & 0xffffu;
    EXPECT_EQ(dropout_keeps(dropout, row, column), value >= 16384u);
  }
}

}  // namespace
}  // namespace transformer_ext
