// What the tests of the engine's parts share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

namespace transformer_ext {

inline std::vector<float> random(size_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(n);
  for (float& value : values) value = normal(generator);
  return values;
}

}  // namespace transformer_ext
