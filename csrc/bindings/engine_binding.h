// The decoding engine in the module `transformer_ext._C`.
#pragma once

#include <pybind11/pybind11.h>

namespace transformer_ext {

void bind_engine(pybind11::module_& m);

}  // namespace transformer_ext
