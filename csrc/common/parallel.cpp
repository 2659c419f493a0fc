#include "common/parallel.h"

#include <cstdlib>
#include <new>
#include <stdexcept>

namespace transformer_ext {

namespace {

constexpr size_t kAlignment = 64;
constexpr int kSlots = scratch_slot::count;

class Scratch {
 public:
  ~Scratch() {
    for (Block& block : blocks_) release(block);
  }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* get(size_t bytes, int slot) {
    if (slot < 0 || slot >= kSlots) throw std::out_of_range("thread_scratch: slot out of range");
    Block& block = blocks_[slot];
    if (bytes > block.bytes) {
      release(block);
      block.data = ::operator new(bytes, std::align_val_t{kAlignment});
      block.bytes = bytes;
    }
    return block.data;
  }

 private:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };
  static void release(Block& block) {
    ::operator delete(block.data, std::align_val_t{kAlignment});
    block = Block{};
  }
  Block blocks_[kSlots];
};

}  // namespace

int Serial::threads() const { return 1; }

void Serial::for_each(int64_t count, FunctionRef<void(int64_t)> task) {
  for (int64_t i = 0; i < count; ++i) task(i);
}

void* thread_scratch(size_t bytes, int slot) {
  thread_local Scratch scratch;
  return scratch.get(bytes, slot);
}

}  // namespace transformer_ext
