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
#include "testing/cuda_emulation/tensor_cores.h"
#include "testing/cuda_test.h"
#include "testing/tile_product_cuda.h"

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

// ---- Tensor cores -------------------------------------------------------------------------------

// Columns first: i + rows j, as the layouts below count.
std::vector<float> product(const std::vector<float>& a, const std::vector<float>& b, int columns) {
  std::vector<float> c(size_t(16 * columns));
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < columns; ++j) {
      for (int k = 0; k < 16; ++k) c[i + 16 * j] += a[i + 16 * k] * b[j + columns * k];
    }
  }
  return c;
}

// The fragments by another description than the PTX ISA's, from which the emulation is written: the
// thread-value layouts of CUTLASS 3 (include/cute/atom/mma_traits_sm80.hpp,
// SM80_16x8x16_F32BF16BF16F32_TN). With the lane (t, g) = (lane % 4, lane / 4) and the bits of the
// value's number, A is at 32 t + g + (16, 8, 128), B at 16 t + g + (8, 64), C at 32 t + g + (16,
// 8).
template <class T>
void one_instruction() {
  using cuda_test::convert;
  using cuda_test::widen;
  const std::vector<T> a = convert<T>(random_values(16 * 16, 4));
  const std::vector<T> b = convert<T>(random_values(8 * 16, 5));
  const std::vector<float> c = random_values(16 * 8, 6);
  std::vector<float> got(16 * 8, cuda_test::kNan);
  cuda_emulation::launch(
      nullptr,
      [&] {
        const int lane = int(cuda_emulation::thread_index().x);
        const int t = lane % 4, g = lane / 4;
        T a_values[8], b_values[4];
        float sums[4];
        const auto c_at = [&](int v) { return 32 * t + g + 16 * (v & 1) + 8 * (v >> 1); };
        for (int v = 0; v < 8; ++v) {
          a_values[v] = a[32 * t + g + 16 * (v & 1) + 8 * (v >> 1 & 1) + 128 * (v >> 2)];
        }
        for (int v = 0; v < 4; ++v) {
          b_values[v] = b[16 * t + g + 8 * (v & 1) + 64 * (v >> 1)];
          sums[v] = c[c_at(v)];
        }
        uint32_t a_registers[4], b_registers[2];
        std::memcpy(a_registers, a_values, sizeof a_values);
        std::memcpy(b_registers, b_values, sizeof b_values);
        using Device = std::conditional_t<std::is_same_v<T, __half>, __half, __nv_bfloat16>;
        cuda_emulation::multiply_add<Device>(sums, a_registers, b_registers[0], b_registers[1]);
        for (int v = 0; v < 4; ++v) got[c_at(v)] = sums[v];
      },
      {1, 1, 1}, {32, 1, 1}, 0);
  EXPECT_EQ(cuda_emulation::last_error(), nullptr);
  const std::vector<float> expected = product(widen(a), widen(b), 8);
  for (int i = 0; i < 16 * 8; ++i) EXPECT_NEAR(got[i], expected[i] + c[i], 1e-4) << i;
}

TEST(CudaEmulation, AnMmaIsAProduct) {
  one_instruction<bfloat16>();
  one_instruction<__half>();
}

TEST(CudaEmulation, TilesAreMultiplied) {
  const std::vector<float> a = random_values(256, 7), b = random_values(256, 8);
  const std::vector<__half> a16 = cuda_test::convert<__half>(a);
  const std::vector<__half> b16 = cuda_test::convert<__half>(b);
  for (int form = 0; form < 4; ++form) {
    TileProduct how;
    how.a_transposed = form & 1;
    how.b_transposed = form & 2;
    const std::vector<float> got = cuda_test::for_each_schedule([&] {
      std::vector<float> c(256);
      EXPECT_LAUNCHED(tile_product_cuda(how, FloatType::float16, a16.data(), b16.data(), c.data()));
      return c;
    });
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) {
          sum += cuda_test::value(a16[how.a_transposed ? k * 16 + i : i * 16 + k]) *
                 cuda_test::value(b16[how.b_transposed ? j * 16 + k : k * 16 + j]);
        }
        EXPECT_NEAR(got[i * 16 + j], sum, 1e-4) << form << " " << i << " " << j;
      }
    }
  }
}

#if !defined(__SANITIZE_THREAD__)
TEST(CudaEmulation, AMissingWaitForCopiesIsSeen) {
  const std::vector<__half> x = cuda_test::convert<__half>(random_values(256, 9));
  std::vector<float> c(256);
  TileProduct how;
  how.no_wait = true;
  const char* const error =
      tile_product_cuda(how, FloatType::float16, x.data(), x.data(), c.data());
  ASSERT_NE(error, nullptr);
  EXPECT_NE(std::string(error).find("before its copies were there"), std::string::npos) << error;
  for (bool early : {false, true}) {
    how = {};
    how.wait_early = early;
    how.read_former = !early;
    EXPECT_LAUNCHED(tile_product_cuda(how, FloatType::float16, x.data(), x.data(), c.data()));
    for (float v : c) EXPECT_TRUE(std::isnan(v));
  }
}
#endif

}  // namespace
}  // namespace transformer_ext
