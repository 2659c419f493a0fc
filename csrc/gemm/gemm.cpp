#include "gemm/gemm.h"

#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace transformer_ext {

int64_t gemm_panel_columns() { return gemm_kernels().panel_columns; }

int64_t gemm_packed_size(int64_t n, int64_t k) {
  const int64_t columns = gemm_panel_columns();
  return (n + columns - 1) / columns * columns * k;
}

void gemm_pack(const float* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride, float* out,
               Parallel& parallel) {
  gemm_kernels().pack(w, n, k, n_stride, k_stride, out, parallel);
}

void gemm(const GemmArguments& arguments, Parallel& parallel) {
  gemm_kernels().gemm(arguments, parallel);
}

PackedMatrix::~PackedMatrix() { release(); }

PackedMatrix::PackedMatrix(PackedMatrix&& other) noexcept
    : view_(std::exchange(other.view_, PackedView())),
      memory_(std::exchange(other.memory_, nullptr)) {}

PackedMatrix& PackedMatrix::operator=(PackedMatrix&& other) noexcept {
  if (this != &other) {
    release();
    view_ = std::exchange(other.view_, PackedView());
    memory_ = std::exchange(other.memory_, nullptr);
  }
  return *this;
}

void PackedMatrix::release() {
  std::free(memory_);
  memory_ = nullptr;
  view_ = PackedView();
}

size_t PackedMatrix::bytes() const {
  return static_cast<size_t>(gemm_packed_size(view_.n, view_.k)) * sizeof(float);
}

void PackedMatrix::pack(const float* w, int64_t n, int64_t k, int64_t ldw, Parallel& parallel) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t size = static_cast<size_t>(gemm_packed_size(n, k)) * sizeof(float);
  const size_t alignment = size >= kHugePage ? kHugePage : 64;
  const size_t rounded = (size + alignment - 1) / alignment * alignment;
  void* const memory = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  // Best effort: without huge pages, the walk over the weights misses the TLB.
  if (alignment == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  gemm_pack(w, n, k, ldw, 1, static_cast<float*>(memory), parallel);
  release();
  memory_ = static_cast<float*>(memory);
  view_ = PackedView{memory_, n, k};
}

}  // namespace transformer_ext
