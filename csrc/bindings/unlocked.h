// The interpreter's lock, let go while the engine is at work.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace transformer_ext {

[[noreturn]] inline void sleep_for_ever() {
  for (;;) pause();
}

// The result of a call of the interpreter in which the thread may be ended: before Python 3.14 it
// is, by a forced unwinding, when it asks for the lock and the interpreter has begun to end. That
// would abort the process at the next destructor or catch (...), and release objects without the
// lock. As in 3.14, the thread sleeps until the process is gone. (A C++ exception does not come
// from there.)
template <class Call>
auto python_call(const Call& call) {
  try {
    return call();
  } catch (...) {
    sleep_for_ever();
  }
}

// Holds the lock again after its scope, and meanwhile in the scope of a Locked, on the same thread.
class Unlocked {
 public:
  Unlocked() : last_(finalizing()), state_(PyEval_SaveThread()) {}
  ~Unlocked() { take(); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  friend class Locked;

  static bool finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
  }

  void take() {
    // So that the interpreter is not asked for what it has freed.
    if (!last_ && finalizing()) sleep_for_ever();
    python_call([&] { PyEval_RestoreThread(state_); });
  }
  void give() { state_ = PyEval_SaveThread(); }

  const bool last_;  // whether this is the thread that ends the interpreter: it may have the lock
  PyThreadState* state_;
};

// What calls Python in its scope does so by python_call().
class Locked {
 public:
  explicit Locked(Unlocked& unlocked) : unlocked_(unlocked) { unlocked_.take(); }
  ~Locked() { unlocked_.give(); }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
  Unlocked& unlocked_;
};

}  // namespace transformer_ext
