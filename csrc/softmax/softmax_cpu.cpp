#include "common/simd.h"
#include "softmax/softmax.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Elements a task: enough to hide the cost of handing it out, few enough to balance.
constexpr int64_t kTaskElements = 32768;

constexpr float kInfinity = __builtin_inff();

typedef uint8_t VecB __attribute__((vector_size(kWidth)));

inline VecI load_mask(const uint8_t* mask) {
  VecB bytes;
  std::memcpy(&bytes, mask, sizeof bytes);
  return __builtin_convertvector(bytes, VecI) != 0;
}

inline VecI load_mask_partial(const uint8_t* mask, int64_t n) {
  VecB bytes{};
  std::memcpy(&bytes, mask, static_cast<size_t>(n));
  return __builtin_convertvector(bytes, VecI) != 0;
}

template <class T>
void fill(T* out, int64_t begin, int64_t end, float value) {
  const VecF v = broadcast(value);
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) store(out + i, v);
  store_partial(out + i, v, end - i);
}

// Accumulators of a row's sum or maximum side by side: a single one would be a chain of dependent
// additions, slower and, in a narrow instruction set, less exact.
constexpr int kChains = 4;

// Calls body(first column, columns, chain) for each vector of a row; columns is kWidth but for the
// last.
template <class Body>
inline void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kChains * kWidth <= n; i += kChains * kWidth) {
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) body(i + k * kWidth, kWidth, k);
  }
  // Unrolled, so that the accumulators of a short row are registers and not memory.
#pragma GCC unroll 4
  for (int k = 0; k < kChains - 1; ++k) {
    if (i + kWidth > n) break;
    body(i, kWidth, k);
    i += kWidth;
  }
  if (i < n) body(i, n - i, kChains - 1);
}

inline float sum_chains(const VecF (&x)[kChains]) {
  return reduce_add((x[0] + x[1]) + (x[2] + x[3]));
}

inline float max_chains(const VecF (&x)[kChains]) {
  return reduce_max(max(max(x[0], x[1]), max(x[2], x[3])));
}

template <class T>
inline VecF load_n(const T* p, int64_t n) {
  return n == kWidth ? load(p) : load_partial(p, n);
}

template <class T>
inline void store_n(T* p, VecF v, int64_t n) {
  if (n == kWidth) {
    store(p, v);
  } else {
    store_partial(p, v, n);
  }
}

inline VecI first_lanes(int64_t n) {
  VecI lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n);
}

// The maximum over the lanes, their sum and the division of one row wait for each other, those of
// different rows do not: so many rows go through the phases together.
constexpr int kRowGroup = 4;

// x -> out over the first `columns` slots, of which mask (null: all) keeps some; 0, or -inf for the
// logarithm, in the others. `work` holds `columns` floats and may be `out`.
template <class T>
struct Row {
  const T* x;
  const uint8_t* mask;
  float* work;
  T* out;
  int64_t columns;
};

// Copies what is kept to work, -inf elsewhere; returns the maximum.
template <class T>
float row_maximum(Row<T> row) {
  VecF top[kChains];
  for (VecF& t : top) t = broadcast(-kInfinity);
  for_each_vector(row.columns, [&](int64_t i, int64_t n, int k) {
    VecF v = load_n(row.x + i, n);
    if (row.mask != nullptr) {
      v = select(n == kWidth ? load_mask(row.mask + i) : load_mask_partial(row.mask + i, n), v,
                 broadcast(-kInfinity));
    }
    if (n < kWidth) v = select(first_lanes(n), v, broadcast(-kInfinity));
    top[k] = max(v, top[k]);  // a NaN loses here and reaches the result through the sum below
    store_n(row.work + i, v, n);
  });
  const float maximum = max_chains(top);
  // A row of only masked slots and NaN has no maximum: 0 in its place lets the NaN through.
  return maximum == -kInfinity ? 0.0f : maximum;
}

template <class T, bool kLog>
float row_sum(Row<T> row, float shift) {
  VecF total[kChains] = {};
  for_each_vector(row.columns, [&](int64_t i, int64_t n, int k) {
    VecF e = exp(load_n(row.work + i, n) - shift);
    if (n < kWidth) e = select(first_lanes(n), e, zero());
    total[k] += e;
    if constexpr (!kLog) store_n(row.work + i, e, n);
  });
  return sum_chains(total);
}

