// The dropout arguments of an op, checked.
#pragma once

#include <optional>

#include "common/torch_op.h"
#include "dropout/philox.h"

namespace transformer_ext {

// Off without rng, or when p rounds to 0. Reads rng, so it must be on the CPU.
inline Dropout dropout_argument(double p, const std::optional<Tensor>& rng, int64_t site) {
  CHECK_ARGUMENT(p >= 0.0 && p <= 1.0, "dropout_p: got ", p, ", expected a number from 0 to 1");
  CHECK_ARGUMENT(site >= 0 && site < 65536, "site: got ", site,
                 ", expected a number from 0 to 65535");
  if (!rng) return {};
  check_shape(*rng, "rng", {3});
  check_contiguous(*rng, "rng");
  return make_dropout(data<int64_t>(*rng, "rng"), site, p);
}

}  // namespace transformer_ext
