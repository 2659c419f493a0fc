// A block has a row, and passes over it twice: for its maximum and sums, kept as it goes along
// (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"), then for the
// gradient. The second pass should find the row in the L2 cache: 37,000 logits in bfloat16 are
// 74 KB, and few rows are under way at a time, because a long one has 512 threads (with 256 there
// would be 8 blocks a processor, 78 MB on an H200, whose cache has 50 to 60). So the bytes that
// memory sees are those of one read and, with a gradient, one write. In SASS for sm_90 the two
// passes take 12 and 8 instructions an element: two thirds of the time of the bytes on an H200.
#include <cstdint>

#include "common/cuda.cuh"
#include "cross_entropy/cross_entropy_cuda.h"

namespace transformer_ext {
namespace {

constexpr int kShortThreads = 128;
constexpr int kLongThreads = 512;
constexpr int64_t kLongBytes = 8192;  // rows above it are long
constexpr int kSumThreads = 256;

// So many neighbours are read and written at once.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// What a thread knows of the logits x that it has seen.
struct RowSums {
  float top = minus_infinity();
  float sum = 0.0f;  // of exp(x - top)
  // The maximum before the target tells, with that of all, whether the target is the arg max.
  float before = minus_infinity();
  float distance = 0.0f;  // sum of x - x[target]
};

constexpr float kLog2e = 1.44269504f;

// exp(x - top): four instructions with ex2.approx.ftz, seven with __expf, which cares for results
// below 2^-126. The error grows with the distance to the maximum, as the result shrinks.
__device__ inline float exp_below(float x, float top) {
#if defined(TRANSFORMER_EXT_CUDA_EMULATION)
  return exp2f((x - top) * kLog2e);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"((x - top) * kLog2e));
  return y;
#endif
}

template <int n>
__device__ inline void add(RowSums* r, const float (&x)[n], int64_t column, int64_t target,
                           float at_target) {
  float most = x[0];
#pragma unroll
  for (int i = 1; i < n; ++i) most = fmaxf(most, x[i]);
  const float top = fmaxf(r->top, most);
  // Forbidden tokens are -infinity: where all are, nothing may become infinity - infinity.
  const float below = top == minus_infinity() ? 0.0f : top;
  float sum = top == r->top ? r->sum : r->sum * exp_below(r->top, below);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    sum += exp_below(x[i], below);  // NaN if x is
    r->distance += x[i] - at_target;
  }
  if (column + n <= target) {
    r->before = fmaxf(r->before, most);
  } else if (column < target) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      r->before = column + i < target ? fmaxf(r->before, x[i]) : r->before;
    }
  }
  r->top = top;
  r->sum = sum;
}

template <class T, int n>
__device__ inline void load(const T* row, const float* bias, int64_t column, float (&x)[n]) {
  const Vector<T, n> v = *reinterpret_cast<const Vector<T, n>*>(row + column);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    x[i] = to_float(v.values[i]) + (bias == nullptr ? 0.0f : bias[column + i]);
  }
}

template <class T, int kThreads>
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
  constexpr int n = kVector<T>;
  const int64_t whole = vectors ? a.columns / n * n : 0;  // columns in vectors
  const int64_t first = static_cast<int64_t>(threadIdx.x) * n, step = kThreads * n;
  const float at_target = to_float(row[target]) + (a.bias == nullptr ? 0.0f : a.bias[target]);

  RowSums mine;
#pragma unroll 2
  for (int64_t c = first; c < whole; c += step) {
    float x[n];
    load(row, a.bias, c, x);
    add(&mine, x, c, target, at_target);
  }
  for (int64_t c = whole + threadIdx.x; c < a.columns; c += kThreads) {
    float x[1];
    load(row, a.bias, c, x);
    add(&mine, x, c, target, at_target);
  }
  const float top = block_reduce<kThreads>(mine.top, Max{});
  const float sum = block_reduce<kThreads>(
      mine.top == top ? mine.sum : mine.sum * exp_below(mine.top, top), Sum{});
  const float before = block_reduce<kThreads>(mine.before, Max{});
  const float distance = block_reduce<kThreads>(mine.distance, Sum{});
  const float uniform = a.label_smoothing / static_cast<float>(a.columns);
  const float shifted = at_target - top;
  if (threadIdx.x == 0) {
    const float nll = logf(sum) - shifted;
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
  for (int64_t c = first; c < whole; c += step) {
    float x[n];
    load(row, a.bias, c, x);
    Vector<T, n> y;
#pragma unroll
    for (int i = 0; i < n; ++i) y.values[i] = from_float<T>(exp_below(x[i], top) * factor - offset);
    *reinterpret_cast<Vector<T, n>*>(grad + c) = y;
  }
  for (int64_t c = whole + threadIdx.x; c < a.columns; c += kThreads) {
    float x[1];
    load(row, a.bias, c, x);
    grad[c] = from_float<T>(exp_below(x[0], top) * factor - offset);
  }
  // By the thread that has just written there.
  if (static_cast<int>(threadIdx.x) ==
      (target < whole ? target / n % kThreads : (target - whole) % kThreads)) {
    // In this order nothing is left over where the result is 0: a sure prediction, one column.
    const float probability = exp_below(at_target, top) / sum;
    grad[target] = from_float<T>(scale * ((probability - 1.0f) + (a.label_smoothing - uniform)));
  }
}

// One block for each of the three sums: the threads' rows in ascending order, then theirs pairwise.
__global__ void __launch_bounds__(kSumThreads) sum_kernel(CrossEntropyCuda a) {
  TRANSFORMER_EXT_SHARED(double, partial, kSumThreads);
  const float* const values = a.row_sums + blockIdx.x * a.rows;
  double sum = 0.0;
  for (int64_t r = threadIdx.x; r < a.rows; r += kSumThreads) sum += static_cast<double>(values[r]);
  partial[threadIdx.x] = sum;
  for (int step = kSumThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < step) partial[threadIdx.x] += partial[threadIdx.x + step];
  }
  if (threadIdx.x == 0) a.sums[blockIdx.x] = partial[0];
}

template <class T>
const char* run(const CrossEntropyCuda& a, cudaStream_t stream) {
  const bool vectors = reinterpret_cast<uintptr_t>(a.logits) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(a.grad) % 16 == 0 &&
                       a.logits_stride % kVector<T> == 0 && a.grad_stride % kVector<T> == 0;
  if (a.rows > 0) {
    const bool is_long = a.columns * static_cast<int64_t>(sizeof(T)) > kLongBytes;
    launch(is_long ? row_kernel<T, kLongThreads> : row_kernel<T, kShortThreads>,
           static_cast<unsigned>(a.rows), is_long ? kLongThreads : kShortThreads, 0, stream, a,
           vectors);
    if (const char* const error = launch_error()) return error;
  }
  launch(sum_kernel, 3u, kSumThreads, 0, stream, a);
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
