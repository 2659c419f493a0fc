// What bounds a step of decoding on so many threads, as a line of JSON: multiply-adds a second by
// type, each addition and each multiplication counted, and bytes read a second from memory.
// benchmarks/ceilings.py compiles it for the machine and runs it.
//
//     ceilings THREADS
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "arithmetic.h"
#include "common/thread_pool.h"

namespace transformer_ext {
namespace {

constexpr int kTurns = 5;

// The shortest of some turns: what takes longer was interrupted.
template <class Function>
double seconds(Function&& function) {
  double least = 1e9;
  for (int i = 0; i < kTurns; ++i) {
    const auto start = std::chrono::steady_clock::now();
    function();
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
    least = std::min(least, passed.count());
  }
  return least;
}

double operations(Arithmetic::Type type, Parallel& parallel) {
  const Arithmetic arithmetic(type);
  constexpr int kRuns = 400;
  const int threads = parallel.threads();
  const double time = seconds([&] {
    parallel.for_each(threads, [&](int64_t) {
      for (int i = 0; i < kRuns; ++i) arithmetic.run();
    });
  });
  return threads * kRuns * arithmetic.flop() / time;
}

double reads(Parallel& parallel) {
  // Far more than any cache that two threads share.
  constexpr size_t kWords = size_t{512} << 17, kChunk = size_t{1} << 17;
  const std::vector<uint64_t> memory(kWords, 1);
  std::vector<uint64_t> sums(kWords / kChunk);
  const double time = seconds([&] {
    parallel.for_each(static_cast<int64_t>(sums.size()), [&](int64_t i) {
      const uint64_t* chunk = memory.data() + static_cast<size_t>(i) * kChunk;
      sums[static_cast<size_t>(i)] = std::accumulate(chunk, chunk + kChunk, uint64_t{0});
    });
  });
  if (std::accumulate(sums.begin(), sums.end(), uint64_t{0}) != kWords) std::abort();
  return kWords * sizeof(uint64_t) / time;
}

void print(int threads) {
  ThreadPool pool(threads);
  std::printf("{\"float32\": %.4g, \"bfloat16\": %.4g, \"int8\": %.4g, \"read\": %.4g}\n",
              operations(Arithmetic::float32, pool), operations(Arithmetic::bfloat16, pool),
              operations(Arithmetic::int8, pool), reads(pool));
}

}  // namespace
}  // namespace transformer_ext

int main(int count, char** arguments) {
  if (count != 2 || std::atoi(arguments[1]) < 1) {
    std::fprintf(stderr, "usage: %s THREADS\n", arguments[0]);
    return 2;
  }
  transformer_ext::print(std::atoi(arguments[1]));
}
