// Matrix product with prepacked weights: y[m, n] = activation(y0 + x[m, k] W[n, k]^T + bias), on
// float32 or bfloat16 factors, summed in float32, or on 8-bit integers, summed exactly.
//
// Every output is a sum over slices of k, each a chain of fused multiply-adds in ascending k on one
// vector lane (bfloat16: of dot products of pairs, whose subnormal factors and sums count as 0).
// Nothing in that order depends on the number of rows, on the row's position, on the threads or on
// the blocking, so a row's result is the same bit for bit alone and in any batch. (It does depend
// on the instruction set: without FMA every product is rounded.)
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/bfloat16.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace transformer_ext {

// bfloat16 factors need the dot-product instruction: only where gemm_has(GemmType::bfloat16).
//
// int8: a row of x, and each output column's weights, are rounded to integers from -127 to 127
// times a scale of their own, the greatest magnitude among them being 127 (symmetric quantisation,
// that of x done as it comes). The sums are exact, so machines with and without VNNI give the same
// result. A row of x with a NaN or an infinity gives NaN. Weights must be packed; k at most
// kGemmMostIntegers.
enum class GemmType : int { float32 = 0, bfloat16 = 1, int8 = 2 };
// 255 * 127 * k must fit into 31 bits.
constexpr int64_t kGemmMostIntegers = 65536;

enum class GemmActivation : int { none = 0, relu = 1 };

struct Epilogue {
  GemmActivation activation = GemmActivation::none;
  bool accumulate = false;  // y0 = y instead of 0; only where y is float32
};

// Weights in the order in which the kernel of the active instruction set reads them: panels of
// `gemm_panel_columns()` output columns, the last one padded with zeros; each holds, for every word
// of inputs (one float32, two bfloat16, four integers), the columns side by side. Packed data is
// private to the process that packed it: never store it in a file.
struct PackedView {
  const void* data = nullptr;  // 64-byte aligned
  int64_t n = 0;               // output columns
  int64_t k = 0;               // inputs
  GemmType type = GemmType::float32;
  const float* scales = nullptr;  // int8: of each column

  // `count` columns from `begin` on, a multiple of gemm_panel_columns().
  PackedView columns(int64_t begin, int64_t count) const;
};

int64_t gemm_panel_columns();
bool gemm_has(GemmType type);
// Whether int8 is the fastest type of this machine, and the instruction that multiplies it here.
bool gemm_prefers_int8();
const char* gemm_int8_instruction();
size_t gemm_packed_bytes(int64_t n, int64_t k, GemmType type);

// To out[gemm_packed_bytes(n, k, type)] from the weight at w[column * n_stride + input * k_stride]:
// strides (ld, 1) for a weight [n, k], (1, ld) for one stored as [k, n].
void gemm_pack(const float* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride,
               GemmType type, void* out, Parallel& parallel);

// The packed weights of one output column, k of them, as float32: what the product multiplies with.
void gemm_unpack(const PackedView& weight, int64_t column, float* out);

// Owns packed weights, on huge pages where the system grants them.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  ~PackedMatrix();
  PackedMatrix(PackedMatrix&& other) noexcept;
  PackedMatrix& operator=(PackedMatrix&& other) noexcept;
  PackedMatrix(const PackedMatrix&) = delete;
  PackedMatrix& operator=(const PackedMatrix&) = delete;

  // From w[n, k] with rows ldw >= k floats apart. Throws std::bad_alloc, and std::invalid_argument
  // for k > kGemmMostIntegers in int8.
  void pack(const float* w, int64_t n, int64_t k, int64_t ldw, Parallel& parallel,
            GemmType type = GemmType::float32);

  int64_t n() const { return view_.n; }
  int64_t k() const { return view_.k; }
  size_t bytes() const;
  operator PackedView() const { return view_; }  // NOLINT(google-explicit-constructor)

 private:
  void release();
  PackedView view_;
  void* memory_ = nullptr;
};

