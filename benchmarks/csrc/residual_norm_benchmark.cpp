#include <benchmark/benchmark.h>

#include "ceiling.h"
#include "common/thread_pool.h"
#include "residual_norm/residual_norm.h"

namespace transformer_ext {
namespace {

constexpr int64_t kColumns = 512;

// Arguments: rows, dropout in percent.
template <class T>
void run(benchmark::State& state, bool backward) {
  const int64_t rows = state.range(0);
  const size_t size = static_cast<size_t>(rows * kColumns);
  const int64_t rng[3] = {1, 2, 3};
  const Dropout dropout = make_dropout(rng, 4, static_cast<double>(state.range(1)) / 100);
  const bool drop = dropout.threshold != 0;
  Aligned<T> x(size, from_float<T>(0.5f)), residual(size, from_float<T>(-1.0f)), sum(size),
      normed(size), grad_x(drop ? size : 0);
  Aligned<float> weight(kColumns, 1.0f), bias(kColumns), mean(rows), rstd(rows);
  Aligned<float> grad_weight(kColumns), grad_bias(kColumns);
  ThreadPool pool;
  const ResidualNormForward<T> forward_args{x.data(),   residual.data(), weight.data(), bias.data(),
                                            sum.data(), normed.data(),   mean.data(),   rstd.data(),
                                            rows,       kColumns,        false,         1e-5f,
                                            dropout};
  const ResidualNormBackward<T> backward_args{x.data(),
                                              nullptr,
                                              sum.data(),
                                              mean.data(),
                                              rstd.data(),
                                              weight.data(),
                                              drop ? grad_x.data() : nullptr,
                                              normed.data(),
                                              grad_weight.data(),
                                              grad_bias.data(),
                                              rows,
                                              kColumns,
                                              false,
                                              dropout};
  const auto call = [&](bool back) {
    const ResidualNormKernels& kernels = residual_norm_kernels();
    if constexpr (std::is_same_v<T, float>) {
      back ? kernels.backward_f32(backward_args, pool) : kernels.forward_f32(forward_args, pool);
    } else {
      back ? kernels.backward_bf16(backward_args, pool) : kernels.forward_bf16(forward_args, pool);
    }
  };
  call(false);
  const int64_t passes = backward && !drop ? 3 : 4;
  against_copy(state, passes * static_cast<int64_t>(size * sizeof(T)), pool,
               [&] { call(backward); });
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"rows", "dropout%"})
      ->ArgsProduct({{1024, 4096, 32768}, {0, 10}})
      ->Apply(in_turns);
}

template <class T>
void residual_norm_forward(benchmark::State& state) {
  run<T>(state, false);
}

template <class T>
void residual_norm_backward(benchmark::State& state) {
  run<T>(state, true);
}

BENCHMARK_TEMPLATE(residual_norm_forward, float)->Apply(cases);
BENCHMARK_TEMPLATE(residual_norm_backward, float)->Apply(cases);
BENCHMARK_TEMPLATE(residual_norm_forward, bfloat16)->Apply(cases);
BENCHMARK_TEMPLATE(residual_norm_backward, bfloat16)->Apply(cases);

}  // namespace
}  // namespace transformer_ext
