// For *_cuda_test.cpp: the types of the GPU in plain C++, and a run under several schedules.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/bfloat16.h"
#include "common/float_type.h"
#include "testing/cuda_emulation.h"
#include "testing/cuda_emulation/cuda_fp16.h"

namespace transformer_ext::cuda_test {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using half = __half;

inline float value(float x) { return x; }
inline float value(bfloat16 x) { return to_float(x); }
inline float value(half x) { return __half2float(x); }

template <class T>
T rounded(float x) {
  if constexpr (std::is_same_v<T, half>) {
    return __float2half_rn(x);
  } else {
    return from_float<T>(x);
  }
}

template <class T>
std::vector<T> convert(const std::vector<float>& x) {
  std::vector<T> out;
  out.reserve(x.size());
  for (float v : x) out.push_back(rounded<T>(v));
  return out;
}

template <class T>
std::vector<float> widen(const std::vector<T>& x) {
  std::vector<float> out;
  out.reserve(x.size());
  for (T v : x) out.push_back(value(v));
  return out;
}

template <class T>
constexpr FloatType float_type() {
  if (std::is_same_v<T, float>) return FloatType::float32;
  return std::is_same_v<T, half> ? FloatType::float16 : FloatType::bfloat16;
}

// Half the distance of 1 to the next number.
template <class T>
constexpr double unit() {
  if constexpr (std::is_same_v<T, float>) return 0x1p-24;
  return std::is_same_v<T, half> ? 0x1p-11 : 0x1p-8;
}

inline std::vector<float> random_values(size_t count, unsigned seed, float deviation = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> x(count);
  for (float& v : x) v = normal(random);
  return x;
}

// Where `expected` is NaN, nothing was to be written.
template <class T>
void expect_near(const std::vector<T>& got, const std::vector<float>& expected, double relative,
                 const char* name) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(expected[i])) continue;
    const double v = value(got[i]);
    EXPECT_NEAR(v, expected[i], relative * (1 + std::fabs(expected[i]))) << name << " " << i;
  }
}

// Runs `kernels` (which returns what the kernels wrote, as a vector) under several schedules, and
// returns the result, which must be the same bit for bit.
template <class F>
auto for_each_schedule(F&& kernels) {
  cuda_emulation::set_schedule(0);
  const auto first = kernels();
#if defined(__SANITIZE_THREAD__)
  return first;  // which finds races whatever the schedule, and takes its time
#endif
  for (unsigned schedule : {1u, 2u, 3u}) {
    cuda_emulation::set_schedule(schedule);
    const auto other = kernels();
    EXPECT_EQ(first.size(), other.size());
    EXPECT_EQ(std::memcmp(first.data(), other.data(), first.size() * sizeof(first[0])), 0)
        << "schedule " << schedule << " gives another result";
  }
  cuda_emulation::set_schedule(0);
  return first;
}

// Fails with what the emulation found.
#define EXPECT_LAUNCHED(call)                                                              \
  do {                                                                                     \
    const char* const launch_error_text = (call);                                          \
    EXPECT_EQ(launch_error_text, nullptr) << (launch_error_text ? launch_error_text : ""); \
  } while (false)

}  // namespace transformer_ext::cuda_test
