#include "testing/cuda_emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

// Where one of the two goes on is kept in a Context. swapcontext() would ask the kernel for the
// signal mask each time, which took a third of the tests' time.
#if defined(__x86_64__)
extern "C" void cuda_emulation_switch(void** from, void* to);
asm(R"(
.text
.hidden cuda_emulation_switch
.globl cuda_emulation_switch
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, .-cuda_emulation_switch
)");
#endif

namespace cuda_emulation {
namespace {

#if defined(__x86_64__)
using Context = void*;  // the stack pointer, above six registers and the return address
void switch_context(Context& from, Context& to) { cuda_emulation_switch(&from, to); }
void make_context(Context& context, void* stack, size_t bytes, void (*main)()) {
  void** const top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
  top[-1] = nullptr;  // main() does not return
  top[-2] = reinterpret_cast<void*>(main);
  context = top - 8;
}
#else
using Context = ucontext_t;
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
void make_context(Context& context, void* stack, size_t bytes, void (*main)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, main, 0);
}
#endif

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kUsualShared = 48 * 1024;
constexpr unsigned kWarp = 32;

// While it lives, ThreadSanitizer takes nothing for a kernel's access: shared memory is made by the
// first thread that asks for it.
struct Unseen {
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
  Unseen() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unseen() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
  Unseen() {}
#endif
};

struct Stop {};  // thrown through a kernel whose launch has failed

enum class Wait { none, threads, warp };

struct Fiber {
  Context context{};
  void* stack = nullptr;
  void* sanitizer = nullptr;  // the fake stack (address) or the fiber (thread)
  bool started = false;
  bool finished = true;
  Index index;
  Wait wait = Wait::none;
  unsigned mask = 0;
  const char* what = "";
  void* mine = nullptr;
  Location where;
  char meeting = 0;  // of the warp, in its first lane
  struct Copy : AsyncCopy {
    unsigned group;
  };
  std::deque<Copy> copies;
  unsigned groups = 0;  // ended
};

struct State {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Context scheduler{};
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  Fiber* current = nullptr;
  const std::function<void()>* thread = nullptr;
  Index blocks, threads, block;
  unsigned count = 0;
  std::map<const void*, std::vector<unsigned char>> shared;
  size_t static_bytes = 0;
  std::unique_ptr<unsigned char[]> dynamic;
  std::string error;
  std::string reported;
  unsigned schedule = 0;
  std::map<std::pair<const void*, int>, size_t> allowed;
  int allowed_times = 0;
  int device = 0;
  int next_failure = 0;
  int failure = 0;
  size_t most_shared = 227 * 1024;
  // For ThreadSanitizer: the threads of a block meet at the one of their block, so that blocks have
  // no order among themselves; all come after the start of the launch and before its end.
  std::vector<char> barriers;
  char* barrier = nullptr;
  char start = 0;
  char end = 0;
};

State& state() {
  static State s;
  return s;
}

// ---- Fibers -------------------------------------------------------------------------------------

void to_scheduler() {
  State& s = state();
  Fiber* const self = s.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&self->sanitizer, s.scheduler_stack, s.scheduler_stack_bytes);
#endif
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
  __tsan_switch_to_fiber(s.scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(self->context, s.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->sanitizer, &s.scheduler_stack, &s.scheduler_stack_bytes);
#endif
}

void fiber_main() {
  State& s = state();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &s.scheduler_stack, &s.scheduler_stack_bytes);
#endif
  for (;;) {
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
    __tsan_acquire(&s.start);
#endif
    try {
      (*s.thread)();
      if (!s.current->copies.empty()) fail("has returned before its copies were there");
    } catch (const Stop&) {
    }
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
    __tsan_release(&s.end);
#endif
    s.current->finished = true;
    to_scheduler();
  }
}

void resume(Fiber& fiber) {
  State& s = state();
  if (!fiber.started) {
    fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber.stack == MAP_FAILED) throw std::runtime_error("no memory for the stack of a fiber");
    make_context(fiber.context, fiber.stack, kStackBytes, &fiber_main);
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
    fiber.started = true;
  }
  s.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&s.scheduler_sanitizer, fiber.stack, kStackBytes);
#endif
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
  s.scheduler_sanitizer = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(s.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(s.scheduler_sanitizer, nullptr, nullptr);
#endif
  s.current = nullptr;
}

void wait_for_others() {
  State& s = state();
  Fiber* const self = s.current;
  do {
    to_scheduler();
    if (!s.error.empty()) throw Stop{};
  } while (self->wait != Wait::none);
}

