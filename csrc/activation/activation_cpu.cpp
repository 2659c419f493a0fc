#include "activation/activation.h"
#include "common/row_blocks.h"
#include "common/simd.h"
#include "dropout/philox_simd.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Slots of thread_scratch.
constexpr int kPartialSlot = 0;

constexpr int64_t kMaxBlocks = 64;

// A function of one variable, and its derivative.
struct ValueAndSlope {
  VecF value;
  VecF slope;
};

struct Relu {
  // `x <= 0` and not `x > 0`: a NaN stays a NaN.
  static VecF value(VecF x) { return select(x <= 0.0f, zero(), x); }
  static ValueAndSlope both(VecF x) {
    return {value(x), select(x <= 0.0f, zero(), broadcast(1.0f))};
  }
};

inline VecF absolute(VecF x) { return (VecF)((VecI)x & 0x7fffffff); }

// 1 / (1 + e^-x), and 1 minus it without cancellation.
struct Sigmoid {
  VecF value;
  VecF rest;
  explicit Sigmoid(VecF x) {
    const VecF e = exp(-absolute(x));
    const VecF larger = 1.0f / (1.0f + e);
    const VecI negative = x < 0.0f;
    value = select(negative, e * larger, larger);
    rest = select(negative, larger, e * larger);
  }
};

struct Silu {
  static VecF value(VecF x) { return x / (1.0f + exp(-x)); }
  static ValueAndSlope both(VecF x) {
    const Sigmoid s(x);
    return {x * s.value, s.value * (1.0f + x * s.rest)};
  }
};

// 0.5 * (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  static constexpr float kTwice = 1.5957691216057308f;
  static constexpr float kCubic = 0.044715f;
  static VecF twice_u(VecF x) { return kTwice * (x + kCubic * x * x * x); }
  static VecF value(VecF x) { return x / (1.0f + exp(-twice_u(x))); }
  static ValueAndSlope both(VecF x) {
    const Sigmoid s(twice_u(x));
    const VecF slope = kTwice * (1.0f + 3.0f * kCubic * x * x);
    // In this order a vanishing factor comes first: x * slope overflows from |x| = 1e13 on.
    return {x * s.value, s.value + s.value * s.rest * x * slope};
  }
};

// Phi(x) = erfc(-x / sqrt 2) / 2 by erfc(a) = exp(-a^2) t P(t), t = 1 / (1 + 0.4 a), a >= 0: P is
// our own weighted least-squares fit, iterated to an even relative error of 8e-8 over 0 <= a <= 10.
// It is relative in the lower tail too, and the exponential serves the density.
struct Gelu {
  static VecF tail(VecF x, VecF density) {
    const VecF a = absolute(x) * 0.70710678118654752f;
    const VecF t = 1.0f / (1.0f + 0.4f * a);
    VecF p = broadcast(0.0403684601187706f);
    p = p * t - 0.13617762923240662f;
    p = p * t + 0.07577075064182281f;
    p = p * t + 0.09695297479629517f;
    p = p * t + 0.07385020703077316f;
    p = p * t + 0.1957697570323944f;
    p = p * t + 0.20131811499595642f;
    p = p * t + 0.22651715576648712f;
    p = p * t + 0.2256302386522293f;
    const VecF half_erfc = 0.5f * density * (p * t);
    return select(x < 0.0f, half_erfc, 1.0f - half_erfc);
  }
  static VecF value(VecF x) { return x * tail(x, exp(-0.5f * x * x)); }
  static ValueAndSlope both(VecF x) {
    const VecF density = exp(-0.5f * x * x);
    const VecF phi = tail(x, density);
    return {x * phi, phi + x * density * 0.39894228040143268f};
  }
};

