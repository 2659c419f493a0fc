#pragma once

namespace transformer_ext {

enum class BrokenKernel {
  none,
  no_barrier,
  diverging_shuffle,
  diverging_barrier,
  shuffle_from_outside,
  beyond_shared,
  float_atomics,
  reduction,
};

// One block of 64 threads; x and out of 64 elements.
const char* broken_kernel_cuda(BrokenKernel which, const float* x, float* out);

}  // namespace transformer_ext
