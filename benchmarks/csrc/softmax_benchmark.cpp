#include <benchmark/benchmark.h>

#include "ceiling.h"
#include "common/bfloat16.h"
#include "common/thread_pool.h"
#include "softmax/softmax.h"

namespace transformer_ext {
namespace {

// Arguments: rows (queries of all heads), keys.
template <class T>
void run(benchmark::State& state, bool backward) {
  const int64_t rows = state.range(0), keys = state.range(1);
  Aligned<T> x(rows * keys, from_float<T>(0.5f)), out(x.size()), grad_x(x.size());
  const SoftmaxType type = std::is_same_v<T, float> ? SoftmaxType::float32 : SoftmaxType::bfloat16;
  const SoftmaxForward forward_args{x.data(), out.data(), rows, keys, {}, false};
  const SoftmaxBackward backward_args{x.data(), out.data(), grad_x.data(), rows, keys, false};
  ThreadPool pool;
  softmax_kernels().forward(forward_args, type, pool);
  const int64_t bytes = static_cast<int64_t>(x.size() * sizeof(T)) * (backward ? 3 : 2);
  against_copy(state, bytes, pool, [&] {
    if (backward) {
      softmax_kernels().backward(backward_args, type, pool);
    } else {
      softmax_kernels().forward(forward_args, type, pool);
    }
  });
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"rows", "keys"})
      ->ArgsProduct({{1024, 32768, 262144}, {32, 128}})
      ->Apply(in_turns);
}

template <class T>
void softmax_forward(benchmark::State& state) {
  run<T>(state, false);
}

template <class T>
void softmax_backward(benchmark::State& state) {
  run<T>(state, true);
}

BENCHMARK_TEMPLATE(softmax_forward, float)->Apply(cases);
BENCHMARK_TEMPLATE(softmax_backward, float)->Apply(cases);
BENCHMARK_TEMPLATE(softmax_forward, bfloat16)->Apply(cases);
BENCHMARK_TEMPLATE(softmax_backward, bfloat16)->Apply(cases);

}  // namespace
}  // namespace transformer_ext