template <class T, bool kLog>
void write_row(Row<T> row, float shift, float sum, int64_t all_columns) {
  if (sum == 0.0f) {
    fill(row.out, 0, all_columns, 0.0f);
    return;
  }
  if constexpr (kLog) {
    const float log_sum = __builtin_logf(sum);
    for_each_vector(row.columns, [&](int64_t i, int64_t n, int) {
      const VecF v = load_n(row.work + i, n);
      store_n(row.out + i, select(v == -kInfinity, v, (v - shift) - log_sum), n);
    });
  } else {
    const float inverse = 1.0f / sum;
    for_each_vector(row.columns, [&](int64_t i, int64_t n, int) {
      const VecF e = load_n(row.work + i, n);
      // The select keeps masked slots at 0 where a NaN elsewhere in the row makes the sum NaN.
      store_n(row.out + i, select(e == 0.0f, e, e * inverse), n);
    });
  }
  fill(row.out, row.columns, all_columns, kLog ? -kInfinity : 0.0f);
}

template <class T, bool kLog>
void forward_rows(const Row<T>* rows, int count, int64_t all_columns) {
  float shift[kRowGroup], sum[kRowGroup];
  for (int r = 0; r < count; ++r) shift[r] = row_maximum(rows[r]);
  for (int r = 0; r < count; ++r) sum[r] = row_sum<T, kLog>(rows[r], shift[r]);
  for (int r = 0; r < count; ++r) write_row<T, kLog>(rows[r], shift[r], sum[r], all_columns);
}

template <class T, bool kLog>
void forward(const SoftmaxForward& a, Parallel& parallel) {
  if (a.rows == 0 || a.columns == 0) return;
  const SoftmaxMask& keep = a.keep;
  const int64_t rows_per_task = a.columns < kTaskElements ? kTaskElements / a.columns : 1;
  const int64_t tasks = (a.rows + rows_per_task - 1) / rows_per_task;
  const int64_t rows_per_batch = keep.dims > 0 && keep.sizes[0] > 0 ? a.rows / keep.sizes[0] : 1;

  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t begin = task * rows_per_task;
    const int64_t end = begin + rows_per_task < a.rows ? begin + rows_per_task : a.rows;
    float* work = nullptr;
    if constexpr (sizeof(T) != sizeof(float)) {
      work = static_cast<float*>(
          thread_scratch(static_cast<size_t>(kRowGroup * a.columns) * sizeof(float)));
    }

    int64_t index[kSoftmaxMaxDims] = {};
    int64_t mask_offset = 0;
    for (int64_t d = keep.dims - 1, rest = begin; d >= 0; --d) {
      index[d] = rest % keep.sizes[d];
      rest /= keep.sizes[d];
      mask_offset += index[d] * keep.strides[d];
    }

    Row<T> rows[kRowGroup];
    int count = 0;
    for (int64_t row = begin; row < end; ++row) {
      int64_t columns = a.columns;
      if (keep.key_lengths != nullptr) {
        const int64_t length = keep.key_lengths[row / rows_per_batch];
        columns = length < 0 ? 0 : length < columns ? length : columns;
      }
      if (keep.causal && index[keep.dims - 1] + 1 < columns) columns = index[keep.dims - 1] + 1;
      const uint8_t* mask = keep.mask == nullptr ? nullptr : keep.mask + mask_offset;
      if (mask != nullptr && keep.column_stride == 0) {
        if (*mask == 0) columns = 0;
        mask = nullptr;
      }

      const T* const x = static_cast<const T*>(a.x) + row * a.columns;
      T* const out = static_cast<T*>(a.out) + row * a.columns;
      float* line;
      if constexpr (sizeof(T) == sizeof(float)) {
        line = out;
      } else {
        line = work + count * a.columns;
      }
      rows[count++] = {x, mask, line, out, columns};
      if (count == kRowGroup || row + 1 == end) {
        forward_rows<T, kLog>(rows, count, a.columns);
        count = 0;
      }

      for (int d = keep.dims - 1; d >= 0; --d) {
        mask_offset += keep.strides[d];
        if (++index[d] < keep.sizes[d]) break;
        mask_offset -= keep.strides[d] * keep.sizes[d];
        index[d] = 0;
      }
    }
  });
}