// The functions on rows take their arguments by value: a store through a T* could change what
// stands behind a reference, so each vector would load the pointers anew.
template <class T, class F, bool kGated, bool kDrop>
void forward_rows(ActivationForward<T> args, const float* bias, int64_t begin, int64_t end) {
  const int64_t columns = args.columns;
  const int64_t x_columns = kGated ? 2 * columns : columns;
  for (int64_t row = begin; row < end; ++row) {
    const T* const x = args.x + row * x_columns;
    T* const out = args.out + row * columns;
    uint64_t bits = 0;
    for_columns(
        columns,
        [&](uint32_t group) {
          if constexpr (kDrop) bits = keep_bits(args.dropout, static_cast<uint32_t>(row), group);
        },
        [&](auto whole, int64_t c, int first, int n) {
          constexpr bool kWhole = decltype(whole)::value;
          VecF v = load_n<kWhole>(x + c, n);
          if (bias != nullptr) v = v + load_n<kWhole>(bias + c, n);
          v = F::value(v);
          if constexpr (kGated) {
            VecF up = load_n<kWhole>(x + columns + c, n);
            if (bias != nullptr) up = up + load_n<kWhole>(bias + columns + c, n);
            v = v * up;
          }
          if constexpr (kDrop) v = keep(v * args.dropout.scale, bits, first);
          store_n<kWhole>(out + c, v, n);
        });
  }
}

// ReLU, from its output: grad * scale where that is not 0 (a NaN is not).
template <class T>
void relu_backward_rows(ActivationBackward<T> args, int64_t begin, int64_t end, float* bias_sum) {
  const int64_t columns = args.columns;
  for (int64_t row = begin; row < end; ++row) {
    const T* const grad = args.grad + row * columns;
    const T* const out = args.x + row * columns;
    T* const grad_x = args.grad_x + row * columns;
    for_columns(
        columns, [](uint32_t) {},
        [&](auto whole, int64_t c, int, int n) {
          constexpr bool kWhole = decltype(whole)::value;
          const VecF y = load_n<kWhole>(out + c, n);
          const VecF v =
              select(y == 0.0f, zero(), load_n<kWhole>(grad + c, n) * args.dropout.scale);
          store_n<kWhole>(grad_x + c, v, n);
          if (bias_sum == nullptr) return;
          store_n<kWhole>(bias_sum + c, load_n<kWhole>(bias_sum + c, n) + v, n);
        });
  }
}

// bias_sum (nullptr: not wanted) gets the sum of grad_x added. One row at a time: several rows side
// by side would save loads and stores of the sums, but rows often lie a multiple of 4 KiB apart,
// where their loads and stores are in each other's way (half the speed, measured).
template <class T, class F, bool kGated, bool kDrop>
void backward_rows(ActivationBackward<T> args, int64_t begin, int64_t end, float* bias_sum) {
  const int64_t columns = args.columns;
  const int64_t x_columns = kGated ? 2 * columns : columns;
  const float* const bias = args.bias;
  for (int64_t row = begin; row < end; ++row) {
    const T* const grad_out = args.grad + row * columns;
    const T* const x = args.x + row * x_columns;
    T* const grad_x = args.grad_x + row * x_columns;
    uint64_t bits = 0;
    for_columns(
        columns,
        [&](uint32_t group) {
          if constexpr (kDrop) bits = keep_bits(args.dropout, static_cast<uint32_t>(row), group);
        },
        [&](auto whole, int64_t c, int first, int n) {
          constexpr bool kWhole = decltype(whole)::value;
          const auto put = [&](int64_t column, VecF v) {
            store_n<kWhole>(grad_x + column, v, n);
            if (bias_sum == nullptr) return;
            store_n<kWhole>(bias_sum + column, load_n<kWhole>(bias_sum + column, n) + v, n);
          };
          VecF grad = load_n<kWhole>(grad_out + c, n);
          if constexpr (kDrop) grad = keep(grad * args.dropout.scale, bits, first);
          VecF gate = load_n<kWhole>(x + c, n);
          if (bias != nullptr) gate = gate + load_n<kWhole>(bias + c, n);
          const ValueAndSlope f = F::both(gate);
          if constexpr (kGated) {
            VecF up = load_n<kWhole>(x + columns + c, n);
            if (bias != nullptr) up = up + load_n<kWhole>(bias + columns + c, n);
            put(c, grad * f.slope * up);
            put(columns + c, grad * f.value);
          } else {
            put(c, grad * f.slope);
          }
        });
  }
}

