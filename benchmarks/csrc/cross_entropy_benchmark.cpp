#include <benchmark/benchmark.h>

#include <vector>

#include "common/thread_pool.h"
#include "cross_entropy/cross_entropy.h"

namespace transformer_ext {
namespace {

// Loss and gradient in place of a chunk of logits, columns by argument.
template <class T>
void cross_entropy(benchmark::State& state) {
  const int64_t rows = 512, columns = state.range(0);
  std::vector<T> logits(rows * columns, from_float<T>(0.5f));
  std::vector<int64_t> targets(rows, 1);
  CrossEntropy<T> arguments;
  arguments.logits = logits.data();
  arguments.grad = logits.data();
  arguments.logits_stride = arguments.grad_stride = columns;
  arguments.targets = targets.data();
  arguments.rows = rows;
  arguments.columns = columns;
  arguments.label_smoothing = 0.1f;
  ThreadPool pool;
  for (auto _ : state) {
    if constexpr (std::is_same_v<T, float>) {
      cross_entropy_kernels().cross_entropy_float32(arguments, pool);
    } else {
      cross_entropy_kernels().cross_entropy_bfloat16(arguments, pool);
    }
  }
  state.SetBytesProcessed(state.iterations() * rows * columns *
                          static_cast<int64_t>(2 * sizeof(T)));
}

BENCHMARK_TEMPLATE(cross_entropy, float)->Arg(8000)->Arg(32000)->UseRealTime();
BENCHMARK_TEMPLATE(cross_entropy, bfloat16)->Arg(8000)->Arg(32000)->UseRealTime();

}  // namespace
}  // namespace transformer_ext
