#include "gemm/gemm.h"

#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace transformer_ext {

namespace {

int64_t inputs_per_word(GemmType type) { return type == GemmType::float32 ? 1 : 2; }

}  // namespace

PackedView PackedView::columns(int64_t begin, int64_t count) const {
  return {static_cast<const char*>(data) + gemm_packed_bytes(begin, k, type), count, k, type};
}

int64_t gemm_panel_columns() { return gemm_kernels().panel_columns; }

bool gemm_has(GemmType type) { return gemm_kernels().gemm[static_cast<int>(type)] != nullptr; }

size_t gemm_packed_bytes(int64_t n, int64_t k, GemmType type) {
  const int64_t columns = gemm_panel_columns(), word = inputs_per_word(type);
  return static_cast<size_t>((n + columns - 1) / columns * columns * ((k + word - 1) / word)) * 4;
}

void gemm_pack(const float* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride,
               GemmType type, void* out, Parallel& parallel) {
  gemm_kernels().pack[static_cast<int>(type)](w, n, k, n_stride, k_stride, out, parallel);
}

void gemm(const GemmArguments& arguments, Parallel& parallel) {
  gemm_kernels().gemm[static_cast<int>(arguments.weight.type)](arguments, parallel);
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

size_t PackedMatrix::bytes() const { return gemm_packed_bytes(view_.n, view_.k, view_.type); }

void PackedMatrix::pack(const float* w, int64_t n, int64_t k, int64_t ldw, Parallel& parallel,
                        GemmType type) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t size = gemm_packed_bytes(n, k, type);
  const size_t alignment = size >= kHugePage ? kHugePage : 64;
  const size_t rounded = (size + alignment - 1) / alignment * alignment;
  void* const memory = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  // Best effort: without huge pages, the walk over the weights misses the TLB.
  if (alignment == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  gemm_pack(w, n, k, ldw, 1, type, memory, parallel);
  release();
  memory_ = memory;
  view_ = PackedView{memory_, n, k, type};
}

}  // namespace transformer_ext
