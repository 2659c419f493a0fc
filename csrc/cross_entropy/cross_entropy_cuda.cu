// A block has a row, and passes over it twice: for its maximum and sums, kept as it goes along
// (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"), then for the
// gradient. A row of 32,000 logits in bfloat16 is 64 KB: the second pass finds it in the L2 cache.
// So the bytes that memory sees are those of one read and, with a gradient, one write.
#include <cstdint>

#include "common/cuda.cuh"
#include "cross_entropy/cross_entropy_cuda.h"

namespace transformer_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;

// Maximum, and the sum of exponentials below it.
struct Normalizer {
  float top;
  float sum;
};

__device__ inline void add(Normalizer* n, float x) {
  if (x <= n->top) {
    // Nothing is added where both are -infinity: a forbidden token.
    if (x != minus_infinity()) n->sum += expf(x - n->top);
  } else if (x > n->top) {
    n->sum = (n->top == minus_infinity() ? 0.0f : n->sum * expf(n->top - x)) + 1.0f;
    n->top = x;
  } else {
    n->sum = x;  // NaN
  }
}

// Calls visit(column, logit with bias) for the thread's columns, `kVector` neighbours at a time
// where they can be read so.
template <class T, class F>
__device__ inline void for_columns(const T* row, const float* bias, int64_t columns, bool vectors,
                                   F&& visit) {
  int64_t begin = 0;
  if (vectors) {
    begin = columns / kVector * kVector;
    for (int64_t c = static_cast<int64_t>(threadIdx.x) * kVector; c < begin;
         c += kThreads * kVector) {
      const Vector<T, kVector> x = *reinterpret_cast<const Vector<T, kVector>*>(row + c);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        visit(c + i, to_float(x.values[i]) + (bias == nullptr ? 0.0f : bias[c + i]));
      }
    }
  }
  for (int64_t c = begin + threadIdx.x; c < columns; c += kThreads) {
    visit(c, to_float(row[c]) + (bias == nullptr ? 0.0f : bias[c]));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) row_kernel(CrossEntropyCuda a, bool vectors) {
  const int64_t r = blockIdx.x;
  const T* const row = static_cast<const T*>(a.logits) + r * a.logits_stride;
  T* const grad = a.grad == nullptr ? nullptr : static_cast<T*>(a.grad) + r * a.grad_stride;
  const int64_t target = a.targets[r];
  const bool ignored = target == a.ignore_index;
  if (ignored || target < 0 || target >= a.columns) {
    for (int64_t c = threadIdx.x; grad != nullptr && c < a.columns; c += kThreads) {
      grad[c] = from_float<T>(0.0f);
    }
    if (threadIdx.x == 0) {
      const float sum = ignored ? 0.0f : __int_as_float(0x7fc00000);
      a.row_sums[r] = a.row_sums[a.rows + r] = sum;
      a.row_sums[2 * a.rows + r] = 0.0f;
    }
    return;
  }
  const float at_target = to_float(row[target]) + (a.bias == nullptr ? 0.0f : a.bias[target]);

  // The maximum before the target tells, with that of all, whether the target is the arg max.
  Normalizer mine{minus_infinity(), 0.0f};
  float before = minus_infinity();
  float distance = 0.0f;  // sum of x - x[target]
  for_columns(row, a.bias, a.columns, vectors, [&](int64_t c, float x) {
    add(&mine, x);
    if (c < target) before = fmaxf(before, x);
    distance += x - at_target;
  });
  const float top = block_reduce<kThreads>(mine.top, Max{});
  const float sum = block_reduce<kThreads>(
      mine.top == minus_infinity() ? mine.sum : mine.sum * expf(mine.top - top), Sum{});
  before = block_reduce<kThreads>(before, Max{});
  distance = block_reduce<kThreads>(distance, Sum{});
  const float log_sum = logf(sum);
  const float uniform = a.label_smoothing / static_cast<float>(a.columns);
  const float shifted = at_target - top;
  if (threadIdx.x == 0) {
    const float nll = log_sum - shifted;
    // log_sum - (1 - s) (x[target] - top) - s / V sum(x - top). Without smoothing a logit of -inf
    // must not become 0 * inf.
    a.row_sums[r] = a.label_smoothing > 0.0f ? nll - uniform * distance : nll;
    a.row_sums[a.rows + r] = nll;
    a.row_sums[2 * a.rows + r] = at_target > before && at_target >= top ? 1.0f : 0.0f;
  }
  if (grad == nullptr) return;
  const float scale = a.scale == nullptr ? 1.0f : *a.scale;
  const float factor = scale / sum;
  const float offset = scale * uniform;
  const float probability = expf(shifted) / sum;
  // In this order nothing is left over where the result is 0: a sure prediction, one column.
  const float grad_at_target = scale * ((probability - 1.0f) + (a.label_smoothing - uniform));
  int64_t begin = 0;
  if (vectors) {
    begin = a.columns / kVector * kVector;
    for (int64_t c = static_cast<int64_t>(threadIdx.x) * kVector; c < begin;
         c += kThreads * kVector) {
      const Vector<T, kVector> x = *reinterpret_cast<const Vector<T, kVector>*>(row + c);
      Vector<T, kVector> y;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float logit = to_float(x.values[i]) + (a.bias == nullptr ? 0.0f : a.bias[c + i]);
        y.values[i] =
            from_float<T>(c + i == target ? grad_at_target : expf(logit - top) * factor - offset);
      }
      *reinterpret_cast<Vector<T, kVector>*>(grad + c) = y;
    }
  }
  for (int64_t c = begin + threadIdx.x; c < a.columns; c += kThreads) {
    const float logit = to_float(row[c]) + (a.bias == nullptr ? 0.0f : a.bias[c]);
    grad[c] = from_float<T>(c == target ? grad_at_target : expf(logit - top) * factor - offset);
  }
}

