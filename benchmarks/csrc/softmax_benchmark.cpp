#include <benchmark/benchmark.h>

#include "ceiling.h"
#include "common/bfloat16.h"
#include "common/thread_pool.h"
#include "softmax/softmax.h"

namespace transformer_ext {
namespace {

// Arguments: rows (queries of all heads), keys.
template <class T, bool kBackward>
void softmax(benchmark::State& state) {
  const int64_t rows = state.range(0), keys = state.range(1);
  Aligned<T> x(rows * keys, from_float<T>(0.5f)), out(x.size()), grad_x(x.size());
  const SoftmaxType type = std::is_same_v<T, float> ? SoftmaxType::float32 : SoftmaxType::bfloat16;
  const SoftmaxForward forward{x.data(), out.data(), rows, keys, {}, false};
  const SoftmaxBackward backward{x.data(), out.data(), grad_x.data(), rows, keys, false};
  ThreadPool pool;
  softmax_kernels().forward(forward, type, pool);
  const int64_t bytes = static_cast<int64_t>(x.size() * sizeof(T)) * (kBackward ? 3 : 2);
  against_copy(state, bytes, pool, [&] {
    if (kBackward) {
      softmax_kernels().backward(backward, type, pool);
    } else {
      softmax_kernels().forward(forward, type, pool);
    }
  });
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"rows", "keys"})
      ->ArgsProduct({{1024, 32768, 262144}, {32, 128}})
      ->Apply(in_turns);
}

BENCHMARK_TEMPLATE(softmax, float, false)->Apply(cases);
BENCHMARK_TEMPLATE(softmax, float, true)->Apply(cases);
BENCHMARK_TEMPLATE(softmax, bfloat16, false)->Apply(cases);
BENCHMARK_TEMPLATE(softmax, bfloat16, true)->Apply(cases);

}  // namespace
}  // namespace transformer_ext
