#include "common/simd.h"
#include "engine/cached_attention.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Vectors of a head that are held in registers at a time.
constexpr int kHeld = 4;

template <int kVectors>
void add_scores(const float* query, const float* const* keys, int64_t offset, int64_t length,
                bool first, float* scores) {
  VecF q[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) q[v] = load(query + v * kWidth);
  for (int64_t i = 0; i < length; ++i) {
    const float* const key = keys[i] + offset;
    VecF sum = q[0] * load(key);
#pragma GCC unroll 4
    for (int v = 1; v < kVectors; ++v) sum = q[v] * load(key + v * kWidth) + sum;
    const float score = reduce_add(sum);
    scores[i] = first ? score : scores[i] + score;
  }
}

void add_scores_partial(const float* query, const float* const* keys, int64_t offset,
                        int64_t length, int64_t n, bool first, float* scores) {
  const VecF q = load_partial(query, n);
  for (int64_t i = 0; i < length; ++i) {
    const float score = reduce_add(q * load_partial(keys[i] + offset, n));
    scores[i] = first ? score : scores[i] + score;
  }
}

template <int kVectors>
void weigh(const float* weights, const float* const* keys, int64_t offset, int64_t length,
           float scale, float* out) {
  VecF sum[kVectors] = {};
  for (int64_t i = 0; i < length; ++i) {
    const float* const value = keys[i] + offset;
    const VecF weight = broadcast(weights[i]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = weight * load(value + v * kWidth) + sum[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(out + v * kWidth, sum[v] * scale);
}

void weigh_partial(const float* weights, const float* const* keys, int64_t offset, int64_t length,
                   int64_t n, float scale, float* out) {
  VecF sum = zero();
  for (int64_t i = 0; i < length; ++i) {
    sum = broadcast(weights[i]) * load_partial(keys[i] + offset, n) + sum;
  }
  store_partial(out, sum * scale, n);
}

// Softmax without the division by the sum; returns the sum's inverse.
float exponentials(float* scores, int64_t length, float scale) {
  const int64_t padded = (length + kWidth - 1) / kWidth * kWidth;
  for (int64_t i = length; i < padded; ++i) scores[i] = -__builtin_inff();
  VecF highest = load(scores);
  for (int64_t i = kWidth; i < padded; i += kWidth) highest = max(load(scores + i), highest);
  const VecF maximum = broadcast(reduce_max(highest));
  VecF sum = zero();
  for (int64_t i = 0; i < padded; i += kWidth) {
    const VecF e = exp((load(scores + i) - maximum) * scale);
    store(scores + i, e);
    sum = sum + e;
  }
  return 1.0f / reduce_add(sum);
}

void attend(const CachedAttention& a) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t d = a.head_dim;
  for (int64_t head = 0; head < a.heads; ++head) {
    const float* const query = a.query + head * d;
    float* const out = a.out + head * d;
    const int64_t key = a.key_offset + head / group * d;
    const int64_t value = a.value_offset + head / group * d;
    int64_t c = 0;
    for (; c + kHeld * kWidth <= d; c += kHeld * kWidth) {
      add_scores<kHeld>(query + c, a.keys, key + c, a.length, c == 0, a.scores);
    }
    for (; c + kWidth <= d; c += kWidth) {
      add_scores<1>(query + c, a.keys, key + c, a.length, c == 0, a.scores);
    }
    if (c < d) add_scores_partial(query + c, a.keys, key + c, a.length, d - c, c == 0, a.scores);
    const float inverse = exponentials(a.scores, a.length, a.scale);
    if (a.weights != nullptr) {
      const float share = inverse / static_cast<float>(a.heads);
      for (int64_t i = 0; i < a.length; ++i) a.weights[i] += a.scores[i] * share;
    }
    c = 0;
    for (; c + kHeld * kWidth <= d; c += kHeld * kWidth) {
      weigh<kHeld>(a.scores, a.keys, value + c, a.length, inverse, out + c);
    }
    for (; c + kWidth <= d; c += kWidth) {
      weigh<1>(a.scores, a.keys, value + c, a.length, inverse, out + c);
    }
    if (c < d) weigh_partial(a.scores, a.keys, value + c, a.length, d - c, inverse, out + c);
  }
}

}  // namespace

extern const CachedAttentionKernels cached_attention_kernels = {&attend};

}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
