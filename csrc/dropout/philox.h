// Counter-based dropout for C++ and CUDA.
//
// Whether an element is kept is a pure function of (seed, step, microstep, call site, row, column),
// by the Philox4x32 generator with 7 rounds (J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011, section 4.3). So a backward pass makes the mask
// again instead of reading it, and neither layout nor threads nor the device changes it.
//
//   key     = low and high half of the seed
//   counter = (column / 8, row, step, site + (microstep << 16)), each modulo 2^32
//
// The four words of one counter are eight 16-bit values, those of columns 8 i .. 8 i + 7, low half
// first. A column is kept if its value >= threshold = round(p * 65536), and then multiplied by
// 65536 / (65536 - threshold).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TRANSFORMER_EXT_HOST_DEVICE __host__ __device__
#else
#define TRANSFORMER_EXT_HOST_DEVICE
#endif

namespace transformer_ext {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

struct PhiloxWords {
  uint32_t word[4];
};

// The functions here are `static`: the same header is compiled for several instruction sets, and
// a weak symbol of one of them could be linked into another.
[[maybe_unused]] TRANSFORMER_EXT_HOST_DEVICE static inline PhiloxWords philox4x32(
    PhiloxWords counter, uint32_t key0, uint32_t key1, int rounds = kPhiloxRounds) {
  for (int i = 0; i < rounds; ++i) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * counter.word[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return counter;
}

// One call site of one step. threshold 0 = off: test it before asking for a mask.
struct Dropout {
  uint32_t key0 = 0;
  uint32_t key1 = 0;
  uint32_t step = 0;
  uint32_t site = 0;  // call site + (microstep << 16)
  uint32_t threshold = 0;
  float scale = 1.0f;
};

// round(p * 65536), ties to even, for 0 <= p <= 1.
[[maybe_unused]] TRANSFORMER_EXT_HOST_DEVICE static inline uint32_t dropout_threshold(double p) {
  const double scaled = p * 65536.0;
  const uint32_t floor = static_cast<uint32_t>(scaled);
  const double rest = scaled - floor;
  return floor + ((rest > 0.5 || (rest == 0.5 && (floor & 1u))) ? 1u : 0u);
}

// 0 where nothing is kept.
[[maybe_unused]] TRANSFORMER_EXT_HOST_DEVICE static inline float dropout_scale(uint32_t threshold) {
  return threshold >= 65536u ? 0.0f : static_cast<float>(65536.0 / (65536.0 - threshold));
}

// rng = (seed, step, microstep); nullptr means off. On a GPU it is read on the device.
[[maybe_unused]] TRANSFORMER_EXT_HOST_DEVICE static inline Dropout make_dropout(const int64_t* rng,
                                                                                int64_t site,
                                                                                double p) {
  Dropout dropout;
  const uint32_t threshold = dropout_threshold(p);
  if (rng == nullptr || threshold == 0) return dropout;
  const uint64_t seed = static_cast<uint64_t>(rng[0]);
  dropout.key0 = static_cast<uint32_t>(seed);
  dropout.key1 = static_cast<uint32_t>(seed >> 32);
  dropout.step = static_cast<uint32_t>(rng[1]);
  dropout.site = static_cast<uint32_t>(site) + (static_cast<uint32_t>(rng[2]) << 16);
  dropout.threshold = threshold;
  dropout.scale = dropout_scale(threshold);
  return dropout;
}

// The 128 random bits of columns 8 * block .. 8 * block + 7 of a row.
[[maybe_unused]] TRANSFORMER_EXT_HOST_DEVICE static inline PhiloxWords dropout_words(
    const Dropout& dropout, uint32_t row, uint32_t block) {
  return philox4x32({{block, row, dropout.step, dropout.site}}, dropout.key0, dropout.key1);
}

// The 16-bit value of column 8 * block + i, 0 <= i < 8.
[[maybe_unused]] TRANSFORMER_EXT_HOST_DEVICE static inline uint32_t dropout_value(
    const PhiloxWords& words, int i) {
  return (words.word[i >> 1] >> (16 * (i & 1))) & 0xffffu;
}

[[maybe_unused]] TRANSFORMER_EXT_HOST_DEVICE static inline bool dropout_keeps(
    const Dropout& dropout, int64_t row, int64_t column) {
  const PhiloxWords words = dropout_words(dropout, static_cast<uint32_t>(row),
                                          static_cast<uint32_t>(static_cast<uint64_t>(column) / 8));
  return dropout_value(words, static_cast<int>(column % 8)) >= dropout.threshold;
}

}  // namespace transformer_ext
