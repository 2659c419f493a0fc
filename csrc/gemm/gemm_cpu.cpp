// The products of float32 and bfloat16.
#include "gemm/product.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {

extern const GemmKernels gemm_kernels = {
    kColumns,
    {&pack<float>, nullptr, &gemm<float>},
#if defined(__AVX512BF16__)
    {&pack<bfloat16>, &convert<bfloat16>, &gemm<bfloat16>},
#else
    {},
#endif
};

}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
