#include "common/isa.h"

#include <gtest/gtest.h>

namespace transformer_ext {
namespace {

TEST(Isa, TheLevelInUseIsOneThatTheMachineHas) {
  EXPECT_LE(active_isa(), best_isa());
  if (!cpu_features().avx2) {
    EXPECT_EQ(best_isa(), Isa::baseline);
  }
  if (!cpu_features().avx512) {
    EXPECT_LE(best_isa(), Isa::avx2);
    EXPECT_FALSE(has_vnni(Isa::avx512));
  }
  EXPECT_FALSE(has_vnni(Isa::baseline));
  if (best_isa() == Isa::avx512_bf16) {
    EXPECT_TRUE(has_vnni(Isa::avx512_bf16));
  }
}

}  // namespace
}  // namespace transformer_ext
