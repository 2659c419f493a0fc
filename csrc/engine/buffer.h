// Memory that only grows, 64-byte aligned, with undefined contents: the decoder's workspaces are
// used again by the next batch, because pages fresh from the system cost more than the arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace transformer_ext {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { release(); }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // At least `size` elements; the contents are lost where that is more than before.
  T* reserve(int64_t size) {
    if (size > size_) {
      release();
      data_ = static_cast<T*>(
          ::operator new(static_cast<size_t>(size) * sizeof(T), std::align_val_t{64}));
      size_ = size;
    }
    return data_;
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }

 private:
  void release() {
    ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    size_ = 0;
  }
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace transformer_ext