std::string describe(const Fiber& fiber) {
  char text[400];
  const char* const file = fiber.where.file_name();
  const char* const slash = std::strrchr(file, '/');
  if (fiber.finished) {
    std::snprintf(text, sizeof text, "thread %u has returned", fiber.index.x);
  } else {
    std::snprintf(text, sizeof text, "thread %u is at %s of mask %08x (%s:%u)", fiber.index.x,
                  fiber.what, fiber.mask, slash != nullptr ? slash + 1 : file,
                  static_cast<unsigned>(fiber.where.line()));
  }
  return text;
}

void set_error(const std::string& text) {
  State& s = state();
  if (!s.error.empty()) return;
  s.error = "block " + std::to_string(s.block.x) + ": " + text;
}

[[noreturn]] void stop_with(const std::string& text) {
  set_error(text);
  throw Stop{};
}

// ---- Schedules ----------------------------------------------------------------------------------

std::vector<unsigned> order(unsigned count, std::mt19937& random) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  const unsigned schedule = state().schedule;
  if (schedule == 1) std::reverse(numbers.begin(), numbers.end());
  if (schedule > 1) std::shuffle(numbers.begin(), numbers.end(), random);
  return numbers;
}

// No thread can go on: all are at one __syncthreads, or they wait for ever.
void release_threads() {
  State& s = state();
  const Fiber* first = nullptr;
  for (unsigned i = 0; i < s.count; ++i) {
    if (s.fibers[i]->wait == Wait::threads) first = s.fibers[i].get();
  }
  for (unsigned i = 0; i < s.count; ++i) {
    const Fiber& f = *s.fibers[i];
    if (first == nullptr && f.wait == Wait::warp) {
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        if ((f.mask >> lane & 1u) == 0) continue;
        const Fiber& other = *s.fibers[i / kWarp * kWarp + lane];
        if (other.finished || other.wait != Wait::warp || other.mask != f.mask) {
          return set_error("threads wait for ever: " + describe(f) + ", " + describe(other));
        }
      }
      return set_error("threads wait for ever: " + describe(f));
    }
    if (first == nullptr) continue;
    if (f.finished || f.wait != Wait::threads || f.where.line() != first->where.line() ||
        std::strcmp(f.where.file_name(), first->where.file_name()) != 0) {
      return set_error("not all threads come to __syncthreads: " + describe(*first) + ", " +
                       describe(f));
    }
  }
  for (unsigned i = 0; i < s.count; ++i) s.fibers[i]->wait = Wait::none;
}

void run_block(std::mt19937& random) {
  State& s = state();
  {
    const Unseen unseen;
    s.shared.clear();
  }
  s.static_bytes = 0;
  for (unsigned i = 0; i < s.count; ++i) {
    Fiber& f = *s.fibers[i];
    f.index = {i % s.threads.x, i / s.threads.x % s.threads.y, i / s.threads.x / s.threads.y};
    f.finished = false;
    f.wait = Wait::none;
    f.copies.clear();
    f.groups = 0;
  }
  for (;;) {
    bool left = false;
    bool moved = false;
    for (unsigned i : order(s.count, random)) {
      Fiber& f = *s.fibers[i];
      if (f.finished) continue;
      // After an error each is woken once more, to unwind its stack.
      if (f.wait == Wait::none || !s.error.empty()) {
        resume(f);
        moved = true;
      }
      left = left || !f.finished;
    }
    if (!left) return;
    if (!moved) release_threads();
  }
}

}  // namespace

void set_schedule(unsigned schedule) { state().schedule = schedule; }
void set_device(int device) { state().device = device; }
int device() { return state().device; }
bool allow_shared(const void* kernel, size_t bytes) {
  State& s = state();
  ++s.allowed_times;
  if (bytes > s.most_shared) return false;
  s.allowed[{kernel, s.device}] = bytes;
  return true;
}
int allowed_times() { return state().allowed_times; }
void fail_next(int error) { state().next_failure = error; }
int take_failure() { return std::exchange(state().next_failure, 0); }
int failed_launch() { return std::exchange(state().failure, 0); }
void set_most_shared(size_t bytes) { state().most_shared = bytes; }
size_t most_shared() { return state().most_shared; }
Index thread_index() { return state().current->index; }
Index block_index() { return state().block; }
Index block_size() { return state().threads; }
Index grid_size() { return state().blocks; }

