#include "common/thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <fstream>
#include <mutex>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "common/task_ranges.h"

namespace transformer_ext {

namespace {

// ---- How many threads -----------------------------------------------------------------------

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  // 1024 is only what cpu_set_t holds; a machine with more is asked again with a larger set.
  for (int size = 1024; size <= (1 << 20); size *= 4) {
    cpu_set_t* set = CPU_ALLOC(size);
    const size_t bytes = CPU_ALLOC_SIZE(size);
    const bool ok = sched_getaffinity(0, bytes, set) == 0;
    for (int cpu = 0; ok && cpu < size; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
    }
    CPU_FREE(set);
    if (ok) break;
  }
#endif
  return cpus;
}

int physical_cores(const std::vector<int>& cpus) {
  std::set<std::string> cores;
  for (const int cpu : cpus) {
    const std::string siblings = first_line("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                                            "/topology/thread_siblings_list");
    cores.insert(siblings.empty() ? "cpu" + std::to_string(cpu) : siblings);
  }
  return static_cast<int>(cores.size());
}

// "max 100000" or "150000 100000": quota and period in microseconds.
std::optional<double> parse_cpu_max(const std::string& line) {
  std::istringstream stream(line);
  double quota = 0;
  double period = 0;
  if (stream >> quota >> period && quota > 0 && period > 0) return quota / period;
  return std::nullopt;
}

// The smallest quota of this process's cgroup and all above it (version 2, then version 1).
std::optional<double> cgroup_cpus() {
  std::optional<double> least;
  const auto consider = [&](std::optional<double> cpus) {
    if (cpus && (!least || *cpus < *least)) least = cpus;
  };
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool version2 = controllers.empty();
    if (!version2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    // In a container the path may name a folder that is mounted away; its root is looked at too.
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      if (path == "/") path.clear();
      if (version2) {
        consider(parse_cpu_max(first_line("/sys/fs/cgroup" + path + "/cpu.max")));
      } else {
        const std::string folder = "/sys/fs/cgroup/cpu" + path;
        consider(parse_cpu_max(first_line(folder + "/cpu.cfs_quota_us") + " " +
                               first_line(folder + "/cpu.cfs_period_us")));
      }
      if (path.empty() || path.rfind('/') == std::string::npos) break;
    }
  }
  return least;
}

// ---- Waiting --------------------------------------------------------------------------------

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Between two parallel regions of one decoding step lie a few microseconds, less than putting a
// thread to sleep and waking it costs: so a waiter first spins. Not for long: where a neighbour
// wants the core, a spinning thread keeps it from the very thread that is being waited for.
constexpr auto kSpin = std::chrono::microseconds(20);

template <class Condition>
bool spin_until(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return condition();
}

}  // namespace

int default_thread_count() {
  const std::vector<int> cpus = allowed_cpus();
  int count =
      cpus.empty() ? static_cast<int>(std::thread::hardware_concurrency()) : physical_cores(cpus);
  if (const std::optional<double> quota = cgroup_cpus()) {
    count = std::min(count, static_cast<int>(std::lround(*quota)));
  }
  return std::max(count, 1);
}

// The threads besides the caller's, and the one job that they may be at work on.
struct ThreadPool::Crew {
  // `gate` holds how many workers are inside the job, and whether it is open to more. A worker that
  // wakes late finds it closed and goes back to sleep: the caller never waits for a thread that
  // has taken no task, as it would at a barrier.
  static constexpr uint32_t kOpen = 1u << 31;

  explicit Crew(int workers) : pid(getpid()) {
    threads.reserve(static_cast<size_t>(workers));
    try {
      for (int i = 1; i <= workers; ++i) threads.emplace_back([this, i] { work(i); });
    } catch (const std::system_error&) {
      // The system gives no more: those that there are do the work.
    }
  }

  ~Crew() {
    stop.store(true);
    signal.fetch_add(1);
    signal.notify_all();
    for (std::thread& thread : threads) thread.join();
  }

  void run_tasks(int64_t worker) {
    for (int64_t i; (i = ranges->next(worker)) >= 0;) {
      try {
        (*task)(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        ranges->stop();
      }
    }
  }

  void work(int64_t worker) {
    uint32_t seen = 0;
    for (;;) {
      if (!spin_until([&] { return signal.load(std::memory_order_acquire) != seen; })) {
        sleeping.fetch_add(1);
        signal.wait(seen);
        sleeping.fetch_sub(1);
      }
      seen = signal.load(std::memory_order_acquire);
      if (stop.load()) return;
      uint32_t inside = gate.load(std::memory_order_relaxed);
      while ((inside & kOpen) != 0 &&
             !gate.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire)) {
      }
      if ((inside & kOpen) == 0) continue;
      run_tasks(worker);
      if (gate.fetch_sub(1, std::memory_order_acq_rel) == 1) gate.notify_one();
    }
  }

  void run(int64_t n, FunctionRef<void(int64_t)>& f) {
    TaskRanges all(n, static_cast<int64_t>(threads.size()) + 1);
    ranges = &all;
    task = &f;
    error = nullptr;
    gate.store(kOpen, std::memory_order_release);
    signal.fetch_add(1);
    if (sleeping.load() > 0) signal.notify_all();
    run_tasks(0);
    gate.fetch_and(~kOpen, std::memory_order_acq_rel);
    const auto all_left = [&] { return gate.load(std::memory_order_acquire) == 0; };
    if (!spin_until(all_left)) {
      for (uint32_t inside; (inside = gate.load(std::memory_order_acquire)) != 0;) {
        gate.wait(inside);
      }
    }
    if (error) std::rethrow_exception(error);
  }

  const pid_t pid;
  FunctionRef<void(int64_t)>* task = nullptr;
  TaskRanges* ranges = nullptr;
  std::exception_ptr error;
  std::mutex error_mutex;
  std::atomic<bool> stop{false};
  std::atomic<uint32_t> sleeping{0};
  // Each on a cache line of its own.
  alignas(64) std::atomic<uint32_t> gate{0};
  alignas(64) std::atomic<uint32_t> signal{0};
  std::vector<std::thread> threads;
};

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  if (threads < 1) {
    throw std::invalid_argument("threads: got " + std::to_string(threads) +
                                ", expected at least 1");
  }
}

ThreadPool::~ThreadPool() {
  // The threads of a parent process do not exist here and cannot be joined: let them be.
  if (crew_ != nullptr && crew_->pid == getpid()) delete crew_;
}

void ThreadPool::for_each(int64_t count, FunctionRef<void(int64_t)> task) {
  if (threads_ == 1 || count <= 1 || busy_.exchange(true, std::memory_order_acquire)) {
    Serial().for_each(count, task);
    return;
  }
  struct Release {
    std::atomic<bool>& busy;
    ~Release() { busy.store(false, std::memory_order_release); }
  } release{busy_};
  // A forked child has only the thread that forked: what it inherited is left alone (its locks may
  // be held by threads that are gone) and replaced.
  if (crew_ == nullptr || crew_->pid != getpid()) crew_ = new Crew(threads_ - 1);
  crew_->run(count, task);
}

}  // namespace transformer_ext
