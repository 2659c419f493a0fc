#include "testing/cuda_emulation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "testing/broken_kernels_cuda.h"
#include "testing/cuda_emulation/cuda_bf16.h"
#include "testing/cuda_emulation/cuda_fp16.h"
#include "testing/cuda_test.h"

namespace transformer_ext {
namespace {

using cuda_test::random_values;

std::string error_of(BrokenKernel kernel) {
  const std::vector<float> x = random_values(64, 1);
  std::vector<float> out(64);
  const char* const error = broken_kernel_cuda(kernel, x.data(), out.data());
  return error == nullptr ? "" : error;
}

TEST(CudaEmulation, RunsASoundKernel) {
  const std::vector<float> x = random_values(64, 1);
  const std::vector<float> out = cuda_test::for_each_schedule([&] {
    std::vector<float> out(64);
    EXPECT_LAUNCHED(broken_kernel_cuda(BrokenKernel::none, x.data(), out.data()));
    return out;
  });
  for (int i = 0; i < 64; ++i) EXPECT_EQ(out[i], 2.0f * x[(i + 1) % 64]);
}

TEST(CudaEmulation, AReductionIsTheSameForAllThreads) {
  const std::vector<float> x = random_values(64, 2);
  const std::vector<float> out = cuda_test::for_each_schedule([&] {
    std::vector<float> out(64);
    EXPECT_LAUNCHED(broken_kernel_cuda(BrokenKernel::reduction, x.data(), out.data()));
    return out;
  });
  double sum = 0;
  for (float v : x) sum += v;
  for (float v : out) {
    EXPECT_EQ(v, out[0]);
    EXPECT_NEAR(v, sum, 1e-5);
  }
}

#if defined(__SANITIZE_THREAD__)
// In a schedule that hides it, too.
TEST(CudaEmulationDeathTest, AMissingBarrierIsARace) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto run = [] {
    cuda_emulation::set_schedule(1);
    error_of(BrokenKernel::no_barrier);
    std::exit(0);
  };
  EXPECT_EXIT(run(), testing::ExitedWithCode(66), "data race");
}
#else
TEST(CudaEmulation, AMissingBarrierIsSeen) {
  const std::vector<float> x = random_values(64, 1);
  cuda_emulation::set_schedule(0);
  std::vector<float> out(64);
  EXPECT_LAUNCHED(broken_kernel_cuda(BrokenKernel::no_barrier, x.data(), out.data()));
  EXPECT_TRUE(std::isnan(out[0]));
}
#endif

TEST(CudaEmulation, AnOrderOfFloatAtomicsIsSeen) {
  const std::vector<float> x = random_values(64, 3);
  std::set<float> sums;
  for (unsigned schedule : {0u, 1u, 2u, 3u}) {
    cuda_emulation::set_schedule(schedule);
    std::vector<float> out(64);
    EXPECT_LAUNCHED(broken_kernel_cuda(BrokenKernel::float_atomics, x.data(), out.data()));
    sums.insert(out[0]);
  }
  cuda_emulation::set_schedule(0);
  EXPECT_GT(sums.size(), 1u);
}

TEST(CudaEmulation, CollectivesThatNotAllReachAreErrors) {
  for (unsigned schedule : {0u, 1u, 2u}) {
    cuda_emulation::set_schedule(schedule);
    EXPECT_NE(error_of(BrokenKernel::diverging_shuffle).find("thread 5 has returned"),
              std::string::npos)
        << error_of(BrokenKernel::diverging_shuffle);
    EXPECT_NE(error_of(BrokenKernel::diverging_barrier).find("thread 40 has returned"),
              std::string::npos)
        << error_of(BrokenKernel::diverging_barrier);
    EXPECT_NE(error_of(BrokenKernel::shuffle_from_outside).find("outside of the mask"),
              std::string::npos)
        << error_of(BrokenKernel::shuffle_from_outside);
    EXPECT_EQ(error_of(BrokenKernel::none), "");
  }
  cuda_emulation::set_schedule(0);
}

#if defined(__SANITIZE_ADDRESS__)
TEST(CudaEmulationDeathTest, SharedMemoryHasBounds) {
  EXPECT_DEATH(error_of(BrokenKernel::beyond_shared), "out of bounds|heap-buffer-overflow");
}
#endif

// All numbers of 16 bits, the ones half way between neighbours, and those beside these.
TEST(CudaEmulation, ConversionsRoundToTheNearestAndToEven) {
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float x = __half2float({static_cast<uint16_t>(bits)});
    EXPECT_EQ(__float2half_rn(x).bits, bits);
    EXPECT_EQ(__float2half_rn(-x).bits, bits | 0x8000u);
    const float next = bits + 1 < 0x7c00 ? __half2float({static_cast<uint16_t>(bits + 1)}) : 65536;
    const float middle = x + (next - x) / 2;
    EXPECT_EQ(__float2half_rn(middle).bits, bits + (bits & 1u)) << bits;
    EXPECT_EQ(__float2half_rn(std::nextafter(middle, 0.0f)).bits, bits) << bits;
    EXPECT_EQ(__float2half_rn(std::nextafter(middle, 1e9f)).bits, bits + 1) << bits;
  }
  EXPECT_EQ(__half2float({0x3c00}), 1.0f);
  EXPECT_EQ(__half2float({0x0001}), 0x1p-24f);
  EXPECT_EQ(__half2float({0x7bff}), 65504.0f);
  EXPECT_TRUE(std::isinf(__half2float(__float2half_rn(1e6f))));
  EXPECT_TRUE(std::isnan(__half2float(__float2half_rn(cuda_test::kNan))));
  for (uint32_t bits = 0; bits < 0x7f80; ++bits) {
    const float x = __bfloat162float({static_cast<uint16_t>(bits)});
    EXPECT_EQ(__float2bfloat16_rn(x).bits, bits);
    EXPECT_EQ(__float2bfloat16_rn(x).bits, to_bfloat16(x).bits);
  }
  EXPECT_TRUE(std::isnan(__bfloat162float(__float2bfloat16_rn(cuda_test::kNan))));
}

}  // namespace
}  // namespace transformer_ext
