// One thread, packed sequences of equal length in one [rows, 3 * heads * head_dim] buffer:
// forward and backward. 4 (forward) and 10 (backward) floating-point operations are counted for
// each pair of tokens and each element of a head, exponentials and packing none. A batch of 1 stays
// in the cache.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <cstdlib>

#include "attention/attention.h"
#include "ceiling.h"
#include "common/bfloat16.h"

namespace transformer_ext {
namespace {

constexpr int64_t kHeadDim = 64;

template <class T>
struct Problem {
  Problem(int64_t batch, int64_t heads, int64_t length, bool causal)
      : rows(batch * length),
        width(heads * kHeadDim),
        qkv(fill(rows * 3 * width)),
        grad_qkv(qkv.size()),
        out(static_cast<size_t>(rows * width)),
        grad_out(fill(rows * width)),
        statistics(static_cast<size_t>(2 * rows * heads)),
        ends(static_cast<size_t>(batch + 1)) {
    for (int64_t b = 0; b <= batch; ++b) {
      ends[static_cast<size_t>(b)] = static_cast<int32_t>(b * length);
    }
    args.bfloat16 = sizeof(T) == 2;
    args.batch = batch;
    args.heads = args.kv_heads = heads;
    args.head_dim = kHeadDim;
    args.query_length = args.key_length = rows;
    args.max_query_length = args.max_key_length = length;
    args.cu_seqlens_q = args.cu_seqlens_k = ends.data();
    args.causal = causal;
    args.scale = 0.125f;
    args.query = slice(qkv, 3, 0);
    args.key = slice(qkv, 3, 1);
    args.value = slice(qkv, 3, 2);
    args.out = slice(out, 1, 0);
    args.grad_out = slice(grad_out, 1, 0);
    args.grad_query = slice(grad_qkv, 3, 0);
    args.grad_key = slice(grad_qkv, 3, 1);
    args.grad_value = slice(grad_qkv, 3, 2);
    args.statistics = statistics.data();
    pairs = static_cast<double>(rows * length * heads) * (causal ? 0.5 : 1.0);
  }

  static Aligned<T> fill(int64_t n) {
    Aligned<T> x(static_cast<size_t>(n));
    for (T& v : x) v = from_float<T>(static_cast<float>(std::rand() % 2001 - 1000) * 1e-3f);
    return x;
  }

  AttentionTensor slice(Aligned<T>& x, int64_t parts, int64_t part) const {
    return {x.data() + part * width, 0, parts * width, kHeadDim};
  }

  int64_t rows;
  int64_t width;
  Aligned<T> qkv, grad_qkv, out, grad_out;
  Aligned<float> statistics;
  Aligned<int32_t> ends;
  AttentionBackwardArgs args;
  double pairs;
};

template <class T>
void run(benchmark::State& state, bool backward) {
  Problem<T> problem(state.range(0), 8, state.range(1), state.range(2) != 0);
  if (state.range(3) != 0) {
    const int64_t rng[3] = {1, 2, 0};
    problem.args.dropout = make_dropout(rng, 1, 0.1);
  }
  Serial serial;
  const AttentionKernels& kernels = attention_kernels();
  kernels.forward(problem.args, serial);
  const double flop = (backward ? 10.0 : 4.0) * problem.pairs * kHeadDim;
  against_arithmetic(state, flop,
                     problem.args.bfloat16 ? Arithmetic::bfloat16 : Arithmetic::float32, [&] {
                       if (backward) {
                         kernels.backward(problem.args, serial);
                       } else {
                         kernels.forward(problem.args, serial);
                       }
                     });
}

template <class T>
void attention_forward(benchmark::State& state) {
  run<T>(state, false);
}

template <class T>
void attention_backward(benchmark::State& state) {
  run<T>(state, true);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"batch", "length", "causal", "dropout"})->Apply(in_turns);
  for (const int64_t length : {8, 16, 32, 64, 128}) b->Args({1, length, 0, 0});
  for (const int64_t length : {16, 32, 64, 128}) b->Args({32, length, 0, 0});
  b->Args({1, 32, 1, 0})->Args({1, 32, 0, 1})->Args({1, 2048, 0, 0})->Args({1, 2048, 1, 0});
}

BENCHMARK_TEMPLATE(attention_forward, float)->Apply(shapes);
BENCHMARK_TEMPLATE(attention_backward, float)->Apply(shapes);
BENCHMARK_TEMPLATE(attention_forward, bfloat16)->Apply(shapes);
BENCHMARK_TEMPLATE(attention_backward, bfloat16)->Apply(shapes);

}  // namespace
}  // namespace transformer_ext
