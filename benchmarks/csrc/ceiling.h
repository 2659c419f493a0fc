// What the machine could do at best, measured in the same run as the kernel it is compared with.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "arithmetic.h"
#include "common/parallel.h"

namespace transformer_ext {

// Memory as torch hands it out, at a multiple of 64 bytes. With std::allocator, whose large blocks
// lie 16 bytes past one, every 64-byte load and store goes over the end of a cache line, which
// costs a kernel in the cache up to half of its speed.
template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  AlignedAllocator(const AlignedAllocator<U>&) {}  // NOLINT(google-explicit-constructor)
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const AlignedAllocator&) const { return true; }
};

template <class T>
using Aligned = std::vector<T, AlignedAllocator<T>>;

// Copies from one half of `bytes` bytes to the other, 64 KiB a task: that many are read and
// written.
class Copy {
 public:
  explicit Copy(int64_t bytes)
      : source_(static_cast<size_t>(bytes) / 2, 1), target_(source_.size()) {}

  void run(Parallel& parallel) {
    constexpr size_t kChunk = 65536;
    parallel.for_each(static_cast<int64_t>((source_.size() + kChunk - 1) / kChunk), [&](int64_t i) {
      const size_t begin = static_cast<size_t>(i) * kChunk;
      std::memcpy(target_.data() + begin, source_.data() + begin,
                  std::min(kChunk, source_.size() - begin));
    });
  }

 private:
  Aligned<char> source_;
  Aligned<char> target_;
};

// More than the caches of a machine hold.
constexpr double kColdBytes = 256e6;

// Reads `bytes` bytes that are in no cache, 64 KiB a task.
class Read {
 public:
  explicit Read(double bytes)
      : chunks_(static_cast<int64_t>(std::ceil(bytes / kChunk))),
        source_(static_cast<size_t>(
                    std::max<int64_t>(chunks_, static_cast<int64_t>(kColdBytes / kChunk)) * kChunk),
                1) {}

  void run(Parallel& parallel) {
    typedef uint64_t Vector __attribute__((vector_size(64)));
    const int64_t all = static_cast<int64_t>(source_.size()) / kChunk;
    parallel.for_each(chunks_, [&](int64_t i) {
      const char* const begin = source_.data() + (first_ + i) % all * kChunk;
      Vector sums[8] = {};
      for (int64_t at = 0; at < kChunk; at += static_cast<int64_t>(sizeof sums)) {
        for (int64_t v = 0; v < 8; ++v) {
          Vector x;
          std::memcpy(&x, begin + at + v * static_cast<int64_t>(sizeof x), sizeof x);
          sums[v] += x;
        }
      }
      for (const Vector& sum : sums) benchmark::DoNotOptimize(sum);
    });
    first_ = (first_ + chunks_) % all;
  }

 private:
  static constexpr int64_t kChunk = 65536;
  int64_t chunks_;
  int64_t first_ = 0;
  Aligned<char> source_;
};

constexpr int kTurns = 31;

inline double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Seconds of a call: the first call is not counted, then as many as last about 0.2 ms.
template <class Function>
double turn(Function&& function, int64_t calls) {
  using Clock = std::chrono::steady_clock;
  function();
  const auto start = Clock::now();
  for (int64_t i = 0; i < calls; ++i) function();
  return std::chrono::duration<double>(Clock::now() - start).count() / static_cast<double>(calls);
}

template <class Function>
int64_t calls_in_a_turn(Function&& function) {
  return std::max<int64_t>(1, static_cast<int64_t>(0.2e-3 / std::max(turn(function, 3), 1e-7)));
}

struct Seconds {
  double kernel;
  double ceiling;
};

// A kernel in turns with what bounds it; medians of a call.
template <class Kernel, class Ceiling>
Seconds in_turns_with(benchmark::State& state, Kernel&& kernel, Ceiling&& ceiling) {
  const int64_t kernel_calls = calls_in_a_turn(kernel);
  const int64_t ceiling_calls = calls_in_a_turn(ceiling);
  std::vector<double> kernel_seconds, ceiling_seconds;
  for (auto _ : state) {
    kernel_seconds.push_back(turn(kernel, kernel_calls));
    state.SetIterationTime(kernel_seconds.back());
    ceiling_seconds.push_back(turn(ceiling, ceiling_calls));
  }
  const Seconds seconds{median(kernel_seconds), median(ceiling_seconds)};
  state.counters["us"] = seconds.kernel * 1e6;
  return seconds;
}

// Times a kernel that reads and writes `bytes` bytes, in turns with a copy of as many bytes;
// reports the kernel's bytes a second and the share that this is of the copy's, by medians.
template <class Kernel>
void against_copy(benchmark::State& state, int64_t bytes, Parallel& parallel, Kernel&& kernel) {
  Copy ceiling(bytes);
  const Seconds seconds = in_turns_with(state, kernel, [&] { ceiling.run(parallel); });
  state.counters["GB/s"] = static_cast<double>(bytes) / seconds.kernel * 1e-9;
  state.counters["copy_GB/s"] = static_cast<double>(bytes) / seconds.ceiling * 1e-9;
  state.counters["of_copy"] = seconds.ceiling / seconds.kernel;
}

// The same for a kernel that only reads, and from memory.
template <class Kernel>
void against_read(benchmark::State& state, double bytes, Parallel& parallel, Kernel&& kernel) {
  Read ceiling(bytes);
  const Seconds seconds = in_turns_with(state, kernel, [&] { ceiling.run(parallel); });
  state.counters["GB/s"] = bytes / seconds.kernel * 1e-9;
  state.counters["read_GB/s"] = bytes / seconds.ceiling * 1e-9;
  state.counters["of_read"] = seconds.ceiling / seconds.kernel;
}

// Times a kernel of `flop` operations, in turns with independent multiply-adds on the same threads;
// reports the kernel's operations a second and the share that this is of the arithmetic's.
template <class Kernel>
void against_arithmetic(benchmark::State& state, double flop, Arithmetic::Type type,
                        Parallel& parallel, Kernel&& kernel) {
  const Arithmetic ceiling(type);
  const int threads = parallel.threads();
  // Long beside the time that it takes to wake another thread.
  constexpr int kRuns = 64;
  const Seconds seconds = in_turns_with(state, kernel, [&] {
    parallel.for_each(threads, [&](int64_t) {
      for (int i = 0; i < kRuns; ++i) ceiling.run();
    });
  });
  const double peak = threads * kRuns * ceiling.flop() / seconds.ceiling;
  state.counters["GFLOP/s"] = flop / seconds.kernel * 1e-9;
  state.counters["peak_GFLOP/s"] = peak * 1e-9;
  state.counters["of_peak"] = flop / seconds.kernel / peak;
}

template <class Kernel>
void against_arithmetic(benchmark::State& state, double flop, Arithmetic::Type type,
                        Kernel&& kernel) {
  Serial serial;
  against_arithmetic(state, flop, type, serial, kernel);
}

inline void in_turns(benchmark::internal::Benchmark* benchmark) {
  benchmark->UseManualTime()->Iterations(kTurns);
}

}  // namespace transformer_ext
