#include "common/simd.h"
#include "engine/top_scores.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Columns whose maximum is compared with the lowest entry at once.
constexpr int64_t kBlock = 4 * kWidth;

void insert(TopScores* top, float score, int32_t id) {
  int32_t at = top->count < top->capacity ? top->count++ : top->capacity - 1;
  for (; at > 0 && top->scores[at - 1] < score; --at) {
    top->scores[at] = top->scores[at - 1];
    top->ids[at] = top->ids[at - 1];
  }
  top->scores[at] = score;
  top->ids[at] = id;
}

// A score is among the highest so far if it is above this.
float threshold_of(const TopScores& top) {
  // An equal one may be: its id may be lower than those of the others.
  const float floor = __builtin_nextafterf(top.floor, -__builtin_inff());
  if (top.count < top.capacity) return floor;
  const float lowest = top.scores[top.capacity - 1];
  return lowest > floor ? lowest : floor;
}

bool any_above(VecF v, VecF bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)bound, _CMP_GT_OQ)) != 0;
#else
  return reduce_max(v) > bound[0];
#endif
}

void scan(const float* scores, int64_t n, int32_t first_id, TopScores* top) {
  VecF highest = broadcast(-__builtin_inff());
  float threshold = threshold_of(*top);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    VecF block = highest;
    if (end - begin == kBlock) {
      block = max(max(load(scores + begin), load(scores + begin + kWidth)),
                  max(load(scores + begin + 2 * kWidth), load(scores + begin + 3 * kWidth)));
    } else {
      for (int64_t i = begin; i < end; ++i) block = max(broadcast(scores[i]), block);
    }
    highest = max(block, highest);
    if (!any_above(block, broadcast(threshold))) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (scores[i] > threshold) {
        insert(top, scores[i], first_id + static_cast<int32_t>(i));
        threshold = threshold_of(*top);
      }
    }
  }
  const float old = top->maximum;
  float maximum = old;
  if (any_above(highest, broadcast(old))) {
    maximum = reduce_max(highest);
    const VecF rescale = exp(broadcast(old) - broadcast(maximum));
    top->sum *= rescale[0];
    top->maximum = maximum;
  }
  const VecF shift = broadcast(maximum == -__builtin_inff() ? 0.0f : maximum);
  VecF sum[4] = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[v] = sum[v] + exp(load(scores + i + v * kWidth) - shift);
  }
  for (; i < n; i += kWidth) {
    const int64_t left = n - i < kWidth ? n - i : kWidth;
    sum[0] = sum[0] + first_lanes(exp(load_partial(scores + i, left) - shift), left);
  }
  top->sum += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

void add_probabilities(const float* scores, int64_t n, float log_sum, float weight, float* sum) {
  const VecF shift = broadcast(log_sum);
  const VecF factor = broadcast(weight);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store(sum + i, exp(load(scores + i) - shift) * factor + load(sum + i));
  }
  if (i < n) {
    const VecF part = exp(load_partial(scores + i, n - i) - shift) * factor;
    store_partial(sum + i, part + load_partial(sum + i, n - i), n - i);
  }
}

}  // namespace

extern const TopScoresKernels top_scores_kernels = {&scan, &add_probabilities};

}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
