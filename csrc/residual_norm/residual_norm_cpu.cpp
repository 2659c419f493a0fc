#include "common/row_blocks.h"
#include "common/simd.h"
#include "dropout/philox_simd.h"
#include "residual_norm/residual_norm.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Slots of thread_scratch: the first belongs to the calling thread for the whole call.
constexpr int kPartialSlot = 0;
constexpr int kRowSlot = 1;

// Sums of gradients over rows are kept for at most so many blocks of rows, and added up at the end.
constexpr int64_t kMaxBlocks = 64;
// So many rows go through the phases of a norm together: the sum over the lanes, the root and the
// division of one row wait for each other, those of different rows do not.
constexpr int64_t kRowGroup = 4;
// So many rows share one load and store of the sums over rows. More get into each other's way in
// the cache where rows lie a multiple of 2 or 4 KiB apart.
constexpr int64_t kSumGroup = 2;
// The rows of one phase are short streams, which the hardware sees too late: what the next group
// reads is asked for so many bytes ahead.
constexpr int64_t kAheadBytes = 4096;

template <class T>
inline void ask(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAheadBytes);
}

// Whether the vector that begins in lane `first` of a group of 64 begins a cache line (if the row
// does), so that each line is asked for once.
template <class T>
constexpr bool begins_line(int first) {
  return first * static_cast<int>(sizeof(T)) % 64 == 0;
}

inline VecF store_rounded(float* p, VecF v) {
  store(p, v);
  return v;
}

inline VecF store_rounded(bfloat16* p, VecF v) {
  const VecH half = round_to_bfloat16(v);
  std::memcpy(p, &half, sizeof half);
  return from_bfloat16(half);
}

template <bool kWhole, class T>
inline __attribute__((always_inline)) VecF store_rounded_n(T* p, VecF v, int64_t n) {
  if constexpr (kWhole) {
    return store_rounded(p, v);
  } else {
    store_partial(p, v, n);
    return load_partial(p, n);
  }
}

template <bool kDrop>
inline uint64_t bits_of(const Dropout& dropout, int64_t row, uint32_t group) {
  if constexpr (kDrop) {
    return keep_bits(dropout, static_cast<uint32_t>(row), group);
  } else {
    return 0;
  }
}

// Four running sums, so that their additions overlap.
struct Sum {
  VecF part[4];
  float total() const { return reduce_add((part[0] + part[1]) + (part[2] + part[3])); }
};

constexpr int part_of(int first) { return (first / kWidth) % 4; }

// The functions on rows take their arguments by value: a store through a T* could change what
// stands behind a reference, so each vector would load the pointers anew.
template <class T, bool kResidual, bool kDrop>
void dropout_rows(ResidualDropout<T> args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * args.columns;
    uint64_t bits = 0;
    for_columns(
        args.columns, [&](uint32_t group) { bits = bits_of<kDrop>(args.dropout, row, group); },
        [&](auto whole, int64_t c, int first, int n) {
          constexpr bool kWhole = decltype(whole)::value;
          VecF v = load_n<kWhole>(args.x + at + c, n);
          if constexpr (kDrop) v = keep(v * args.dropout.scale, bits, first);
          if constexpr (kResidual) v = v + load_n<kWhole>(args.residual + at + c, n);
          store_n<kWhole>(args.out + at + c, v, n);
        });
  }
}

template <class T>
void residual_dropout(const ResidualDropout<T>& args, Parallel& parallel) {
  if (args.rows == 0 || args.columns == 0) return;
  const bool drop = args.dropout.threshold != 0;
  const auto run = args.residual == nullptr
                       ? (drop ? &dropout_rows<T, false, true> : &dropout_rows<T, false, false>)
                       : (drop ? &dropout_rows<T, true, true> : &dropout_rows<T, true, false>);
  const RowBlocks blocks = row_blocks(args.rows, args.columns);
  parallel.for_each(blocks.count,
                    [&](int64_t block) { run(args, blocks.begin(block), blocks.end(block)); });
}