// d x = y * (grad - sum(grad * y)). A slot with y = 0 is masked (or its gradient is 0 anyway): it
// must not be read from grad, which may hold NaN there.
template <class T>
void softmax_backward_rows(const T* grad, const T* y, T* grad_x, int64_t rows, int64_t columns) {
  float dot[kRowGroup];
  for (int64_t begin = 0; begin < rows; begin += kRowGroup) {
    const int64_t count = begin + kRowGroup < rows ? kRowGroup : rows - begin;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = (begin + r) * columns;
      VecF total[kChains] = {};
      for_each_vector(columns, [&](int64_t i, int64_t n, int k) {
        const VecF p = load_n(y + at + i, n);
        total[k] += select(p == 0.0f, zero(), p * load_n(grad + at + i, n));
      });
      dot[r] = sum_chains(total);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = (begin + r) * columns;
      const VecF shift = broadcast(dot[r]);
      for_each_vector(columns, [&](int64_t i, int64_t n, int) {
        const VecF p = load_n(y + at + i, n);
        const VecF v = p * (load_n(grad + at + i, n) - shift);
        store_n(grad_x + at + i, select(p == 0.0f, zero(), v), n);
      });
    }
  }
}

// d x = grad - exp(y) * sum(grad), over the slots with y > -inf.
template <class T>
void log_softmax_backward_row(const T* grad, const T* y, T* grad_x, int64_t columns) {
  // Two log-probabilities of 0 cannot stand in one row: such a row had no kept slot. (Nor does a
  // row of one slot have a gradient.)
  if (columns == 1 || (to_float(y[0]) == 0.0f && to_float(y[1]) == 0.0f)) {
    fill(grad_x, 0, columns, 0.0f);
    return;
  }
  VecF total[kChains] = {};
  for_each_vector(columns, [&](int64_t i, int64_t n, int k) {
    total[k] += select(load_n(y + i, n) == -kInfinity, zero(), load_n(grad + i, n));
  });
  const float sum = sum_chains(total);
  for_each_vector(columns, [&](int64_t i, int64_t n, int) {
    const VecF v = load_n(y + i, n);
    store_n(grad_x + i, select(v == -kInfinity, zero(), load_n(grad + i, n) - exp(v) * sum), n);
  });
}

template <class T>
void backward(const SoftmaxBackward& a, Parallel& parallel) {
  if (a.rows == 0 || a.columns == 0) return;
  const int64_t rows_per_task = a.columns < kTaskElements ? kTaskElements / a.columns : 1;
  const int64_t tasks = (a.rows + rows_per_task - 1) / rows_per_task;
  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t begin = task * rows_per_task;
    const int64_t end = begin + rows_per_task < a.rows ? begin + rows_per_task : a.rows;
    const int64_t offset = begin * a.columns;
    const T* const grad = static_cast<const T*>(a.grad) + offset;
    const T* const y = static_cast<const T*>(a.output) + offset;
    T* const grad_x = static_cast<T*>(a.grad_x) + offset;
    if (a.log) {
      for (int64_t at = 0; at < (end - begin) * a.columns; at += a.columns) {
        log_softmax_backward_row(grad + at, y + at, grad_x + at, a.columns);
      }
    } else {
      softmax_backward_rows(grad, y, grad_x, end - begin, a.columns);
    }
  });
}

template <class T>
void forward(const SoftmaxForward& a, Parallel& parallel) {
  if (a.log) {
    forward<T, true>(a, parallel);
  } else {
    forward<T, false>(a, parallel);
  }
}

void forward_any(const SoftmaxForward& a, SoftmaxType type, Parallel& parallel) {
  if (type == SoftmaxType::bfloat16) {
    forward<bfloat16>(a, parallel);
  } else {
    forward<float>(a, parallel);
  }
}

void backward_any(const SoftmaxBackward& a, SoftmaxType type, Parallel& parallel) {
  if (type == SoftmaxType::bfloat16) {
    backward<bfloat16>(a, parallel);
  } else {
    backward<float>(a, parallel);
  }
}

}  // namespace

extern const SoftmaxKernels softmax_kernels = {forward_any, backward_any};

}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
