// y = x W^T of the model's shapes, in FLOP/s and as a fraction of the machine's multiply-adds: a
// loop of independent ones, measured in the same run with the same threads. `bytes_per_second` is
// of weights: what bounds one row.
//
//     csrc_benchmarks --benchmark_filter=gemm --benchmark_min_time=0.2
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "common/isa.h"
#include "common/thread_pool.h"
#include "gemm/gemm.h"

namespace transformer_ext {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Multiply-adds that do not wait for each other, in chains that differ. A macro, because GCC lowers
// vectors in a template for the target of the template, before it is inlined.
#define PEAK(name, width, attribute)                                                  \
  attribute double name() {                                                           \
    typedef float Vector __attribute__((vector_size(width * 4)));                     \
    constexpr int kChains = 12;                                                       \
    constexpr int64_t kSteps = 1 << 18;                                               \
    float half = 0.5f;                                                                \
    benchmark::DoNotOptimize(half);                                                   \
    const Vector a = half - Vector{};                                                 \
    Vector x[kChains];                                                                \
    for (int j = 0; j < kChains; ++j) x[j] = a * static_cast<float>(j);               \
    const double begin = seconds();                                                   \
    for (int64_t i = 0; i < kSteps; ++i) {                                            \
      _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) x[j] = x[j] * a + a; \
    }                                                                                 \
    const double time = seconds() - begin;                                            \
    float sum = 0;                                                                    \
    for (int j = 0; j < kChains; ++j) sum += x[j][0] + x[j][width - 1];               \
    benchmark::DoNotOptimize(sum);                                                    \
    return 2.0 * width * kChains * static_cast<double>(kSteps) / time;                \
  }

PEAK(peak_baseline, 4, )
#if defined(__x86_64__)
PEAK(peak_avx2, 8, __attribute__((target("avx2,fma"))))
PEAK(peak_avx512, 16, __attribute__((target("avx512f,fma"))))
#endif

double peak_of_one_thread() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512) return peak_avx512();
  if (active_isa() >= Isa::avx2) return peak_avx2();
#endif
  return peak_baseline();
}

// The best of a few, taken beside each benchmark: the clock and the neighbours change.
double peak(ThreadPool& pool) {
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    std::vector<double> each(static_cast<size_t>(pool.threads()));
    pool.for_each(pool.threads(),
                  [&](int64_t t) { each[static_cast<size_t>(t)] = peak_of_one_thread(); });
    double sum = 0;
    for (const double flops : each) sum += flops;
    best = std::max(best, sum);
  }
  return best;
}

std::vector<float> random(int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = static_cast<float>(std::rand() % 2001 - 1000) * 1e-3f;
  return x;
}

void report(benchmark::State& state, ThreadPool& pool, double time, double flops, double bytes) {
  const double calls = static_cast<double>(state.iterations());
  state.counters["flops"] = flops * calls / time;
  state.counters["of_peak"] = flops * calls / time / peak(pool);
  state.SetBytesProcessed(static_cast<int64_t>(bytes * calls));
}

void gemm_packed(benchmark::State& state) {
  const int64_t m = state.range(0), n = state.range(1), k = state.range(2);
  ThreadPool pool(static_cast<int>(state.range(3)));
  const std::vector<float> x = random(m * k), w = random(n * k), bias = random(n);
  std::vector<float> y(static_cast<size_t>(m * n));
  PackedMatrix packed;
  packed.pack(w.data(), n, k, k, pool);
  const double begin = seconds();
  for (auto _ : state) {
    gemm(x.data(), m, k, packed, bias.data(), y.data(), n, {}, pool);
    benchmark::ClobberMemory();
  }
  report(state, pool, seconds() - begin, 2.0 * static_cast<double>(m * n * k),
         4.0 * static_cast<double>(n * k));
}

// The gradient of a weight [m, n] from k tokens.
void gemm_weight_gradient(benchmark::State& state) {
  const int64_t m = state.range(0), n = state.range(1), k = state.range(2);
  ThreadPool pool(static_cast<int>(state.range(3)));
  const std::vector<float> a = random(k * m), b = random(k * n);
  std::vector<float> y(static_cast<size_t>(m * n));
  const double begin = seconds();
  for (auto _ : state) {
    gemm_matmul(GemmInput{a.data(), GemmType::float32, 1, m}, m, b.data(), n, k, n, y.data(), n, {},
                pool);
    benchmark::ClobberMemory();
  }
  report(state, pool, seconds() - begin, 2.0 * static_cast<double>(m * n * k),
         4.0 * static_cast<double>(n * k));
}

void packing(benchmark::State& state) {
  const int64_t n = state.range(0), k = state.range(1);
  ThreadPool pool(static_cast<int>(state.range(2)));
  const std::vector<float> w = random(n * k);
  PackedMatrix packed;
  for (auto _ : state) {
    packed.pack(w.data(), n, k, k, pool);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * 8 * n * k);
}

void packed_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"m", "n", "k", "threads"});
  for (const int64_t threads : {1, 2}) {
    for (const int64_t m : {1, 4, 8, 64, 256, 4096}) {
      b->Args({m, 512, 512, threads});
      b->Args({m, 2048, 512, threads});
      b->Args({m, 512, 2048, threads});
    }
    b->Args({1, 32000, 512, threads});
    b->Args({160, 32000, 512, threads});
  }
}

BENCHMARK(gemm_packed)->Apply(packed_shapes)->UseRealTime()->Unit(benchmark::kMicrosecond);
BENCHMARK(gemm_weight_gradient)
    ->ArgNames({"m", "n", "k", "threads"})
    ->Args({512, 512, 4096, 1})
    ->Args({2048, 512, 4096, 1})
    ->Args({512, 2048, 4096, 2})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(packing)
    ->Name("gemm_pack")
    ->ArgNames({"n", "k", "threads"})
    ->Args({2048, 512, 1})
    ->Args({2048, 512, 2})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace transformer_ext