template <class T, bool kResidual, bool kDrop>
void forward_rows(ResidualNormForward<T> args, int64_t begin, int64_t end) {
  constexpr bool kSum = kResidual || kDrop;
  // Float32 rows are read again where they stand; others are kept as float32 until they are done.
  constexpr bool kLine = sizeof(T) != sizeof(float);
  const int64_t columns = args.columns;
  const float* const weight = args.weight;
  const float* const bias = args.bias;
  float* const cache =
      kLine ? static_cast<float*>(thread_scratch(
                  static_cast<size_t>(kRowGroup * columns) * sizeof(float), kRowSlot))
            : nullptr;
  const auto no_start = [](uint32_t) {};
  const auto line_of = [&](int64_t row, int64_t i) -> const float* {
    if constexpr (kLine) {
      return cache + i * columns;
    } else {
      return (kSum ? args.sum : args.x) + row * columns;
    }
  };
  float mean[kRowGroup], rstd[kRowGroup];
  for (; begin < end; begin += kRowGroup) {
    const int64_t count = begin + kRowGroup < end ? kRowGroup : end - begin;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = begin + i;
      const T* const x = args.x + row * columns;
      const T* const residual = args.residual + (kResidual ? row * columns : 0);
      T* const out = args.sum + (kSum ? row * columns : 0);
      float* const line = cache + (kLine ? i * columns : 0);
      uint64_t bits = 0;
      Sum sum{};
      for_columns(
          columns, [&](uint32_t group) { bits = bits_of<kDrop>(args.dropout, row, group); },
          [&](auto whole, int64_t c, int first, int n) {
            constexpr bool kWhole = decltype(whole)::value;
            if (begins_line<T>(first)) {
              ask(x + c);
              if constexpr (kResidual) ask(residual + c);
            }
            VecF v = load_n<kWhole>(x + c, n);
            if constexpr (kDrop) v = keep(v * args.dropout.scale, bits, first);
            if constexpr (kResidual) v = v + load_n<kWhole>(residual + c, n);
            if constexpr (kSum) v = store_rounded_n<kWhole>(out + c, v, n);
            if constexpr (kLine) store_n<kWhole>(line + c, v, n);
            sum.part[part_of(first)] = sum.part[part_of(first)] + v;
          });
      mean[i] = args.rms ? 0.0f : sum.total() / static_cast<float>(columns);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* const line = line_of(begin + i, i);
      const VecF centre = broadcast(mean[i]);
      Sum squares{};
      for_columns(columns, no_start, [&](auto whole, int64_t c, int first, int n) {
        constexpr bool kWhole = decltype(whole)::value;
        VecF centred = load_n<kWhole>(line + c, n) - centre;
        // The lanes past the row have become -mean: their squares must not count.
        if constexpr (!kWhole) centred = first_lanes(centred, n);
        squares.part[part_of(first)] = squares.part[part_of(first)] + centred * centred;
      });
      rstd[i] = 1.0f / __builtin_sqrtf(squares.total() / static_cast<float>(columns) + args.eps);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* const line = line_of(begin + i, i);
      const VecF centre = broadcast(mean[i]);
      const VecF factor = broadcast(rstd[i]);
      T* const normed = args.normed + (begin + i) * columns;
      for_columns(columns, no_start, [&](auto whole, int64_t c, int, int n) {
        constexpr bool kWhole = decltype(whole)::value;
        VecF v = (load_n<kWhole>(line + c, n) - centre) * factor;
        if (weight != nullptr) v = v * load_n<kWhole>(weight + c, n);
        if (bias != nullptr) v = v + load_n<kWhole>(bias + c, n);
        store_n<kWhole>(normed + c, v, n);
      });
      if (args.mean != nullptr) args.mean[begin + i] = mean[i];
      if (args.rstd != nullptr) args.rstd[begin + i] = rstd[i];
    }
  }
}

template <class T>
void forward(const ResidualNormForward<T>& args, Parallel& parallel) {
  if (args.rows == 0 || args.columns == 0) return;
  const bool drop = args.dropout.threshold != 0;
  const auto run = args.residual == nullptr
                       ? (drop ? &forward_rows<T, false, true> : &forward_rows<T, false, false>)
                       : (drop ? &forward_rows<T, true, true> : &forward_rows<T, true, false>);
  const RowBlocks blocks = row_blocks(args.rows, args.columns);
  parallel.for_each(blocks.count,
                    [&](int64_t block) { run(args, blocks.begin(block), blocks.end(block)); });
}

