#pragma once

#include "common/float_type.h"

namespace transformer_ext {

// How the operands of the product lie in memory, and what is forgotten.
struct TileProduct {
  bool a_transposed = false;
  bool b_transposed = false;
  bool no_wait = false;      // for the copies into shared memory
  bool wait_early = false;   // for all groups but the last
  bool read_former = false;  // the first operand, while the second is copied in its place
};

// c = a * b, each 16 x 16 without gaps, c in float32.
const char* tile_product_cuda(const TileProduct& how, FloatType type, const void* a, const void* b,
                              float* c);

}  // namespace transformer_ext
