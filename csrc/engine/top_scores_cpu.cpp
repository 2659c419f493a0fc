#include "common/simd.h"
#include "engine/top_scores.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Columns whose maximum is compared with the lowest entry at once.
constexpr int kVectors = 4;
constexpr int64_t kBlock = kVectors * kWidth;

void insert(TopScores* top, float score, int32_t id) {
  int32_t at = top->count < top->capacity ? top->count++ : top->capacity - 1;
  for (; at > 0 && top->scores[at - 1] < score; --at) {
    top->scores[at] = top->scores[at - 1];
    top->ids[at] = top->ids[at - 1];
  }
  top->scores[at] = score;
  top->ids[at] = id;
}

// The first `lanes` of a vector; minus infinity in the others.
VecF first_or_infinity(const float* p, int64_t lanes) {
  float values[kWidth];
  for (int i = 0; i < kWidth; ++i) values[i] = i < lanes ? p[i] : -__builtin_inff();
  return load(values);
}

bool is_full(const TopScores& top) { return top.count == top.capacity; }

// Lower scores are not among the highest so far; others may be.
float bound_of(const TopScores& top) {
  const float lowest = is_full(top) ? top.scores[top.capacity - 1] : -__builtin_inff();
  return lowest > top.floor ? lowest : top.floor;
}

// A bit for each lane.
uint32_t lanes_not_below(VecF v, VecF bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)bound, _CMP_GE_OQ)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kWidth; ++lane) bits |= v[lane] >= bound[lane] ? 1u << lane : 0u;
  return bits;
#endif
}

VecF load_block_vector(const float* scores, int64_t n, int64_t at) {
  const int64_t lanes = n - at;
  return lanes >= kWidth ? load(scores + at)
         : lanes > 0     ? first_or_infinity(scores + at, lanes)
                         : broadcast(-__builtin_inff());
}

// The first scores of a row. As many lanes as entries are wanted have a score that is not below the
// n-th highest of the lanes' maxima: what is lower need not be looked at. (Otherwise most of the
// first few dozen scores are entered, only to be pushed out again.)
void raise_floor(const float* scores, int64_t n, TopScores* top) {
  if (top->capacity > kWidth) return;
  VecF lanes = broadcast(-__builtin_inff());
  for (int64_t i = 0; i + kWidth <= n; i += kWidth) lanes = max(load(scores + i), lanes);
  float highest[kWidth];
  store(highest, lanes);
  for (int i = 1; i < kWidth; ++i) {
    const float score = highest[i];
    int at = i;
    for (; at > 0 && highest[at - 1] < score; --at) highest[at] = highest[at - 1];
    highest[at] = score;
  }
  const float floor = highest[top->capacity - 1];
  if (floor > top->floor) top->floor = floor;
}

void scan(const float* scores, int64_t n, int32_t first_id, TopScores* top) {
  if (top->count == 0) raise_floor(scores, n, top);
  VecF highest = broadcast(-__builtin_inff());
  float bound = bound_of(*top);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    VecF v[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) v[i] = load_block_vector(scores, n, begin + i * kWidth);
    const VecF block = max(max(v[0], v[1]), max(v[2], v[3]));
    highest = max(block, highest);
    if (lanes_not_below(block, broadcast(bound)) == 0) continue;
    for (int i = 0; i < kVectors; ++i) {
      uint32_t bits = lanes_not_below(v[i], broadcast(bound));
      for (; bits != 0; bits &= bits - 1) {
        const int64_t at = begin + i * kWidth + __builtin_ctz(bits);
        if (at >= n) break;  // a lane behind the last score
        const float score = scores[at];
        // An equal one comes behind, with its higher id.
        const float lowest = is_full(*top) ? top->scores[top->capacity - 1] : -__builtin_inff();
        if (score < top->floor || !(score > lowest)) continue;
        insert(top, score, first_id + static_cast<int32_t>(at));
        bound = bound_of(*top);
      }
    }
  }
  const float old = top->maximum;
  float maximum = old;
  if (const float most = reduce_max(highest); most > old) {
    maximum = most;
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
