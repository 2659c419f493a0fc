// What the machine could do at best, measured in the same run as the kernel it is compared with.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

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

// Times a kernel that reads and writes `bytes` bytes, in turns with a copy of as many bytes;
// reports the kernel's bytes a second and the share that this is of the copy's, by medians.
template <class Kernel>
void against_copy(benchmark::State& state, int64_t bytes, Parallel& parallel, Kernel&& kernel) {
  Copy ceiling(bytes);
  const auto copy = [&] { ceiling.run(parallel); };
  const int64_t kernel_calls = calls_in_a_turn(kernel);
  const int64_t copy_calls = calls_in_a_turn(copy);
  std::vector<double> kernel_seconds, copy_seconds;
  for (auto _ : state) {
    kernel_seconds.push_back(turn(kernel, kernel_calls));
    state.SetIterationTime(kernel_seconds.back());
    copy_seconds.push_back(turn(copy, copy_calls));
  }
  const double seconds = median(kernel_seconds);
  state.counters["us"] = seconds * 1e6;
  state.counters["GB/s"] = static_cast<double>(bytes) / seconds * 1e-9;
  state.counters["copy_GB/s"] = static_cast<double>(bytes) / median(copy_seconds) * 1e-9;
  state.counters["of_copy"] = median(copy_seconds) / seconds;
}

inline void in_turns(benchmark::internal::Benchmark* benchmark) {
  benchmark->UseManualTime()->Iterations(kTurns);
}

}  // namespace transformer_ext
