// bfloat16 as storage: 16 bits, the upper half of a float32. Arithmetic is done in float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace transformer_ext {

struct bfloat16 {
  uint16_t bits;
};

[[maybe_unused]] static inline float to_float(float x) { return x; }

[[maybe_unused]] static inline float to_float(bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
[[maybe_unused]] static inline bfloat16 to_bfloat16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <class T>
static inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  return to_bfloat16(x);
}

}  // namespace transformer_ext
