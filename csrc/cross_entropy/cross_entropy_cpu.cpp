#include "common/simd.h"
#include "cross_entropy/cross_entropy.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Elements a task: enough to hide the cost of handing it out, few enough to balance.
constexpr int64_t kTaskElements = 32768;

constexpr float kInfinity = __builtin_inff();

struct RowLoss {
  float loss;
  float nll;
  float correct;
};

// A row of logits, with its bias where there is one.
template <class T, bool kBias>
struct Row {
  const T* logits;
  const float* bias;

  VecF vector(int64_t i) const {
    VecF v = load(logits + i);
    if constexpr (kBias) v += load(bias + i);
    return v;
  }
  VecF vector(int64_t i, int64_t n) const {
    VecF v = load_partial(logits + i, n);
    if constexpr (kBias) v += load_partial(bias + i, n);
    return v;
  }
  float scalar(int64_t i) const {
    float v = to_float(logits[i]);
    if constexpr (kBias) v += bias[i];
    return v;
  }
};

inline VecI first_lanes(int64_t n) {
  VecI lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n);
}

// Greatest element of [begin, end), -inf if there is none; a NaN is passed over.
template <class R>
float greatest(const R& row, int64_t begin, int64_t end) {
  VecF top[4] = {broadcast(-kInfinity), broadcast(-kInfinity), broadcast(-kInfinity),
                 broadcast(-kInfinity)};
  int64_t i = begin;
  for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) top[k] = max(row.vector(i + k * kWidth), top[k]);
  }
  for (; i + kWidth <= end; i += kWidth) top[0] = max(row.vector(i), top[0]);
  if (i < end) {
    top[0] =
        max(select(first_lanes(end - i), row.vector(i, end - i), broadcast(-kInfinity)), top[0]);
  }
  return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// `work` takes the row's exponentials: null (no gradient), or `columns` floats, which may be the
// row of grad itself.
template <class T, bool kBias, bool kGrad>
RowLoss cross_entropy_row(const Row<T, kBias>& row, int64_t target, int64_t columns,
                          float label_smoothing, float scale, float* work, T* grad) {
  const float at_target = row.scalar(target);
  // The maximum before the target and after it, apart, tell whether the target is the arg max.
  const float before = greatest(row, 0, target);
  const float after = greatest(row, target + 1, columns);
  float top = before > after ? before : after;
  if (at_target > top) top = at_target;

  VecF exp_sum[2] = {zero(), zero()};
  VecF shifted_sum[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * kWidth <= columns; i += 2 * kWidth) {
    for (int k = 0; k < 2; ++k) {
      const VecF shifted = row.vector(i + k * kWidth) - top;
      const VecF e = exp(shifted);
      shifted_sum[k] += shifted;
      exp_sum[k] += e;
      if constexpr (kGrad) store(work + i + k * kWidth, e);
    }
  }
  for (; i < columns; i += kWidth) {
    const int64_t n = columns - i < kWidth ? columns - i : kWidth;
    const VecI lanes = first_lanes(n);
    const VecF shifted = select(lanes, row.vector(i, n) - top, zero());
    const VecF e = select(lanes, exp(shifted), zero());
    shifted_sum[0] += shifted;
    exp_sum[0] += e;
    if constexpr (kGrad) store_partial(work + i, e, n);
  }
  const float sum = reduce_add(exp_sum[0] + exp_sum[1]);
  const float log_sum = __builtin_logf(sum);

  const float uniform = label_smoothing / static_cast<float>(columns);
  RowLoss result;
  result.nll = log_sum - (at_target - top);
  result.loss = log_sum - (1.0f - label_smoothing) * (at_target - top);
  // Without smoothing a logit of -inf (a forbidden token) must not become 0 * inf.
  if (label_smoothing > 0) result.loss -= uniform * reduce_add(shifted_sum[0] + shifted_sum[1]);
  result.correct = at_target > before && at_target >= after ? 1.0f : 0.0f;

  if constexpr (kGrad) {
    const float probability = work[target] / sum;
    const float factor = scale / sum;
    const float offset = scale * uniform;
    for (i = 0; i + kWidth <= columns; i += kWidth)
      store(grad + i, load(work + i) * factor - offset);
    if (i < columns) {
      store_partial(grad + i, load_partial(work + i, columns - i) * factor - offset, columns - i);
    }
    // In this order nothing is left over where the result is 0: a sure prediction, one column.
    grad[target] = from_float<T>(scale * ((probability - 1.0f) + (label_smoothing - uniform)));
  }
  return result;
}

