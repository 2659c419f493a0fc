// The element types of CUDA kernels, for both sides of a launcher.
#pragma once

namespace transformer_ext {

enum class FloatType { float32, bfloat16, float16 };

}  // namespace transformer_ext