template <class T>
using ForwardRows = void (*)(ActivationForward<T>, const float*, int64_t, int64_t);
template <class T>
using BackwardRows = void (*)(ActivationBackward<T>, int64_t, int64_t, float*);

// By kind, then without and with dropout.
template <class T>
constexpr ForwardRows<T> kForward[kActivations][2] = {
    {&forward_rows<T, Relu, false, false>, &forward_rows<T, Relu, false, true>},
    {&forward_rows<T, Gelu, false, false>, &forward_rows<T, Gelu, false, true>},
    {&forward_rows<T, GeluTanh, false, false>, &forward_rows<T, GeluTanh, false, true>},
    {&forward_rows<T, Silu, false, false>, &forward_rows<T, Silu, false, true>},
    {&forward_rows<T, Silu, true, false>, &forward_rows<T, Silu, true, true>},
    {&forward_rows<T, Gelu, true, false>, &forward_rows<T, Gelu, true, true>},
    {&forward_rows<T, Relu, true, false>, &forward_rows<T, Relu, true, true>},
};
template <class T>
constexpr BackwardRows<T> kBackward[kActivations][2] = {
    {&relu_backward_rows<T>, &relu_backward_rows<T>},
    {&backward_rows<T, Gelu, false, false>, &backward_rows<T, Gelu, false, true>},
    {&backward_rows<T, GeluTanh, false, false>, &backward_rows<T, GeluTanh, false, true>},
    {&backward_rows<T, Silu, false, false>, &backward_rows<T, Silu, false, true>},
    {&backward_rows<T, Silu, true, false>, &backward_rows<T, Silu, true, true>},
    {&backward_rows<T, Gelu, true, false>, &backward_rows<T, Gelu, true, true>},
    {&backward_rows<T, Relu, true, false>, &backward_rows<T, Relu, true, true>},
};

template <class T>
void forward(const ActivationForward<T>& args, Parallel& parallel) {
  if (args.rows == 0 || args.columns == 0) return;
  const auto run = kForward<T>[static_cast<int>(args.kind)][args.dropout.threshold != 0];
  const RowBlocks blocks = row_blocks(args.rows, args.columns);
  parallel.for_each(blocks.count, [&](int64_t block) {
    run(args, args.bias, blocks.begin(block), blocks.end(block));
  });
}

template <class T>
void backward(const ActivationBackward<T>& args, Parallel& parallel) {
  const int64_t x_columns = is_gated(args.kind) ? 2 * args.columns : args.columns;
  const size_t row_bytes = static_cast<size_t>(x_columns) * sizeof(float);
  if (args.rows == 0 || args.columns == 0) {
    if (args.grad_bias != nullptr) std::memset(args.grad_bias, 0, row_bytes);
    return;
  }
  const auto run = kBackward<T>[static_cast<int>(args.kind)][args.dropout.threshold != 0];
  const bool sums = args.grad_bias != nullptr;
  const RowBlocks blocks = row_blocks(args.rows, args.columns, sums ? kMaxBlocks : 0);
  float* const partials = sums ? static_cast<float*>(thread_scratch(
                                     static_cast<size_t>(blocks.count) * row_bytes, kPartialSlot))
                               : nullptr;
  parallel.for_each(blocks.count, [&](int64_t block) {
    float* const bias_sum = sums ? partials + block * x_columns : nullptr;
    if (sums) std::memset(bias_sum, 0, row_bytes);
    run(args, blocks.begin(block), blocks.end(block), bias_sum);
  });
  if (sums) add_blocks(partials, blocks.count, x_columns, args.grad_bias, parallel);
}

}  // namespace

extern const ActivationKernels activation_kernels;
const ActivationKernels activation_kernels = {
    &forward<float>,
    &forward<bfloat16>,
    &backward<float>,
    &backward<bfloat16>,
};

}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