template <class T, bool kBias, bool kGrad>
CrossEntropySums cross_entropy(const CrossEntropy<T>& a, Parallel& parallel) {
  CrossEntropySums sums;
  if (a.rows == 0 || a.columns == 0) return sums;
  const int64_t rows_per_task = a.columns < kTaskElements ? kTaskElements / a.columns : 1;
  const int64_t tasks = (a.rows + rows_per_task - 1) / rows_per_task;
  RowLoss* const results = static_cast<RowLoss*>(
      thread_scratch(static_cast<size_t>(a.rows) * sizeof(RowLoss), /*slot=*/0));
  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t begin = task * rows_per_task;
    const int64_t end = begin + rows_per_task < a.rows ? begin + rows_per_task : a.rows;
    float* work = nullptr;
    if constexpr (kGrad && sizeof(T) != sizeof(float)) {
      work = static_cast<float*>(
          thread_scratch(static_cast<size_t>(a.columns) * sizeof(float), /*slot=*/1));
    }
    for (int64_t r = begin; r < end; ++r) {
      T* const grad = kGrad ? a.grad + r * a.grad_stride : nullptr;
      if (a.targets[r] == a.ignore_index) {
        results[r] = {0, 0, 0};
        if constexpr (kGrad) {
          std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(a.columns) * sizeof(T));
        }
        continue;
      }
      if constexpr (kGrad && sizeof(T) == sizeof(float)) work = grad;
      const Row<T, kBias> row{a.logits + r * a.logits_stride, a.bias};
      results[r] = cross_entropy_row<T, kBias, kGrad>(row, a.targets[r], a.columns,
                                                      a.label_smoothing, a.scale, work, grad);
    }
  });
  for (int64_t r = 0; r < a.rows; ++r) {
    sums.loss += results[r].loss;
    sums.nll += results[r].nll;
    sums.correct += results[r].correct;
  }
  return sums;
}

template <class T>
CrossEntropySums cross_entropy(const CrossEntropy<T>& a, Parallel& parallel) {
  if (a.grad == nullptr) {
    return a.bias == nullptr ? cross_entropy<T, false, false>(a, parallel)
                             : cross_entropy<T, true, false>(a, parallel);
  }
  return a.bias == nullptr ? cross_entropy<T, false, true>(a, parallel)
                           : cross_entropy<T, true, true>(a, parallel);
}

template <class T>
void column_sum(const T* x, int64_t stride, int64_t rows, int64_t columns, bool accumulate,
                float* out, Parallel& parallel) {
  // Four vectors side by side: a cache line or more of each row, so that no line is read twice.
  constexpr int64_t kBlock = 4 * kWidth;
  constexpr int64_t kTaskColumns = 2 * kBlock;
  // The sums of so many rows are added up apart: the error grows with the square root of the rows
  // and not with the rows.
  constexpr int64_t kRows = 64;
  const int64_t tasks = (columns + kTaskColumns - 1) / kTaskColumns;
  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t begin = task * kTaskColumns;
    const int64_t end = begin + kTaskColumns < columns ? begin + kTaskColumns : columns;
    if (!accumulate) std::memset(out + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t last = first + kRows < rows ? first + kRows : rows;
      int64_t j = begin;
      for (; j + kBlock <= end; j += kBlock) {
        VecF sum[4] = {};
        for (int64_t r = first; r < last; ++r) {
          for (int k = 0; k < 4; ++k) sum[k] += load(x + r * stride + j + k * kWidth);
        }
        for (int k = 0; k < 4; ++k) {
          store(out + j + k * kWidth, load(out + j + k * kWidth) + sum[k]);
        }
      }
      for (; j < end; j += kWidth) {
        const int64_t n = end - j < kWidth ? end - j : kWidth;
        VecF sum = zero();
        for (int64_t r = first; r < last; ++r) sum += load_partial(x + r * stride + j, n);
        store_partial(out + j, load_partial(out + j, n) + sum, n);
      }
    }
  });
}

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels = {
    cross_entropy<float>, cross_entropy<bfloat16>, column_sum<float>, column_sum<bfloat16>};

}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
