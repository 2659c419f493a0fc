#include <benchmark/benchmark.h>

#include "activation/activation.h"
#include "ceiling.h"
#include "common/thread_pool.h"

namespace transformer_ext {
namespace {

constexpr int64_t kColumns = 2048;

// Arguments: kind, rows, dropout in percent.
template <class T>
void run(benchmark::State& state, bool backward) {
  const Activation kind = static_cast<Activation>(state.range(0));
  const int64_t rows = state.range(1);
  const int64_t rng[3] = {1, 2, 3};
  const Dropout dropout = make_dropout(rng, 4, static_cast<double>(state.range(2)) / 100);
  const int64_t x_columns = is_gated(kind) ? 2 * kColumns : kColumns;
  Aligned<T> x(static_cast<size_t>(rows * x_columns), from_float<T>(0.5f)), grad_x(x.size());
  Aligned<T> out(static_cast<size_t>(rows * kColumns), from_float<T>(0.5f));
  Aligned<float> bias(static_cast<size_t>(x_columns)), grad_bias(bias.size());
  ThreadPool pool;
  const ActivationKernels& kernels = activation_kernels();
  const ActivationForward<T> forward_args{x.data(), bias.data(), out.data(), rows,
                                          kColumns, kind,        dropout};
  const ActivationBackward<T> backward_args{out.data(),       x.data(), bias.data(), grad_x.data(),
                                            grad_bias.data(), rows,     kColumns,    kind,
                                            dropout};
  const size_t elements = out.size() + (backward ? 2 : 1) * x.size();
  against_copy(state, static_cast<int64_t>(elements * sizeof(T)), pool, [&] {
    if constexpr (std::is_same_v<T, float>) {
      backward ? kernels.backward_f32(backward_args, pool)
               : kernels.forward_f32(forward_args, pool);
    } else {
      backward ? kernels.backward_bf16(backward_args, pool)
               : kernels.forward_bf16(forward_args, pool);
    }
  });
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"kind", "rows", "dropout%"})
      ->ArgsProduct(
          {benchmark::CreateDenseRange(0, kActivations - 1, 1), {256, 2048, 8192}, {0, 10}})
      ->Apply(in_turns);
}

template <class T>
void activation_forward(benchmark::State& state) {
  run<T>(state, false);
}

template <class T>
void activation_backward(benchmark::State& state) {
  run<T>(state, true);
}

BENCHMARK_TEMPLATE(activation_forward, float)->Apply(cases);
BENCHMARK_TEMPLATE(activation_backward, float)->Apply(cases);
BENCHMARK_TEMPLATE(activation_forward, bfloat16)->Apply(cases);
BENCHMARK_TEMPLATE(activation_backward, bfloat16)->Apply(cases);

}  // namespace
}  // namespace transformer_ext