// What the second phase of the gradient needs of a row, see backward_sums.
struct RowTerms {
  float mean;
  float rstd;
  float mean_g;
  float of_centred;
};

// With g = grad_normed * weight, h = (sum - mean) * rstd:
//   grad of sum = rstd * (g - mean(g) - h * mean(g * h)) + grad_sum     (RMSNorm: no mean(g))
//               = rstd * (g - mean_g - of_centred * (sum - mean)) + grad_sum
template <class T>
inline RowTerms backward_sums(const ResidualNormBackward<T>& args, const float* weight,
                              int64_t row) {
  const int64_t columns = args.columns;
  const T* const grad = args.grad_normed + row * columns;
  const T* const sum = args.sum + row * columns;
  const float mean = args.mean == nullptr ? 0.0f : args.mean[row];
  const float rstd = args.rstd[row];
  const VecF centre = broadcast(mean);
  Sum g_sum{}, gc_sum{};
  for_columns(
      columns, [](uint32_t) {},
      [&](auto whole, int64_t c, int first, int n) {
        constexpr bool kWhole = decltype(whole)::value;
        if (begins_line<T>(first)) {
          ask(grad + c);
          ask(sum + c);
          // The second phase comes soon; what it alone touches is asked for where it will be. In
          // the forward pass asking for results ahead gained nothing.
          if (args.grad_sum != nullptr) __builtin_prefetch(args.grad_sum + row * columns + c);
          if (args.grad_residual != nullptr) {
            __builtin_prefetch(args.grad_residual + row * columns + c, 1);
          }
          if (args.grad_x != nullptr) __builtin_prefetch(args.grad_x + row * columns + c, 1);
        }
        // Past the row g is 0.
        const VecF g = load_n<kWhole>(grad + c, n) * load_n<kWhole>(weight + c, n);
        const VecF centred = load_n<kWhole>(sum + c, n) - centre;
        g_sum.part[part_of(first)] = g_sum.part[part_of(first)] + g;
        gc_sum.part[part_of(first)] = gc_sum.part[part_of(first)] + g * centred;
      });
  const float mean_g = args.rms ? 0.0f : g_sum.total() / static_cast<float>(columns);
  const float mean_gh = gc_sum.total() * rstd / static_cast<float>(columns);
  return {mean, rstd, mean_g, mean_gh * rstd};
}

// Gradients of kRows rows, added into weight_sum and bias_sum.
template <class T, bool kGradSum, bool kDrop, int kRows>
void backward_rows(ResidualNormBackward<T> args, const float* weight, int64_t begin,
                   const RowTerms* terms, float* weight_sum, float* bias_sum) {
  const int64_t columns = args.columns;
  VecF mean[kRows], rstd[kRows], mean_g[kRows], of_centred[kRows];
  for (int i = 0; i < kRows; ++i) {
    mean[i] = broadcast(terms[i].mean);
    rstd[i] = broadcast(terms[i].rstd);
    mean_g[i] = broadcast(terms[i].mean_g);
    of_centred[i] = broadcast(terms[i].of_centred);
  }
  uint64_t bits[kRows] = {};
  for_columns(
      columns,
      [&](uint32_t group) {
        for (int i = 0; i < kRows; ++i) bits[i] = bits_of<kDrop>(args.dropout, begin + i, group);
      },
      [&](auto whole, int64_t c, int first, int n) {
        constexpr bool kWhole = decltype(whole)::value;
        const VecF w = load_n<kWhole>(weight + c, n);
        VecF to_weight = load_n<kWhole>(weight_sum + c, n);
        VecF to_bias = load_n<kWhole>(bias_sum + c, n);
#pragma GCC unroll 2
        for (int i = 0; i < kRows; ++i) {
          const int64_t at = (begin + i) * columns + c;
          const VecF grad = load_n<kWhole>(args.grad_normed + at, n);
          const VecF centred = load_n<kWhole>(args.sum + at, n) - mean[i];
          to_weight = to_weight + (grad * rstd[i]) * centred;
          to_bias = to_bias + grad;
          VecF v = (grad * w - mean_g[i] - of_centred[i] * centred) * rstd[i];
          if constexpr (kGradSum) v = v + load_n<kWhole>(args.grad_sum + at, n);
          if constexpr (kDrop) {
            if (args.grad_residual != nullptr) store_n<kWhole>(args.grad_residual + at, v, n);
            store_n<kWhole>(args.grad_x + at, keep(v * args.dropout.scale, bits[i], first), n);
          } else {
            store_n<kWhole>(args.grad_residual + at, v, n);
          }
        }
        store_n<kWhole>(weight_sum + c, to_weight, n);
        store_n<kWhole>(bias_sum + c, to_bias, n);
      });
}

