#include "common/row_blocks.h"
#include "common/simd.h"
#include "dropout/philox_simd.h"
#include "embedding/embedding.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Slots of thread_scratch.
constexpr int kGroupSlot = 0;

inline int64_t index_of(const Indices& indices, int64_t i) {
  return indices.wide != nullptr ? indices.wide[i] : indices.narrow[i];
}

// Rows of a table stand anywhere in memory: while one is worked on, the one after the next is asked
// for, a cache line for each 64 bytes that are read.
constexpr int64_t kRowsAhead = 2;

template <class T>
inline void ask(const T* row, int64_t column) {
  if (column * static_cast<int64_t>(sizeof(T)) % 64 == 0) __builtin_prefetch(row + column);
}

template <class T, bool kPositions, bool kDrop>
void forward_rows(EmbeddingForward<T> args, int64_t begin, int64_t end) {
  const int64_t columns = args.columns;
  for (int64_t token = begin; token < end; ++token) {
    const float* const word = args.weight + index_of(args.ids, token) * columns;
    const int64_t later = token + kRowsAhead < end ? token + kRowsAhead : token;
    const float* const later_word = args.weight + index_of(args.ids, later) * columns;
    const float* place = nullptr;
    if constexpr (kPositions) {
      place = args.position_table + index_of(args.positions, token) * columns;
    }
    T* const out = args.out + token * columns;
    uint64_t bits = 0;
    for_columns(
        columns,
        [&](uint32_t group) {
          if constexpr (kDrop) bits = keep_bits(args.dropout, static_cast<uint32_t>(token), group);
        },
        [&](auto whole, int64_t c, int first, int n) {
          constexpr bool kWhole = decltype(whole)::value;
          ask(later_word, c);
          VecF v = load_n<kWhole>(word + c, n) * args.scale;
          if constexpr (kPositions) v = v + load_n<kWhole>(place + c, n);
          if constexpr (kDrop) v = keep(v * args.dropout.scale, bits, first);
          store_n<kWhole>(out + c, v, n);
        });
  }
}

template <class T>
void forward(const EmbeddingForward<T>& args, Parallel& parallel) {
  if (args.tokens == 0 || args.columns == 0) return;
  const bool drop = args.dropout.threshold != 0;
  const auto run = args.position_table == nullptr
                       ? (drop ? &forward_rows<T, false, true> : &forward_rows<T, false, false>)
                       : (drop ? &forward_rows<T, true, true> : &forward_rows<T, true, false>);
  const RowBlocks blocks = row_blocks(args.tokens, args.columns);
  parallel.for_each(blocks.count,
                    [&](int64_t block) { run(args, blocks.begin(block), blocks.end(block)); });
}

// sum = dropout(grad[token]) * scale (kFirst), or added to it. `later` is a token that comes soon.
template <class T, bool kDrop, bool kFirst>
void add_token(EmbeddingBackward<T> args, int64_t token, int64_t later, float* sum) {
  const T* const grad = args.grad + token * args.columns;
  const T* const later_grad = args.grad + later * args.columns;
  const float scale = args.scale * args.dropout.scale;
  uint64_t bits = 0;
  for_columns(
      args.columns,
      [&](uint32_t group) {
        if constexpr (kDrop) bits = keep_bits(args.dropout, static_cast<uint32_t>(token), group);
      },
      [&](auto whole, int64_t c, int first, int n) {
        constexpr bool kWhole = decltype(whole)::value;
        ask(later_grad, c);
        VecF v = load_n<kWhole>(grad + c, n) * scale;
        if constexpr (kDrop) v = keep(v, bits, first);
        if constexpr (!kFirst) v = v + load_n<kWhole>(sum + c, n);
        store_n<kWhole>(sum + c, v, n);
      });
}

template <class T>
void backward(const EmbeddingBackward<T>& args, Parallel& parallel) {
  const int64_t rows = args.rows;
  const int64_t columns = args.columns;
  if (rows == 0 || columns == 0) return;
  // A counting sort by id: tokens first[i] .. first[i + 1] of `order` have id i, in their order.
  int32_t* const first = static_cast<int32_t*>(thread_scratch(
      (static_cast<size_t>(rows) + 1 + static_cast<size_t>(args.tokens)) * sizeof(int32_t),
      kGroupSlot));
  int32_t* const order = first + rows + 1;
  std::memset(first, 0, (static_cast<size_t>(rows) + 1) * sizeof(int32_t));
  for (int64_t t = 0; t < args.tokens; ++t) ++first[index_of(args.ids, t) + 1];
  for (int64_t i = 0; i < rows; ++i) first[i + 1] += first[i];
  // Placing a token moves the start of its id on, in the end to that of the next id: shift them
  // back.
  for (int64_t t = 0; t < args.tokens; ++t) {
    order[first[index_of(args.ids, t)]++] = static_cast<int32_t>(t);
  }
  std::memmove(first + 1, first, static_cast<size_t>(rows) * sizeof(int32_t));
  first[0] = 0;

  // Frequent ids often stand together, at the front: the tasks are cut at equal shares of rows and
  // tokens, not of rows.
  const int64_t work = rows + args.tokens;
  const int64_t share = row_blocks(work, columns).rows_per_block;
  const auto boundary = [&](int64_t task) {
    const int64_t target = task * share;
    int64_t low = 0;
    int64_t high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (middle + first[middle] < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  const bool drop = args.dropout.threshold != 0;
  const auto set = drop ? &add_token<T, true, true> : &add_token<T, false, true>;
  const auto add = drop ? &add_token<T, true, false> : &add_token<T, false, false>;
  parallel.for_each((work + share - 1) / share, [&](int64_t task) {
    const int64_t end = boundary(task + 1);
    const auto later = [&](int64_t k) {
      return order[k + kRowsAhead < args.tokens ? k + kRowsAhead : k];
    };
    for (int64_t i = boundary(task); i < end; ++i) {
      float* const sum = args.grad_weight + i * columns;
      int64_t k = first[i];
      if (k == first[i + 1]) {
        // Most of a large vocabulary stands in no batch: many rows at once.
        int64_t next = i + 1;
        while (next < end && first[next] == first[next + 1]) ++next;
        std::memset(sum, 0, static_cast<size_t>((next - i) * columns) * sizeof(float));
        i = next - 1;
        continue;
      }
      set(args, order[k], later(k), sum);
      while (++k < first[i + 1]) add(args, order[k], later(k), sum);
    }
  });
}

}  // namespace

extern const EmbeddingKernels embedding_kernels;
const EmbeddingKernels embedding_kernels = {
    &forward<float>,
    &forward<bfloat16>,
    &backward<float>,
    &backward<bfloat16>,
};

}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