// One block for each of the three sums: the threads' rows in ascending order, then theirs pairwise.
__global__ void __launch_bounds__(kThreads) sum_kernel(CrossEntropyCuda a) {
  TRANSFORMER_EXT_SHARED(double, partial, kThreads);
  const float* const values = a.row_sums + blockIdx.x * a.rows;
  double sum = 0.0;
  for (int64_t r = threadIdx.x; r < a.rows; r += kThreads) sum += static_cast<double>(values[r]);
  partial[threadIdx.x] = sum;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < step) partial[threadIdx.x] += partial[threadIdx.x + step];
  }
  if (threadIdx.x == 0) a.sums[blockIdx.x] = partial[0];
}

template <class T>
const char* run(const CrossEntropyCuda& a, cudaStream_t stream) {
  const uintptr_t bytes = kVector * sizeof(T);
  const bool vectors = reinterpret_cast<uintptr_t>(a.logits) % bytes == 0 &&
                       reinterpret_cast<uintptr_t>(a.grad) % bytes == 0 &&
                       a.logits_stride % kVector == 0 && a.grad_stride % kVector == 0;
  if (a.rows > 0 && a.columns > 0) {
    launch(row_kernel<T>, static_cast<unsigned>(a.rows), kThreads, 0, stream, a, vectors);
    if (const char* const error = launch_error()) return error;
  }
  launch(sum_kernel, 3u, kThreads, 0, stream, a);
  return launch_error();
}

}  // namespace

const char* cross_entropy_cuda(const CrossEntropyCuda& a, FloatType type, void* stream) {
  if (a.rows > INT32_MAX) return "more than 2^31 - 1 rows";
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (type) {
    case FloatType::float32:
      return run<float>(a, on);
    case FloatType::bfloat16:
      return run<__nv_bfloat16>(a, on);
    case FloatType::float16:
      return run<__half>(a, on);
  }
  return "an unknown type";
}

}  // namespace transformer_ext
