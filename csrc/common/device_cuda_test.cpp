#include "common/device_cuda.h"

#include <gtest/gtest.h>

#include <string>

#include "testing/cuda_emulation.h"

namespace transformer_ext {
namespace {

TEST(CudaDevice, SaysWhyNoKernelRunsThereAndWhetherThatLasts) {
  cuda_emulation::set_device(3);
  int lasts = 0;
  EXPECT_EQ(transformer_ext_cuda_problem(&lasts), nullptr);
  EXPECT_EQ(lasts, 1);
  cuda_emulation::fail_next(2);  // cudaErrorMemoryAllocation
  EXPECT_NE(transformer_ext_cuda_problem(&lasts), nullptr);
  EXPECT_EQ(lasts, 0);
  cuda_emulation::fail_next(35);  // cudaErrorInsufficientDriver
  const char* const problem = transformer_ext_cuda_problem(&lasts);
  ASSERT_NE(problem, nullptr);
  EXPECT_EQ(lasts, 1);
  EXPECT_NE(std::string(problem).find("(cuda:3, compute capability 9.0; "), std::string::npos)
      << problem;
  EXPECT_NE(std::string(problem).find(" by CUDA 13.0"), std::string::npos) << problem;
  EXPECT_EQ(transformer_ext_cuda_problem(&lasts), nullptr);
  cuda_emulation::set_device(0);
}

}  // namespace
}  // namespace transformer_ext
