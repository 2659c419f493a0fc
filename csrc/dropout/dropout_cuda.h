// Dropout as an argument of a CUDA kernel: seed, step and microstep stay on the device, where each
// kernel reads them, so that a CUDA graph draws anew at each replay.
#pragma once

#include <cstdint>

#include "dropout/philox.h"

namespace transformer_ext {

struct CudaDropout {
  const int64_t* rng = nullptr;  // (seed, step, microstep), on the device
  uint32_t site = 0;
  uint32_t threshold = 0;  // 0: off
  float scale = 1.0f;
};

// Off without rng, or when p rounds to 0.
[[maybe_unused]] static inline CudaDropout cuda_dropout(const int64_t* rng, int64_t site,
                                                        double p) {
  const uint32_t threshold = dropout_threshold(p);
  if (rng == nullptr || threshold == 0) return {};
  return {rng, static_cast<uint32_t>(site), threshold, dropout_scale(threshold)};
}

[[maybe_unused]] TRANSFORMER_EXT_HOST_DEVICE static inline Dropout read_dropout(
    const CudaDropout& argument) {
  Dropout dropout;
  dropout.threshold = argument.threshold;
  dropout.scale = argument.scale;
  if (argument.threshold == 0) return dropout;
  const uint64_t seed = static_cast<uint64_t>(argument.rng[0]);
  dropout.key0 = static_cast<uint32_t>(seed);
  dropout.key1 = static_cast<uint32_t>(seed >> 32);
  dropout.step = static_cast<uint32_t>(argument.rng[1]);
  dropout.site = argument.site + (static_cast<uint32_t>(argument.rng[2]) << 16);
  return dropout;
}

}  // namespace transformer_ext
