#pragma once

#include <cstdint>

namespace transformer_ext {

// Row numbers of a table, as int64 or int32 (the other pointer is nullptr). The kernels for
// CPUs trust them: the caller checks that each lies in its table.
struct Indices {
  const int64_t* wide;
  const int32_t* narrow;
};

}  // namespace transformer_ext
