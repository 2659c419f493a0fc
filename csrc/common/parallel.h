// How a kernel asks for threads, without knowing whose they are.
//
// A kernel cuts its work by the problem alone (never by the number of threads) into numbered tasks
// and gives each task its own output, or its own partial sum that one later task adds up in
// ascending order. So the result is the same bit for bit for any thread count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace transformer_ext {

// A reference to a callable: two words, no allocation. The callable must outlive the call.
template <class Signature>
class FunctionRef;

template <class R, class... Args>
class FunctionRef<R(Args...)> {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, FunctionRef>>>
  FunctionRef(F&& f)  // NOLINT(google-explicit-constructor): a lambda is passed where it stands
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(std::forward<Args>(args)...);
        }) {}
  R operator()(Args... args) const { return call_(object_, std::forward<Args>(args)...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

class Parallel {
 public:
  virtual ~Parallel() = default;
  virtual int threads() const = 0;
  // Calls task(i) exactly once for each i in [0, count), on any thread in any order, and returns
  // when all are done. An exception thrown by a task is rethrown here.
  virtual void for_each(int64_t count, FunctionRef<void(int64_t)> task) = 0;
};

// All on the calling thread. Defined in parallel.cpp: a definition here would be compiled into
// every kernel file, once per instruction set, and the linker would keep any one of them.
class Serial final : public Parallel {
 public:
  int threads() const override;
  void for_each(int64_t count, FunctionRef<void(int64_t)> task) override;
};

// Slots of thread_scratch. Kernels that call no other kernel share those of their own; whoever
// holds scratch memory while a kernel runs has one by itself.
namespace scratch_slot {
enum : int {
  kernel = 0,  // to kernel + 3
  embedding_places = 4,
  cached_attention = 5,
  vocabulary_scores = 6,
  count = 7,
};
}  // namespace scratch_slot

// Scratch memory of the calling thread, 64-byte aligned, grown on demand and kept until the thread
// ends. Valid until the thread's next call with the same slot; the contents are undefined.
void* thread_scratch(size_t bytes, int slot = scratch_slot::kernel);

}  // namespace transformer_ext
