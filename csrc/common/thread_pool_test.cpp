#include "common/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

namespace transformer_ext {
namespace {

// Runs `count` tasks and tells how often each was called.
std::vector<int> calls(Parallel& parallel, int64_t count) {
  std::vector<std::atomic<int>> hits(static_cast<size_t>(count));
  parallel.for_each(count, [&](int64_t i) { hits[static_cast<size_t>(i)].fetch_add(1); });
  return {hits.begin(), hits.end()};
}

TEST(ThreadPool, CallsEachTaskOnce) {
  for (const int threads : {1, 2, 4, 9}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (const int64_t count : {0, 1, 2, 3, 17, 1000}) {
      EXPECT_EQ(calls(pool, count), std::vector<int>(static_cast<size_t>(count), 1));
    }
  }
}

// Short jobs one after the other, with pauses long enough for the threads to fall asleep.
TEST(ThreadPool, ManyJobs) {
  ThreadPool pool(4);
  int64_t total = 0;
  for (int job = 0; job < 2000; ++job) {
    if (job % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::vector<int64_t> results(static_cast<size_t>(job % 7), 0);
    pool.for_each(job % 7, [&](int64_t i) { results[static_cast<size_t>(i)] = i + job; });
    total += std::accumulate(results.begin(), results.end(), int64_t{0});
  }
  int64_t expected = 0;
  for (int job = 0; job < 2000; ++job) {
    for (int i = 0; i < job % 7; ++i) expected += i + job;
  }
  EXPECT_EQ(total, expected);
}

TEST(ThreadPool, NestedAndSharedCallsFinish) {
  ThreadPool pool(3);
  std::atomic<int> done{0};
  const auto use = [&] {
    for (int job = 0; job < 50; ++job) {
      pool.for_each(4, [&](int64_t) { pool.for_each(5, [&](int64_t) { done.fetch_add(1); }); });
    }
  };
  std::thread a(use);
  std::thread b(use);
  use();
  a.join();
  b.join();
  EXPECT_EQ(done.load(), 3 * 50 * 4 * 5);
}

TEST(ThreadPool, AnExceptionComesOutAndThePoolStaysUsable) {
  ThreadPool pool(2);
  for (int i = 0; i < 20; ++i) {
    EXPECT_THROW(pool.for_each(100,
                               [](int64_t task) {
                                 if (task == 50) throw std::runtime_error("task 50");
                               }),
                 std::runtime_error);
    EXPECT_EQ(calls(pool, 10), std::vector<int>(10, 1));
  }
}

TEST(ThreadPool, AForkedChildStartsItsOwnThreads) {
  ThreadPool pool(3);
  EXPECT_EQ(calls(pool, 10), std::vector<int>(10, 1));
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(calls(pool, 100) == std::vector<int>(100, 1) ? 0 : 1);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(calls(pool, 10), std::vector<int>(10, 1));
}

TEST(ThreadPool, RefusesNoThreads) {
  EXPECT_THROW(ThreadPool(0), std::invalid_argument);
  EXPECT_GE(default_thread_count(), 1);
}

TEST(ThreadScratch, IsAlignedGrowsAndBelongsToItsThread) {
  auto* small = static_cast<char*>(thread_scratch(100));
  auto* other_slot = static_cast<char*>(thread_scratch(100, 1));
  EXPECT_NE(small, other_slot);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(small) % 64, 0u);
  auto* large = static_cast<char*>(thread_scratch(1 << 20));
  large[(1 << 20) - 1] = 1;
  EXPECT_EQ(thread_scratch(10), large);
  void* of_another_thread = nullptr;
  std::thread([&] { of_another_thread = thread_scratch(1 << 20); }).join();
  EXPECT_NE(of_another_thread, nullptr);
  EXPECT_THROW(thread_scratch(1, 99), std::out_of_range);
}

}  // namespace
}  // namespace transformer_ext
