#include "engine/token_rules.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace transformer_ext::engine {
namespace {

TEST(TokenRules, BansWhatWouldRepeat) {
  TokenOptions options;
  options.no_repeat_ngram_size = 2;
  options.repetition_penalty = 1.5;
  TokenRules rules;
  rules.find(options, {4, 5, 4, 6, 4});
  EXPECT_EQ(rules.banned, (std::vector<int32_t>{5, 6}));
  EXPECT_EQ(rules.repeated, (std::vector<int32_t>{4, 5, 6}));
  EXPECT_EQ(rules.needed(options, 8), 14);
  options.no_repeat_ngram_size = 1;
  rules.find(options, {9, 8, 9});
  EXPECT_EQ(rules.banned, (std::vector<int32_t>{8, 9}));
  options.no_repeat_ngram_size = 4;
  rules.find(options, {9, 8, 9});
  EXPECT_TRUE(rules.banned.empty());
}

TEST(UniformNumber, IsThatOfPython) {
  // transformer_ext.inference.search.uniform_number of the same arguments.
  EXPECT_EQ(uniform_number(0, 0, 0, 0), 0x1.7dbedc243624ep-2);
  EXPECT_EQ(uniform_number((1ULL << 40) + 5, (1ULL << 33) + 7, 3, 11), 0x1.8008c390706f8p-3);
}

}  // namespace
}  // namespace transformer_ext::engine
