// Our own threads, for the decoding engine and for the C++ benchmarks and tests. (The ops run on
// torch's threads instead, see torch_op.h, so that no second set of threads fights over the cores.)
#pragma once

#include <atomic>
#include <cstdint>

#include "common/parallel.h"

namespace transformer_ext {

// min(physical cores, the cores that this process may run on, the cgroup's CPU quota), at least 1.
int default_thread_count();

// Threads are started by the first for_each that can use them. After fork() the child starts its
// own. Any number of threads may call for_each at once: the work of the one that comes first is
// shared out; another's runs on its own thread alone meanwhile, and so does a for_each called from
// within a task. The results are the same, because kernels never cut their work by thread count.
class ThreadPool final : public Parallel {
 public:
  explicit ThreadPool(int threads = default_thread_count());
  ~ThreadPool() override;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const override { return threads_; }
  void for_each(int64_t count, FunctionRef<void(int64_t)> task) override;

 private:
  struct Crew;

  const int threads_;
  std::atomic<bool> busy_{false};
  Crew* crew_ = nullptr;  // owned; touched only while busy_ is held
};

}  // namespace transformer_ext