void launch(const void* kernel, const std::function<void()>& thread, Index blocks, Index threads,
            size_t shared_bytes) {
  State& s = state();
  s.failure = take_failure();
  if (s.failure != 0) return;
  s.blocks = blocks;
  s.threads = threads;
  s.thread = &thread;
  s.count = threads.x * threads.y * threads.z;
  const size_t grid = static_cast<size_t>(blocks.x) * blocks.y * blocks.z;
  if (s.count == 0 || s.count > 1024 || threads.z > 64 || grid == 0 || blocks.x > INT32_MAX ||
      blocks.y > 65535 || blocks.z > 65535) {
    s.error = "invalid configuration argument";
    return;
  }
  const auto allowed = s.allowed.find({kernel, s.device});
  const size_t most = allowed == s.allowed.end() ? kUsualShared : allowed->second;
  if (shared_bytes > std::min(most, s.most_shared)) {
    s.error = "more dynamic shared memory than is allowed";
    return;
  }
  while (s.fibers.size() < s.count) s.fibers.push_back(std::make_unique<Fiber>());
  std::mt19937 random(s.schedule);
  s.barriers.assign(grid, 0);
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
  __tsan_release(&s.start);
#endif
  for (unsigned block : order(static_cast<unsigned>(grid), random)) {
    s.block = {block % blocks.x, block / blocks.x % blocks.y, block / blocks.x / blocks.y};
    {
      const Unseen unseen;
      s.dynamic.reset(new unsigned char[shared_bytes]);
      std::memset(s.dynamic.get(), 0xff, shared_bytes);
    }
    s.barrier = &s.barriers[block];
    run_block(random);
    if (!s.error.empty()) break;
  }
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
  __tsan_acquire(&s.end);
#endif
}

const char* last_error() {
  State& s = state();
  if (s.error.empty()) return nullptr;
  s.reported = s.error;
  s.error.clear();
  return s.reported.c_str();
}

void* shared(const void* key, size_t bytes) {
  const Unseen unseen;
  State& s = state();
  std::vector<unsigned char>& memory = s.shared[key];
  if (memory.empty()) {
    memory.assign(bytes, 0xff);
    s.static_bytes += bytes;
    if (s.static_bytes > kUsualShared) stop_with("more than 48 KiB of static shared memory");
  }
  return memory.data();
}

void* dynamic_shared() { return state().dynamic.get(); }

void note_copy(AsyncCopy copy) {
  Fiber& self = *state().current;
  self.copies.push_back({copy, self.groups});
}
void end_copy_group() { ++state().current->groups; }
bool next_copy(unsigned pending, AsyncCopy& copy) {
  Fiber& self = *state().current;
  if (self.copies.empty() || self.copies.front().group + pending >= self.groups) return false;
  copy = self.copies.front();
  self.copies.pop_front();
  return true;
}

void fail(const char* text) {
  const State& s = state();
  stop_with("thread " + std::to_string(s.current->index.x) + ": " + text);
}

void sync_threads(Location where) {
  Fiber& self = *state().current;
  self.wait = Wait::threads;
  self.what = "__syncthreads";
  self.mask = ~0u;
  self.where = where;
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
  char* const barrier = state().barrier;
  __tsan_release(barrier);
#endif
  wait_for_others();
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
  __tsan_acquire(barrier);
#endif
}

void warp_together(unsigned mask, const char* what, void* mine, Together all, Location where) {
  State& s = state();
  Fiber& self = *s.current;
  const Index index = self.index;
  const unsigned number = index.x + s.threads.x * (index.y + s.threads.y * index.z);
  const unsigned first = number / kWarp * kWarp;
  self.what = what;
  self.mask = mask;
  self.mine = mine;
  self.where = where;
  self.wait = Wait::warp;
  if ((mask >> (number % kWarp) & 1u) == 0) stop_with(describe(self) + ", which leaves it out");
  void* lanes[kWarp] = {};
  bool complete = true;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (first + lane >= s.count) {
      if (mask >> lane & 1u) stop_with(describe(self) + ", but its warp has fewer lanes");
      continue;
    }
    const Fiber& other = *s.fibers[first + lane];
    const bool wanted = mask >> lane & 1u;
    if (wanted && other.finished) stop_with(describe(self) + ", but " + describe(other));
    if (other.finished || other.wait != Wait::warp) {
      complete = complete && !wanted;
      continue;
    }
    if ((other.mask & mask) != 0 &&
        (other.mask != mask || (other.what != what && std::strcmp(other.what, what) != 0))) {
      stop_with(describe(self) + ", but " + describe(other));
    }
    if (wanted) lanes[lane] = other.mine;
  }
  // Only __syncwarp orders memory. The lanes' order for ThreadSanitizer: all before, then all
  // after.
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
  const bool orders = all == nullptr;
  char* const meeting = &s.fibers[first]->meeting;
  if (orders) __tsan_release(meeting);
#endif
  if (complete) {
    if (all != nullptr) all(lanes, mask);
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1u) s.fibers[first + lane]->wait = Wait::none;
    }
  } else {
    wait_for_others();
  }
#if defined(TRANSFORMER_EXT_THREAD_SANITIZER)
  if (orders) __tsan_acquire(meeting);
#endif
}

}  // namespace cuda_emulation