template <class T, bool kGradSum, bool kDrop>
void backward_block(ResidualNormBackward<T> args, const float* weight, int64_t begin, int64_t end,
                    float* weight_sum, float* bias_sum) {
  static_assert(kSumGroup == 2 && kRowGroup % kSumGroup == 0);
  RowTerms terms[kRowGroup];
  for (; begin < end; begin += kRowGroup) {
    const int64_t count = begin + kRowGroup < end ? kRowGroup : end - begin;
    for (int64_t i = 0; i < count; ++i) terms[i] = backward_sums(args, weight, begin + i);
    int64_t i = 0;
    for (; i + kSumGroup <= count; i += kSumGroup) {
      backward_rows<T, kGradSum, kDrop, kSumGroup>(args, weight, begin + i, terms + i, weight_sum,
                                                   bias_sum);
    }
    if (i < count) {
      backward_rows<T, kGradSum, kDrop, 1>(args, weight, begin + i, terms + i, weight_sum,
                                           bias_sum);
    }
  }
}

template <class T>
void backward(const ResidualNormBackward<T>& args, Parallel& parallel) {
  const int64_t columns = args.columns;
  const size_t row_bytes = static_cast<size_t>(columns) * sizeof(float);
  if (args.rows == 0 || columns == 0) {
    if (args.grad_weight != nullptr) std::memset(args.grad_weight, 0, row_bytes);
    if (args.grad_bias != nullptr) std::memset(args.grad_bias, 0, row_bytes);
    return;
  }
  const bool drop = args.dropout.threshold != 0;
  const auto run = args.grad_sum == nullptr
                       ? (drop ? &backward_block<T, false, true> : &backward_block<T, false, false>)
                       : (drop ? &backward_block<T, true, true> : &backward_block<T, true, false>);
  const RowBlocks blocks = row_blocks(args.rows, columns, kMaxBlocks, kRowGroup);
  // [weight sums of all blocks][bias sums of all blocks][ones, in place of a missing weight]
  float* const partials = static_cast<float*>(
      thread_scratch((2 * static_cast<size_t>(blocks.count) + 1) * row_bytes, kPartialSlot));
  float* const bias_partials = partials + blocks.count * columns;
  const float* weight = args.weight;
  if (weight == nullptr) {
    float* const ones = bias_partials + blocks.count * columns;
    for (int64_t c = 0; c < columns; ++c) ones[c] = 1.0f;
    weight = ones;
  }
  parallel.for_each(blocks.count, [&](int64_t block) {
    float* const weight_sum = partials + block * columns;
    float* const bias_sum = bias_partials + block * columns;
    std::memset(weight_sum, 0, row_bytes);
    std::memset(bias_sum, 0, row_bytes);
    run(args, weight, blocks.begin(block), blocks.end(block), weight_sum, bias_sum);
  });
  if (args.grad_weight != nullptr) {
    add_blocks(partials, blocks.count, columns, args.grad_weight, parallel);
  }
  if (args.grad_bias != nullptr) {
    add_blocks(bias_partials, blocks.count, columns, args.grad_bias, parallel);
  }
}

}  // namespace

extern const ResidualNormKernels residual_norm_kernels;
const ResidualNormKernels residual_norm_kernels = {
    &residual_dropout<float>, &residual_dropout<bfloat16>, &forward<float>, &forward<bfloat16>,
    &backward<float>,         &backward<bfloat16>,
};

}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
