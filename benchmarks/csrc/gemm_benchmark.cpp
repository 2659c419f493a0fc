// The three products of a linear map, in FLOP/s and as a share of the machine's multiply-adds on
// the same threads: forward (and the gradient of the input, which is the same with other weights)
// with packed weights, the gradient of the weight from factors as they lie. What bounds one row is
// the bytes of weights: `weights_GB/s`.
//
//     csrc_benchmarks --benchmark_filter=gemm
#include <benchmark/benchmark.h>

#include <cstdint>
#include <cstdlib>

#include "ceiling.h"
#include "common/thread_pool.h"
#include "gemm/gemm.h"

namespace transformer_ext {
namespace {

template <class T>
constexpr bool kFloat = sizeof(T) == sizeof(float);
template <class T>
constexpr GemmType kType = kFloat<T> ? GemmType::float32 : GemmType::bfloat16;
template <class T>
constexpr Arithmetic::Type kArithmetic = kFloat<T> ? Arithmetic::float32 : Arithmetic::bfloat16;

template <class T>
Aligned<T> random(int64_t n) {
  Aligned<T> x(static_cast<size_t>(n));
  for (T& v : x) v = from_float<T>(static_cast<float>(std::rand() % 2001 - 1000) * 1e-3f);
  return x;
}

template <class T>
void gemm_packed(benchmark::State& state) {
  if (!gemm_has(kType<T>)) return state.SkipWithError("no bfloat16 dot products");
  const int64_t m = state.range(0), n = state.range(1), k = state.range(2);
  ThreadPool pool(static_cast<int>(state.range(3)));
  const Aligned<T> x = random<T>(m * k);
  const Aligned<float> w = random<float>(n * k), bias = random<float>(n);
  Aligned<T> y(static_cast<size_t>(m * n));
  PackedMatrix packed;
  packed.pack(w.data(), n, k, k, pool, kType<T>);
  const GemmArguments arguments{m,        GemmInput{x.data(), kType<T>, k, 1},
                                packed,   nullptr,
                                0,        bias.data(),
                                y.data(), kType<T>,
                                n,        {}};
  against_arithmetic(state, 2.0 * static_cast<double>(m * n * k), kArithmetic<T>, pool,
                     [&] { gemm(arguments, pool); });
  state.counters["weights_GB/s"] =
      static_cast<double>(packed.bytes()) / state.counters["us"] * 1e-3;
}

// What the engine does with 8-bit weights: rows of float32, converted on the way, to float32.
void gemm_int8(benchmark::State& state) {
  const int64_t m = state.range(0), n = state.range(1), k = state.range(2);
  ThreadPool pool(static_cast<int>(state.range(3)));
  const Aligned<float> x = random<float>(m * k), w = random<float>(n * k), bias = random<float>(n);
  Aligned<float> y(static_cast<size_t>(m * n));
  PackedMatrix packed;
  packed.pack(w.data(), n, k, k, pool, GemmType::int8);
  against_arithmetic(state, 2.0 * static_cast<double>(m * n * k), Arithmetic::int8, pool,
                     [&] { gemm(x.data(), m, k, packed, bias.data(), y.data(), n, {}, pool); });
  state.counters["weights_GB/s"] =
      static_cast<double>(packed.bytes()) / state.counters["us"] * 1e-3;
}

// The gradient of a weight [n, k] from m tokens.
template <class T>
void gemm_weight_gradient(benchmark::State& state) {
  if (!gemm_has(kType<T>)) return state.SkipWithError("no bfloat16 dot products");
  const int64_t m = state.range(0), n = state.range(1), k = state.range(2);
  ThreadPool pool(static_cast<int>(state.range(3)));
  const Aligned<T> grad = random<T>(m * n), x = random<T>(m * k);
  Aligned<float> y(static_cast<size_t>(n * k));
  against_arithmetic(state, 2.0 * static_cast<double>(m * n * k), kArithmetic<T>, pool, [&] {
    gemm_matmul(GemmInput{grad.data(), kType<T>, 1, n}, n, x.data(), k, m, k, y.data(), k, {},
                pool);
  });
}

template <class T>
void gemm_pack(benchmark::State& state) {
  if (!gemm_has(kType<T>)) return state.SkipWithError("no bfloat16 dot products");
  const int64_t n = state.range(0), k = state.range(1);
  const bool transposed = state.range(2) != 0;
  ThreadPool pool(static_cast<int>(state.range(3)));
  const Aligned<float> w = random<float>(n * k);
  Aligned<char> out(gemm_packed_bytes(n, k, kType<T>));
  against_copy(state, n * k * 4 + static_cast<int64_t>(out.size()), pool, [&] {
    gemm_pack(w.data(), n, k, transposed ? 1 : k, transposed ? n : 1, kType<T>, out.data(), pool);
  });
}

// Rows of activations as factors of a product, which is done once for all tasks of it.
void gemm_convert(benchmark::State& state) {
  const GemmType type = static_cast<GemmType>(state.range(0));
  if (!gemm_has(type)) return state.SkipWithError("no bfloat16 dot products");
  const int64_t m = state.range(1), k = state.range(2);
  Serial serial;
  const Aligned<float> x = random<float>(m * k);
  Aligned<char> out(gemm_converted_bytes(m, k, type));
  against_copy(state, m * k * 4 + static_cast<int64_t>(out.size()), serial, [&] {
    benchmark::DoNotOptimize(gemm_convert(x.data(), m, k, k, type, out.data(), serial));
  });
}

void convert_shapes(benchmark::internal::Benchmark* b) {
  in_turns(b);
  b->ArgNames({"type", "m", "k"});
  for (const int64_t type : {1, 2}) {
    b->Args({type, 4, 512});
    b->Args({type, 128, 256});
    b->Args({type, 128, 512});
    b->Args({type, 128, 2048});
  }
}

void packed_shapes(benchmark::internal::Benchmark* b) {
  in_turns(b);
  b->ArgNames({"m", "n", "k", "threads"});
  for (const int64_t threads : {1, 2}) {
    for (const int64_t m : {1, 4, 64, 256, 4096}) {
      b->Args({m, 512, 512, threads});
      b->Args({m, 2048, 512, threads});
      b->Args({m, 512, 2048, threads});
    }
    b->Args({1, 32000, 512, threads});
    b->Args({160, 32000, 512, threads});
  }
}

void gradient_shapes(benchmark::internal::Benchmark* b) {
  in_turns(b);
  b->ArgNames({"m", "n", "k", "threads"});
  for (const int64_t threads : {1, 2}) {
    b->Args({2048, 256, 256, threads});
    b->Args({2048, 1024, 256, threads});
    b->Args({4096, 512, 512, threads});
    b->Args({4096, 2048, 512, threads});
    b->Args({4096, 512, 2048, threads});
    b->Args({1024, 32000, 512, threads});
  }
}

void pack_shapes(benchmark::internal::Benchmark* b) {
  in_turns(b);
  b->ArgNames({"n", "k", "transposed", "threads"});
  for (const int64_t transposed : {0, 1}) {
    b->Args({256, 1024, transposed, 1});
    b->Args({32000, 512, transposed, 2});
  }
}

BENCHMARK_TEMPLATE(gemm_packed, float)->Apply(packed_shapes);
BENCHMARK_TEMPLATE(gemm_packed, bfloat16)->Apply(packed_shapes);
BENCHMARK(gemm_int8)->Apply(packed_shapes);
BENCHMARK_TEMPLATE(gemm_weight_gradient, float)->Apply(gradient_shapes);
BENCHMARK_TEMPLATE(gemm_weight_gradient, bfloat16)->Apply(gradient_shapes);
BENCHMARK(gemm_convert)->Apply(convert_shapes);
BENCHMARK_TEMPLATE(gemm_pack, float)->Apply(pack_shapes);
BENCHMARK_TEMPLATE(gemm_pack, bfloat16)->Apply(pack_shapes);

}  // namespace
}  // namespace transformer_ext
