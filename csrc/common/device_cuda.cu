#include "common/cuda.cuh"
#include "common/device_cuda.h"

namespace transformer_ext {
namespace {

// All files are compiled for the same GPUs: what holds of this kernel holds of all.
__global__ void probe() {}

}  // namespace
}  // namespace transformer_ext

const char* transformer_ext_cuda_problem(int* lasts) {
  using namespace transformer_ext;
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  *lasts = error == cudaSuccess || is_about_the_build(error);
  if (error != cudaSuccess) fail(error, "the attributes of a kernel");
  return launch_error();
}
