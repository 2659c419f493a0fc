#include "gemm/gemm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace transformer_ext {

namespace {

int64_t inputs_per_word(GemmType type) {
  return type == GemmType::float32 ? 1 : type == GemmType::bfloat16 ? 2 : 4;
}

const GemmTypeKernels& kernels_of(GemmType type) {
  switch (type) {
    case GemmType::float32:
      break;
    case GemmType::bfloat16:
      return gemm_kernels().bfloat16;
    case GemmType::int8:
      return gemm_int8_kernels().int8;
  }
  return gemm_kernels().float32;
}

// Without the scales.
size_t panel_bytes(int64_t n, int64_t k, GemmType type) {
  const int64_t columns = gemm_panel_columns(), word = inputs_per_word(type);
  return static_cast<size_t>((n + columns - 1) / columns * columns * ((k + word - 1) / word)) * 4;
}

}  // namespace

PackedView PackedView::columns(int64_t begin, int64_t count) const {
  return {static_cast<const char*>(data) + panel_bytes(begin, k, type), count, k, type,
          scales == nullptr ? nullptr : scales + begin};
}

int64_t gemm_panel_columns() { return gemm_kernels().panel_columns; }

bool gemm_has(GemmType type) { return kernels_of(type).gemm != nullptr; }

bool gemm_prefers_int8() { return gemm_int8_kernels().preferred; }

const char* gemm_int8_instruction() { return gemm_int8_kernels().instruction; }

size_t gemm_packed_bytes(int64_t n, int64_t k, GemmType type) {
  const int64_t columns = gemm_panel_columns();
  return panel_bytes(n, k, type) +
         (type == GemmType::int8
              ? static_cast<size_t>((n + columns - 1) / columns * columns) * sizeof(float)
              : 0);
}

GemmInput GemmInput::rows_from(int64_t first) const {
  GemmInput rows = *this;
  rows.data = static_cast<const char*>(data) + first * row_stride * (4 / inputs_per_word(type));
  if (row_scales != nullptr) rows.row_scales += first;
  return rows;
}

void gemm_unpack(const PackedView& weight, int64_t column, float* out) {
  const int64_t columns = gemm_panel_columns();
  const char* const first = static_cast<const char*>(weight.data) +
                            panel_bytes(column / columns * columns, weight.k, weight.type) +
                            column % columns * 4;
  const auto unpack = [&](auto element) {
    constexpr int64_t kSize = sizeof element, kWord = 4 / kSize;
    for (int64_t i = 0; i < weight.k; ++i) {
      std::memcpy(&element, first + i / kWord * columns * 4 + i % kWord * kSize, sizeof element);
      if constexpr (kSize == 4) {
        out[i] = element;
      } else if constexpr (kSize == 2) {
        out[i] = to_float(element);
      } else {
        out[i] = static_cast<float>(element - 128) * weight.scales[column];
      }
    }
  };
  switch (weight.type) {
    case GemmType::float32:
      return unpack(float{});
    case GemmType::bfloat16:
      return unpack(bfloat16{});
    case GemmType::int8:
      return unpack(uint8_t{});
  }
}

size_t gemm_converted_bytes(int64_t m, int64_t k, GemmType type) {
  switch (type) {
    case GemmType::float32:
      break;
    case GemmType::bfloat16:
      return static_cast<size_t>(m * ((k + 1) / 2)) * 4;
    case GemmType::int8:
      return static_cast<size_t>(m) * (static_cast<size_t>((k + 3) / 4) * 4 + sizeof(GemmRowScale));
  }
  return 0;
}

GemmInput gemm_convert(const float* x, int64_t m, int64_t k, int64_t ldx, GemmType type, void* out,
                       Parallel& parallel) {
  if (type == GemmType::float32) return {x, type, ldx, 1};
  return kernels_of(type).convert(x, m, k, ldx, out, parallel);
}

void gemm_pack(const float* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride,
               GemmType type, void* out, Parallel& parallel) {
  kernels_of(type).pack(w, n, k, n_stride, k_stride, out, parallel);
}

void gemm(const GemmArguments& arguments, Parallel& parallel) {
  kernels_of(arguments.weight.type).gemm(arguments, parallel);
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
  if (type == GemmType::int8 && k > kGemmMostIntegers) {
    throw std::invalid_argument("int8: got " + std::to_string(k) + " inputs, expected at most " +
                                std::to_string(kGemmMostIntegers));
  }
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
  if (type == GemmType::int8) {
    view_.scales =
        reinterpret_cast<const float*>(static_cast<const char*>(memory_) + panel_bytes(n, k, type));
  }
}

}  // namespace transformer_ext