// Of a row of integers: x = integer * scale. `offset` is -128 times the sum of the integers.
struct GemmRowScale {
  float scale;
  int32_t offset;
};

// A matrix of the caller's: element (row, input) or (input, column) at
// data[row * row_stride + input * k_stride].
struct GemmInput {
  const void* data;
  GemmType type;
  int64_t row_stride;
  int64_t k_stride;
  const GemmRowScale* row_scales = nullptr;  // int8

  GemmInput rows_from(int64_t first) const;
};

// Rows of float32, side by side, as gemm() takes them for weights of the type, for several products
// of the same rows: into `out`, of gemm_converted_bytes(), 64-byte aligned. float32: as they are.
size_t gemm_converted_bytes(int64_t m, int64_t k, GemmType type);
GemmInput gemm_convert(const float* x, int64_t m, int64_t k, int64_t ldx, GemmType type, void* out,
                       Parallel& parallel);

struct GemmArguments {
  int64_t m;    // rows
  GemmInput x;  // of weight.type, or float32, converted on the way
  // Where weight.data is null, weights that are used once (in a gradient) are read as they lie:
  // element (input, column) at rows[input * rows_stride + column], of weight.type.
  PackedView weight;
  const void* rows;
  int64_t rows_stride;
  const float* bias;  // [n] or null
  // y[row * ldy + column], columns side by side; no overlap with the others. bfloat16 only where
  // the weights are bfloat16 and packed.
  void* y;
  GemmType y_type;
  int64_t ldy;
  Epilogue epilogue;
};

void gemm(const GemmArguments& arguments, Parallel& parallel);

// Rows of x, float32 or of the weights' type, with their inputs side by side. m may be 0.
inline void gemm(const GemmInput& x, int64_t m, const PackedView& weight, const float* bias,
                 float* y, int64_t ldy, Epilogue epilogue, Parallel& parallel) {
  gemm(GemmArguments{m, x, weight, nullptr, 0, bias, y, GemmType::float32, ldy, epilogue},
       parallel);
}

// Rows of float32 x side by side: x[m, k] with leading dimension ldx, y[m, n] with ldy. m may be 0.
inline void gemm(const float* x, int64_t m, int64_t ldx, const PackedView& weight,
                 const float* bias, float* y, int64_t ldy, Epilogue epilogue, Parallel& parallel) {
  gemm(GemmInput{x, GemmType::float32, ldx, 1}, m, weight, bias, y, ldy, epilogue, parallel);
}

// y[m, n] = a[m, k] b[k, n]; a with any strides, the rows of b and y side by side, b of a's type.
inline void gemm_matmul(const GemmInput& a, int64_t m, const void* b, int64_t n, int64_t k,
                        int64_t ldb, float* y, int64_t ldy, Epilogue epilogue, Parallel& parallel) {
  gemm(GemmArguments{m, a, PackedView{nullptr, n, k, a.type}, b, ldb, nullptr, y, GemmType::float32,
                     ldy, epilogue},
       parallel);
}

// Of one type; null where the instruction set lacks what it needs.
struct GemmTypeKernels {
  void (*pack)(const float* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride, void* out,
               Parallel& parallel);
  GemmInput (*convert)(const float* x, int64_t m, int64_t k, int64_t ldx, void* out,
                       Parallel& parallel);  // null for float32
  void (*gemm)(const GemmArguments& arguments, Parallel& parallel);
};

struct GemmKernels {
  int64_t panel_columns;  // of int8 too
  GemmTypeKernels float32, bfloat16;
};

struct GemmInt8Kernels {
  GemmTypeKernels int8;
  const char* instruction;  // what multiplies, for people
  bool preferred;           // int8 is the fastest type
};

TRANSFORMER_EXT_KERNELS(GemmKernels, gemm_kernels)
TRANSFORMER_EXT_INT8_KERNELS(GemmInt8Kernels, gemm_int8_kernels)

}  // namespace transformer_ext
