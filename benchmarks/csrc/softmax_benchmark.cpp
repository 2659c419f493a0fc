#include <benchmark/benchmark.h>

#include <vector>

#include "common/bfloat16.h"
#include "common/thread_pool.h"
#include "softmax/softmax.h"

namespace transformer_ext {
namespace {

// Scores of attention: 32 sentences, 8 heads, 128 queries, keys by argument.
template <class T, bool kBackward>
void softmax(benchmark::State& state) {
  const int64_t rows = 32 * 8 * 128, keys = state.range(0);
  std::vector<T> x(rows * keys, from_float<T>(0.5f)), out(x.size()), grad_x(x.size());
  const SoftmaxType type = std::is_same_v<T, float> ? SoftmaxType::float32 : SoftmaxType::bfloat16;
  const SoftmaxForward forward{x.data(), out.data(), rows, keys, {}, false};
  const SoftmaxBackward backward{x.data(), out.data(), grad_x.data(), rows, keys, false};
  ThreadPool pool;
  softmax_kernels().forward(forward, type, pool);
  for (auto _ : state) {
    if (kBackward) {
      softmax_kernels().backward(backward, type, pool);
    } else {
      softmax_kernels().forward(forward, type, pool);
    }
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(x.size() * sizeof(T)) *
                          (kBackward ? 3 : 2));
}

BENCHMARK_TEMPLATE(softmax, float, false)->Arg(32)->Arg(128)->UseRealTime();
BENCHMARK_TEMPLATE(softmax, float, true)->Arg(32)->Arg(128)->UseRealTime();
BENCHMARK_TEMPLATE(softmax, bfloat16, false)->Arg(32)->Arg(128)->UseRealTime();
BENCHMARK_TEMPLATE(softmax, bfloat16, true)->Arg(32)->Arg(128)->UseRealTime();

}  // namespace
}  // namespace transformer_ext
