#include <benchmark/benchmark.h>

#include <vector>

#include "ceiling.h"
#include "common/thread_pool.h"
#include "embedding/embedding.h"

namespace transformer_ext {
namespace {

constexpr int64_t kTokens = 4096;
constexpr int64_t kColumns = 512;

// Arguments: rows of the table, dropout in percent.
template <class T>
void run(benchmark::State& state, bool backward) {
  const int64_t rows = state.range(0);
  const int64_t rng[3] = {1, 2, 3};
  const Dropout dropout = make_dropout(rng, 4, static_cast<double>(state.range(1)) / 100);
  std::vector<int64_t> ids(kTokens);
  // Squares of an even spread: the low ids are the frequent ones, as in a vocabulary.
  for (int64_t t = 0; t < kTokens; ++t) {
    const int64_t spread = t * 2654435761 % 65536;
    ids[static_cast<size_t>(t)] = spread * spread / 65536 * rows / 65536;
  }
  Aligned<float> weight(static_cast<size_t>(rows * kColumns), 0.5f);
  Aligned<T> out(static_cast<size_t>(kTokens * kColumns), from_float<T>(0.5f));
  ThreadPool pool;
  const EmbeddingKernels& kernels = embedding_kernels();
  const EmbeddingForward<T> forward_args{{ids.data(), nullptr},
                                         weight.data(),
                                         2.0f,
                                         {},
                                         nullptr,
                                         out.data(),
                                         kTokens,
                                         kColumns,
                                         dropout};
  const EmbeddingBackward<T> backward_args{
      out.data(), {ids.data(), nullptr}, 2.0f, weight.data(), kTokens, kColumns, rows, dropout};
  const size_t bytes =
      out.size() * sizeof(T) + (backward ? weight.size() : out.size()) * sizeof(float);
  against_copy(state, static_cast<int64_t>(bytes), pool, [&] {
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
  benchmark->ArgNames({"rows", "dropout%"})->ArgsProduct({{8000, 32000}, {0, 10}})->Apply(in_turns);
}

template <class T>
void embedding_forward(benchmark::State& state) {
  run<T>(state, false);
}

template <class T>
void embedding_backward(benchmark::State& state) {
  run<T>(state, true);
}

BENCHMARK_TEMPLATE(embedding_forward, float)->Apply(cases);
BENCHMARK_TEMPLATE(embedding_backward, float)->Apply(cases);
BENCHMARK_TEMPLATE(embedding_forward, bfloat16)->Apply(cases);
BENCHMARK_TEMPLATE(embedding_backward, bfloat16)->Apply(cases);

}  // namespace
}  // namespace transformer_ext
