// float32 matrix product with prepacked weights: y[m, n] = activation(y0 + x[m, k] W[n, k]^T +
// bias).
//
// Every output is a sum over slices of k, each a chain of fused multiply-adds in ascending k on one
// vector lane. Nothing in that order depends on the number of rows, on the row's position, on the
// threads or on the blocking, so a row's result is the same bit for bit alone and in any batch. (It
// does depend on the instruction set: without FMA every product is rounded.)
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"
#include "common/parallel.h"

namespace transformer_ext {

enum class GemmActivation : int { none = 0, relu = 1 };

struct Epilogue {
  GemmActivation activation = GemmActivation::none;
  bool accumulate = false;  // y0 = y instead of 0
};

// Weights in the order in which the kernel of the active instruction set reads them: panels of
// `gemm_panel_columns()` output columns, each [k][columns], the last one padded with zeros. Packed
// data is private to the process that packed it: never store it in a file.
struct PackedView {
  const float* data = nullptr;  // 64-byte aligned
  int64_t n = 0;                // output columns
  int64_t k = 0;                // inputs
};

int64_t gemm_panel_columns();
int64_t gemm_packed_size(int64_t n, int64_t k);  // in floats

// out[gemm_packed_size(n, k)] from the weight at w[column * n_stride + input * k_stride]: strides
// (ld, 1) for a weight [n, k], (1, ld) for one stored as [k, n].
void gemm_pack(const float* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride, float* out,
               Parallel& parallel);

// Owns packed weights, on huge pages where the system grants them.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  ~PackedMatrix();
  PackedMatrix(PackedMatrix&& other) noexcept;
  PackedMatrix& operator=(PackedMatrix&& other) noexcept;
  PackedMatrix(const PackedMatrix&) = delete;
  PackedMatrix& operator=(const PackedMatrix&) = delete;

  // From w[n, k] with rows ldw >= k floats apart. Throws std::bad_alloc.
  void pack(const float* w, int64_t n, int64_t k, int64_t ldw, Parallel& parallel);

  int64_t n() const { return view_.n; }
  int64_t k() const { return view_.k; }
  size_t bytes() const;
  operator PackedView() const { return view_; }  // NOLINT(google-explicit-constructor)

 private:
  void release();
  PackedView view_;
  float* memory_ = nullptr;
};

struct GemmArguments {
  const float* x;  // x[row * x_row_stride + input * x_k_stride]
  int64_t m;       // rows
  int64_t x_row_stride;
  int64_t x_k_stride;  // 1, or the leading dimension of a transposed x
  // Where weight.data is null: weights that are used once (in a gradient), read as they lie,
  // rows[input * rows_stride + column].
  PackedView weight;
  const float* rows;
  int64_t rows_stride;
  const float* bias;  // [n] or null
  float* y;           // y[row * ldy + column], columns side by side; no overlap with the others
  int64_t ldy;
  Epilogue epilogue;
};

void gemm(const GemmArguments& arguments, Parallel& parallel);

// Rows of x side by side: x[m, k] with leading dimension ldx, y[m, n] with ldy. m may be 0.
inline void gemm(const float* x, int64_t m, int64_t ldx, const PackedView& weight,
                 const float* bias, float* y, int64_t ldy, Epilogue epilogue, Parallel& parallel) {
  gemm(GemmArguments{x, m, ldx, 1, weight, nullptr, 0, bias, y, ldy, epilogue}, parallel);
}

// y[m, n] = a[m, k] b[k, n]; a with any strides, the rows of b and y side by side.
inline void gemm_matmul(const float* a, int64_t m, int64_t a_row_stride, int64_t a_k_stride,
                        const float* b, int64_t n, int64_t k, int64_t ldb, float* y, int64_t ldy,
                        Epilogue epilogue, Parallel& parallel) {
  gemm(GemmArguments{a, m, a_row_stride, a_k_stride, PackedView{nullptr, n, k}, b, ldb, nullptr, y,
                     ldy, epilogue},
       parallel);
}

struct GemmKernels {
  int64_t panel_columns;
  void (*pack)(const float* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride, float* out,
               Parallel& parallel);
  void (*gemm)(const GemmArguments& arguments, Parallel& parallel);
};

TRANSFORMER_EXT_KERNELS(GemmKernels, gemm_kernels)

}  // namespace transformer_ext
