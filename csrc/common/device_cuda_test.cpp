#include "common/device_cuda.h"

#include <gtest/gtest.h>

#include <string>

#include "testing/cuda_emulation.h"

namespace transformer_ext {
namespace {

TEST(CudaDevice, SaysWhyNoKernelRunsThereAndLeavesTheDevice) {
  cuda_emulation::set_device(3);
  EXPECT_EQ(transformer_ext_cuda_problem(1), nullptr);
  cuda_emulation::fail_next(35);  // cudaErrorInsufficientDriver
  const char* const problem = transformer_ext_cuda_problem(1);
  ASSERT_NE(problem, nullptr);
  EXPECT_NE(std::string(problem).find("(cuda:1, compute capability 9.0; "), std::string::npos)
      << problem;
  EXPECT_NE(std::string(problem).find(" by CUDA 13.0"), std::string::npos) << problem;
  EXPECT_EQ(transformer_ext_cuda_problem(1), nullptr);
  EXPECT_EQ(cuda_emulation::device(), 3);
  cuda_emulation::set_device(0);
}

}  // namespace
}  // namespace transformer_ext
