// The schemas of all ops, in one place. An op's implementation is registered beside its code, in
// csrc/<subject>/<subject>_op.cpp (CPU) and csrc/<subject>/<subject>_op_cuda.cpp (CUDA).
// Tensor(a!) marks an argument that the op writes to.
#include "common/isa.h"
#include "common/torch_op.h"

namespace transformer_ext {
namespace {

std::string isa() { return isa_name(active_isa()); }

}  // namespace
}  // namespace transformer_ext

STABLE_TORCH_LIBRARY(transformer_ext, m) { m.def("isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(transformer_ext, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&transformer_ext::isa));
}
