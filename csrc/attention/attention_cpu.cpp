#include "attention/attention.h"
#include "common/simd.h"
#include "dropout/philox_simd.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

constexpr int64_t kW = kWidth;
constexpr float kInfinity = __builtin_inff();

// Keys that are packed and attended to at a time. A multiple of 64, the dropout block.
constexpr int64_t kKeyBlock = 128;
// Queries whose keys and values one forward task packs once.
constexpr int64_t kForwardQueries = 256;
// Rows of scores held at a time. Causal attention wants few: it computes whole tiles.
constexpr int64_t kForwardRows = 24;
constexpr int64_t kForwardRowsCausal = 12;
constexpr int64_t kBackwardRows = 32;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t vectors(int64_t n) { return (n + kW - 1) / kW; }
inline int64_t round_up(int64_t n) { return vectors(n) * kW; }

// ---- Products of small matrices that lie in the cache ------------------------------------------
//
// C[m, n] (+)= A[m, depth] B[depth, n]: every element of C is accumulated in one register in
// ascending depth, so it does not depend on how the matrix is cut into panels.
//
// Where the machine multiplies pairs of bfloat16, an element of A and B is such a pair, two
// neighbours along the depth in the 32 bits of a float; depths below still count single numbers.

template <class T>
constexpr bool kPairs = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool kPairs<bfloat16> = true;
#endif

template <class T>
constexpr int64_t depth_elements(int64_t depth) {
  return kPairs<T> ? (depth + 1) / 2 : depth;
}

template <class T>
inline VecF multiply_add(VecF a, VecF b, VecF sum) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
#endif
  return a * b + sum;
}

// Accumulators of a panel: rows x vectors, bound by the number of registers.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
constexpr int panel_rows(int columns) { return columns == 4 ? 6 : 8; }
#else
constexpr int kMaxVectors = 2;
constexpr int panel_rows(int columns) { return columns == 2 ? 6 : 8; }
#endif

struct Operand {
  const float* data;
  int64_t row_stride;
  int64_t column_stride;
};

// C, and B with its rows of whole vectors.
struct Rows {
  float* data;
  int64_t stride;
};

template <class T, int R, int C>
void panel(bool accumulate, int64_t begin, int64_t end, const float* a, int64_t a_row,
           int64_t a_column, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  VecF sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) sum[r][v] = accumulate ? load(c + r * c_stride + v * kW) : zero();
  }
  for (int64_t k = begin; k < end; ++k) {
    VecF x[C];
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) x[v] = load(b + k * b_stride + v * kW);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const VecF y = broadcast(a[r * a_row + k * a_column]);
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] = multiply_add<T>(y, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) store(c + r * c_stride + v * kW, sum[r][v]);
  }
}

template <class T, int C, int R = panel_rows(C)>
void panel_of(int64_t rows, bool accumulate, int64_t begin, int64_t end, const float* a,
              int64_t a_row, int64_t a_column, const float* b, int64_t b_stride, float* c,
              int64_t c_stride) {
  if constexpr (R > 1) {
    if (rows < R) {
      return panel_of<T, C, R - 1>(rows, accumulate, begin, end, a, a_row, a_column, b, b_stride, c,
                                   c_stride);
    }
  }
  panel<T, R, C>(accumulate, begin, end, a, a_row, a_column, b, b_stride, c, c_stride);
}

// What causal masking leaves of a product; row r may attend to column c iff c <= r + diagonal.
enum class Band {
  kFull,
  kColumns,    // of C: scores. Beyond the band C is left undefined.
  kDepthTo,    // row r of C needs depth 0 .. r + diagonal: weights times values
  kDepthFrom,  // row r of C needs depth r - diagonal ..: transposed weights times queries
};

template <class T, int C>
void product_columns(Band band, int64_t diagonal, bool accumulate, int64_t m, int64_t first_column,
                     int64_t depth, Operand a, const float* b, int64_t b_stride, float* c,
                     int64_t c_stride) {
  const int64_t panels = (m + panel_rows(C) - 1) / panel_rows(C);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t r0 = m * p / panels;
    const int64_t r1 = m * (p + 1) / panels;
    int64_t begin = 0;
    int64_t end = depth;
    if (band == Band::kColumns && first_column >= r1 + diagonal) continue;
    if (band == Band::kDepthTo) end = larger(0, smaller(depth, r1 + diagonal));
    if (band == Band::kDepthFrom) begin = larger(0, smaller(depth, r0 - diagonal));
    panel_of<T, C>(r1 - r0, accumulate, kPairs<T> ? begin / 2 : begin, depth_elements<T>(end),
                   a.data + r0 * a.row_stride, a.row_stride, a.column_stride, b, b_stride,
                   c + r0 * c_stride, c_stride);
  }
}

// n counts vectors. T: what the operands were packed from.
template <class T>
void product(Band band, int64_t diagonal, bool accumulate, int64_t m, int64_t n, int64_t depth,
             Operand a, Rows b, Rows c) {
  const int64_t chunks = (n + kMaxVectors - 1) / kMaxVectors;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t v0 = n * i / chunks;
    const int64_t v1 = n * (i + 1) / chunks;
    const float* bp = b.data + v0 * kW;
    float* cp = c.data + v0 * kW;
    switch (v1 - v0) {
      case 1:
        product_columns<T, 1>(band, diagonal, accumulate, m, v0 * kW, depth, a, bp, b.stride, cp,
                              c.stride);
        break;
      case 2:
        product_columns<T, 2>(band, diagonal, accumulate, m, v0 * kW, depth, a, bp, b.stride, cp,
                              c.stride);
        break;
#if defined(__AVX512F__)
      case 3:
        product_columns<T, 3>(band, diagonal, accumulate, m, v0 * kW, depth, a, bp, b.stride, cp,
                              c.stride);
        break;
      case 4:
        product_columns<T, 4>(band, diagonal, accumulate, m, v0 * kW, depth, a, bp, b.stride, cp,
                              c.stride);
        break;
#endif
    }
  }
}

// ---- Packing: from the caller's tensors into dense float32 rows of whole vectors ---------------

template <class T>
inline VecF load_first(const T* p, int64_t n) {
  return n >= kW ? load(p) : load_partial(p, n);
}

#if defined(__AVX512BF16__)
// Pairs of neighbours in a row, as they lie in memory: n numbers, 0 behind them.
inline VecF load_pairs(const bfloat16* p, int64_t n) {
  const __mmask32 first = n >= 2 * kW ? ~0u : (1u << n) - 1u;
  return (VecF)_mm512_maskz_loadu_epi16(first, p);
}
#endif

inline VecF load_depth(const float* p, int64_t n) { return load_first(p, n); }
inline VecF load_depth(const bfloat16* p, int64_t n) {
#if defined(__AVX512BF16__)
  return load_pairs(p, n);
#else
  return load_first(p, n);
#endif
}

// Numbers in a vector of elements along the depth.
template <class T>
constexpr int64_t kStep = kPairs<T> ? 2 * kW : kW;

// The functions below take `live`: null, or a 0 for each row that counts as 0 whatever stands in
// it.

// Operand A of a product over head_dim, one row a row.
template <class T>
void pack_rows(const T* source, int64_t stride, int64_t rows, int64_t head_dim, const uint8_t* live,
               Rows to) {
  for (int64_t r = 0; r < rows; ++r) {
    const bool dead = live != nullptr && !live[r];
    for (int64_t d = 0; d < head_dim; d += kStep<T>) {
      store(to.data + r * to.stride + d * kW / kStep<T>,
            dead ? zero() : load_depth(source + r * stride + d, head_dim - d));
    }
  }
}

// Operand B of a product over the rows. Pairs: two rows interleaved; n counts numbers of a row.
template <class T>
void pack_depth(const T* source, int64_t stride, int64_t rows, int64_t n, const uint8_t* live,
                Rows to) {
  if constexpr (!kPairs<T>) {
    pack_rows(source, stride, rows, n, live, to);
  } else {
    for (int64_t r = 0; r < rows; r += 2) {
      const bool use_low = live == nullptr || live[r];
      const bool use_high = r + 1 < rows && (live == nullptr || live[r + 1]);
      const T* low = source + r * stride;
      for (int64_t d = 0; d < n; d += kW) {
        // As float32, bfloat16 is the upper half of the bits.
        const VecU a = use_low ? (VecU)load_first(low + d, n - d) >> 16 : VecU{};
        const VecU b = use_high ? (VecU)load_first(low + stride + d, n - d) : VecU{};
        store(to.data + r / 2 * to.stride + d, (VecF)(a | b));
      }
    }
  }
}

// In-register transpose: swaps the off-diagonal quarters of ever smaller squares.
template <int Half>
inline void transpose_stage(VecF* x) {
  VecI low;
  VecI high;
  for (int i = 0; i < kWidth; ++i) {
    low[i] = (i & Half) ? kWidth + i - Half : i;
    high[i] = (i & Half) ? kWidth + i : i + Half;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & Half) continue;
    const VecF a = x[i];
    const VecF b = x[i + Half];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + Half] = __builtin_shuffle(a, b, high);
  }
  if constexpr (Half > 1) transpose_stage<Half / 2>(x);
}

// Operand B of a product over head_dim: to[d, r] = source[r, d], d counting elements; columns from
// `rows` up to whole vectors are 0.
template <class T>
void pack_transposed(const T* source, int64_t stride, int64_t rows, int64_t head_dim,
                     const uint8_t* live, Rows to) {
  const int64_t elements = depth_elements<T>(head_dim);
  for (int64_t r = 0; r < rows; r += kW) {
    for (int64_t e = 0; e < elements; e += kW) {
      const int64_t d = e * (kStep<T> / kW);
      VecF x[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kW; ++i) {
        const bool use = r + i < rows && (live == nullptr || live[r + i]);
        x[i] = use ? load_depth(source + (r + i) * stride + d, head_dim - d) : zero();
      }
      transpose_stage<kWidth / 2>(x);
      const int64_t n = smaller(kW, elements - e);
      for (int64_t i = 0; i < n; ++i) store(to.data + (e + i) * to.stride + r, x[i]);
    }
  }
}

template <class T>
inline void store_row(T* to, const float* from, int64_t n, float factor) {
  for (int64_t d = 0; d < n; d += kW) {
    const VecF x = load(from + d) * factor;
    if (n - d >= kW) {
      store(to + d, x);
    } else {
      store_partial(to + d, x, n - d);
    }
  }
}

template <class T>
void zero_rows(const AttentionTensor& t, int64_t row, int64_t rows, int64_t heads,
               int64_t head_dim) {
  for (int64_t r = row; r < row + rows; ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      std::memset(static_cast<T*>(t.data) + r * t.token_stride + h * t.head_stride, 0,
                  static_cast<size_t>(head_dim) * sizeof(T));
    }
  }
}

// Parts of one thread's scratch memory, each on a cache line of its own.
class Arena {
 public:
  template <class T>
  size_t add(int64_t count) {
    const size_t at = size_;
    size_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }
  void allocate() { base_ = static_cast<char*>(thread_scratch(size_ + 64)); }
  template <class T>
  T* get(size_t at) const {
    return reinterpret_cast<T*>(base_ + at);
  }

 private:
  size_t size_ = 0;
  char* base_ = nullptr;
};

// ---- Rows of scores ----------------------------------------------------------------------------

// The score of W keys, -inf where the query may not attend to them.
struct ScoreRow {
  const float* scores;  // before scaling
  float scale;
  const float* addend;  // null, or bias, and -inf where masked
  int64_t limit;        // keys from there on are masked

  VecF operator()(int64_t j) const {
    VecF x = load(scores + j) * scale;
    if (addend != nullptr) {
      const VecF add = load(addend + j);
      x = select(add == -kInfinity, add, x + add);
    }
    if (j + kW > limit) {
      VecI lane;
      for (int i = 0; i < kWidth; ++i) lane[i] = i;
      x = select(lane < static_cast<int32_t>(limit - j), x, broadcast(-kInfinity));
    }
    return x;
  }
};

// Masks and bias of one (sequence, head): what ScoreRow adds.
struct Addend {
  const uint8_t* mask;
  const float* bias;
  int64_t mask_query, mask_key, bias_query, bias_key;

  bool any() const { return mask != nullptr || bias != nullptr; }

  void fill(int64_t query, int64_t key, int64_t keys, float* to) const {
    const uint8_t* m = mask == nullptr ? nullptr : mask + query * mask_query + key * mask_key;
    const float* b = bias == nullptr ? nullptr : bias + query * bias_query + key * bias_key;
    for (int64_t j = 0; j < keys; ++j) to[j] = b == nullptr ? 0.0f : b[j * bias_key];
    if (m == nullptr) return;
    for (int64_t j = 0; j < keys; ++j) to[j] = m[j * mask_key] ? to[j] : -kInfinity;
  }
};

// ---- One sequence and one key/value head -------------------------------------------------------

struct Sequence {
  int64_t batch;
  int64_t query_row, queries;  // first row of the tensors (within the batch entry if padded)
  int64_t key_row, keys;
  int64_t token;  // of the first query, in the numbering of dropout
};

Sequence sequence_of(const AttentionArgs& a, int64_t b) {
  if (a.cu_seqlens_q != nullptr) {
    const int64_t q = a.cu_seqlens_q[b];
    const int64_t k = a.cu_seqlens_k[b];
    return {0, q, a.cu_seqlens_q[b + 1] - q, k, a.cu_seqlens_k[b + 1] - k, q};
  }
  const int64_t keys = a.key_lengths == nullptr ? a.key_length : a.key_lengths[b];
  return {b, 0, a.query_length, 0, keys, b * a.query_length};
}

template <class T>
inline T* at(const AttentionTensor& t, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + token * t.token_stride +
         head * t.head_stride;
}

// Of one head, by query.
struct Statistics {
  float* maximum;
  float* inverse_sum;
};

Statistics statistics_of(const AttentionArgs& a, const Sequence& s, int64_t head) {
  if (a.statistics == nullptr) return {};
  const int64_t entries = a.cu_seqlens_q == nullptr ? a.batch : 1;
  float* p = a.statistics + (s.batch * a.heads + head) * a.query_length + s.query_row;
  return {p, p + entries * a.heads * a.query_length};
}

Addend addend_of(const AttentionArgs& a, int64_t b, int64_t head) {
  Addend result{};
  if (a.mask != nullptr) {
    result.mask = a.mask + b * a.mask_strides[0] + head * a.mask_strides[1];
    result.mask_query = a.mask_strides[2];
    result.mask_key = a.mask_strides[3];
  }
  if (a.bias != nullptr) {
    result.bias = a.bias + b * a.bias_strides[0] + head * a.bias_strides[1];
    result.bias_query = a.bias_strides[2];
    result.bias_key = a.bias_strides[3];
  }
  return result;
}

// live[j] = whether any query of the group may attend to key k0 + j. What no query may attend to
// must be packed as 0: a weight of 0 times NaN would be NaN.
void find_live_keys(const AttentionArgs& a, const Sequence& s, int64_t kv_head, int64_t k0,
                    int64_t keys, float* row, uint8_t* live) {
  const int64_t group = a.heads / a.kv_heads;
  std::memset(live, 0, static_cast<size_t>(keys));
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const Addend addend = addend_of(a, s.batch, h);
    for (int64_t i = 0; i < s.queries; ++i) {
      const int64_t n = a.causal ? smaller(keys, i + 1 - k0) : keys;
      if (n <= 0) continue;
      addend.fill(i, k0, n, row);
      for (int64_t j = 0; j < n; ++j) live[j] |= row[j] != -kInfinity;
    }
  }
}

// Dropout of one row of weights.
struct RowDropout {
  const Dropout& dropout;
  uint32_t row;
  int64_t first_key;  // a multiple of 64
  uint64_t bits = 0;

  // To be called for each j in ascending order, a multiple of kW.
  VecF operator()(VecF x, int64_t j) {
    if (j % 64 == 0) bits = keep_bits(dropout, row, static_cast<uint32_t>((first_key + j) / 64));
    return keep(x, bits, static_cast<int>(j % 64));
  }
};

// Operand A of a product over the keys is written over the row of scores it is made from: as
// float32, or as bfloat16 into the first half.
template <class T>
inline void store_depth(float* row, int64_t j, VecF x) {
  if constexpr (kPairs<T>) {
    store(reinterpret_cast<T*>(row) + j, x);
  } else {
    store(row + j, x);
  }
}

// Writes e^(score - maximum) over the scores, dropped where dropout is on, 0 from the limit to
// `end`, and returns their sum before dropout.
template <class T>
inline VecF exponentials(const ScoreRow& score, float maximum, int64_t end, RowDropout* dropout,
                         float* to) {
  VecF sum = zero();
  int64_t j = 0;
  for (; j < score.limit; j += kW) {
    const VecF p = exp(score(j) - maximum);
    store_depth<T>(to, j, dropout == nullptr ? p : (*dropout)(p, j));
    sum += p;
  }
  for (; j < end; j += kW) store_depth<T>(to, j, zero());
  return sum;
}

template <class T>
void forward_task(const AttentionArgs& a, int64_t b, int64_t kv_head, int64_t query_block) {
  const Sequence s = sequence_of(a, b);
  const int64_t q0 = query_block * kForwardQueries;
  if (q0 >= s.queries) return;
  const int64_t queries = smaller(kForwardQueries, s.queries - q0);
  const int64_t keys = a.causal ? smaller(s.keys, q0 + queries) : s.keys;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t head_dim = a.head_dim;
  const int64_t row_size = round_up(head_dim);
  const int64_t query_size = round_up(depth_elements<T>(head_dim));
  const int64_t block = smaller(kKeyBlock, round_up(keys));
  const int64_t score_rows = a.causal ? kForwardRowsCausal : kForwardRows;
  const bool masked = a.mask != nullptr || a.bias != nullptr;

  Arena arena;
  const size_t at_key = arena.add<float>(row_size * block);
  const size_t at_value = arena.add<float>(row_size * block);
  const size_t at_scores = arena.add<float>(score_rows * block);
  const size_t at_query = arena.add<float>(group * queries * query_size);
  const size_t at_out = arena.add<float>(group * queries * row_size);
  const size_t at_max = arena.add<float>(round_up(group * queries));
  const size_t at_sum = arena.add<float>(round_up(group * queries));
  const size_t at_addend = arena.add<float>(kKeyBlock);
  const size_t at_live = arena.add<uint8_t>(kKeyBlock);
  arena.allocate();
  float* scores = arena.get<float>(at_scores);
  float* packed_query = arena.get<float>(at_query);
  float* out = arena.get<float>(at_out);
  float* maximum = arena.get<float>(at_max);
  float* sum = arena.get<float>(at_sum);
  float* addend_row = arena.get<float>(at_addend);
  uint8_t* live = arena.get<uint8_t>(at_live);
  const Rows packed_key{arena.get<float>(at_key), block};
  const Rows packed_value{arena.get<float>(at_value), row_size};

  for (int64_t g = 0; g < group; ++g) {
    pack_rows(at<const T>(a.query, s.batch, s.query_row + q0, kv_head * group + g),
              a.query.token_stride, queries, head_dim, nullptr,
              {packed_query + g * queries * query_size, query_size});
  }
  for (int64_t i = 0; i < round_up(group * queries); ++i) {
    maximum[i] = -kInfinity;
    sum[i] = 0.0f;
  }

  for (int64_t k0 = 0; k0 < keys; k0 += kKeyBlock) {
    const int64_t n = smaller(kKeyBlock, keys - k0);
    if (masked) find_live_keys(a, s, kv_head, k0, n, addend_row, live);
    const uint8_t* use = masked ? live : nullptr;
    pack_transposed(at<const T>(a.key, s.batch, s.key_row + k0, kv_head), a.key.token_stride, n,
                    head_dim, use, packed_key);
    pack_depth(at<const T>(a.value, s.batch, s.key_row + k0, kv_head), a.value.token_stride, n,
               head_dim, use, packed_value);

    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = kv_head * group + g;
      const Addend addend = addend_of(a, s.batch, head);
      for (int64_t r0 = 0; r0 < queries; r0 += score_rows) {
        const int64_t rows = smaller(score_rows, queries - r0);
        const int64_t diagonal = q0 + r0 - k0;
        const int64_t columns = a.causal ? smaller(n, diagonal + rows) : n;
        if (columns <= 0) continue;
        const int64_t end = round_up(columns);
        const int64_t first = g * queries + r0;
        float* out_rows = out + first * row_size;
        product<T>(a.causal ? Band::kColumns : Band::kFull, diagonal, false, rows, vectors(columns),
                   head_dim, {packed_query + first * query_size, query_size, 1}, packed_key,
                   {scores, block});

        for (int64_t r = 0; r < rows; ++r) {
          float* row = scores + r * block;
          const int64_t query = q0 + r0 + r;
          const int64_t limit = a.causal ? larger(0, smaller(n, diagonal + r + 1)) : n;
          if (addend.any()) addend.fill(query, k0, n, addend_row);
          const ScoreRow score{row, a.scale, addend.any() ? addend_row : nullptr, limit};
          VecF most = broadcast(-kInfinity);
          for (int64_t j = 0; j < limit; j += kW) most = max(score(j), most);
          const float before = maximum[first + r];
          float now = reduce_max(most);
          now = now > before ? now : before;
          maximum[first + r] = now;
          // A row without any key so far: its exponentials must be 0, not e^(-inf + inf).
          RowDropout dropout{a.dropout, static_cast<uint32_t>((s.token + query) * a.heads + head),
                             k0};
          const VecF row_sum = exponentials<T>(score, now == -kInfinity ? 0.0f : now, end,
                                               a.dropout.threshold == 0 ? nullptr : &dropout, row);
          float factor = 1.0f;
          if (k0 > 0 && now != before) {
            factor = exp(broadcast(before - now))[0];
            float* o = out_rows + r * row_size;
            for (int64_t d = 0; d < row_size; d += kW) store(o + d, load(o + d) * factor);
          }
          sum[first + r] = sum[first + r] * factor + reduce_add(row_sum);
        }
        product<T>(a.causal ? Band::kDepthTo : Band::kFull, diagonal, k0 > 0, rows, row_size / kW,
                   columns, {scores, block, 1}, packed_value, {out_rows, row_size});
      }
    }
  }

  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = kv_head * group + g;
    const Statistics statistics = statistics_of(a, s, head);
    for (int64_t r = 0; r < queries; ++r) {
      const int64_t i = g * queries + r;
      T* to = at<T>(a.out, s.batch, s.query_row + q0 + r, head);
      const bool dead = sum[i] == 0.0f;
      const float inverse = dead ? 0.0f : 1.0f / sum[i];
      if (a.statistics != nullptr) {
        statistics.maximum[q0 + r] = dead ? 0.0f : maximum[i];
        statistics.inverse_sum[q0 + r] = inverse;
      }
      if (dead) {
        std::memset(to, 0, static_cast<size_t>(head_dim) * sizeof(T));
      } else {
        store_row(to, out + i * row_size, head_dim, a.dropout.scale * inverse);
      }
    }
  }
}

// ---- Backward ----------------------------------------------------------------------------------

struct BackwardTask {
  int64_t batch;
  int64_t first_head, heads;  // query heads, all of one key/value head
  int64_t first_query, queries;
  int64_t first_key, keys;
  bool grad_query, grad_key_value, grad_bias;
};

// With P the weights, dropped those after dropout and D the keep factor of dropout:
//   dV = dropped^T dO,  dP = D * (dO V^T),  dS = P * (dP - rowsum(dO * O)),
//   dQ = scale dS K,    dK = scale dS^T Q,  dBias = dS.
template <class T>
void backward_task(const AttentionBackwardArgs& a, const BackwardTask& task) {
  Sequence s = sequence_of(a, task.batch);
  const int64_t kv_head = task.first_head / (a.heads / a.kv_heads);
  const int64_t q_end = smaller(task.first_query + task.queries, s.queries);
  const int64_t k_end = smaller(task.first_key + task.keys, s.keys);
  const int64_t head_dim = a.head_dim;
  const int64_t row_size = round_up(head_dim);
  const int64_t queries = larger(0, q_end - task.first_query);
  const int64_t block = smaller(kKeyBlock, round_up(larger(1, k_end - task.first_key)));
  const int64_t tile_rows = smaller(kBackwardRows, larger(1, queries));
  const bool masked = a.mask != nullptr || a.bias != nullptr;
  const bool dropout = a.dropout.threshold != 0;
  // With all keys of a query at hand, rowsum(dO * O) is taken as rowsum(P * dP): the same number,
  // but the rounding errors of P and dP cancel, and so does that of O in bfloat16.
  const bool all_keys = task.first_key == 0 && s.keys <= smaller(task.keys, kKeyBlock);
  const Band scores_band = a.causal ? Band::kColumns : Band::kFull;

  // Where a product runs over the queries, its pairs are those of two rows: other copies are needed
  // than for the products over head_dim and over the keys.
  const int64_t query_size = round_up(depth_elements<T>(head_dim));
  const int64_t paired_rows = kPairs<T> ? (tile_rows + 1) / 2 : 0;
  Arena arena;
  const size_t at_key = arena.add<float>(row_size * block);
  const size_t at_key_rows = arena.add<float>(row_size * block);
  const size_t at_value = arena.add<float>(row_size * block);
  const size_t at_grad_key = arena.add<float>(row_size * block);
  const size_t at_grad_value = arena.add<float>(row_size * block);
  const size_t at_query = arena.add<float>(query_size * tile_rows);
  const size_t at_grad_out = arena.add<float>(query_size * tile_rows);
  const size_t at_weights = arena.add<float>(tile_rows * block);
  const size_t at_grad_scores = arena.add<float>(tile_rows * block);
  const size_t at_query_pairs = arena.add<float>(paired_rows * row_size);
  const size_t at_grad_out_pairs = arena.add<float>(paired_rows * row_size);
  const size_t at_weights_pairs = arena.add<float>(paired_rows * block);
  const size_t at_grad_scores_pairs = arena.add<float>(paired_rows * block);
  const size_t at_delta = arena.add<float>(tile_rows);
  const size_t at_addend = arena.add<float>(kKeyBlock);
  const size_t at_live_keys = arena.add<uint8_t>(kKeyBlock);
  const size_t at_live_queries = arena.add<uint8_t>(tile_rows);
  const size_t at_grad_query =
      arena.add<float>(task.grad_query ? task.heads * queries * row_size : 0);
  arena.allocate();
  float* delta = arena.get<float>(at_delta);
  float* addend_row = arena.get<float>(at_addend);
  uint8_t* live_keys = arena.get<uint8_t>(at_live_keys);
  uint8_t* live_queries = arena.get<uint8_t>(at_live_queries);
  float* grad_query = arena.get<float>(at_grad_query);
  const Rows key{arena.get<float>(at_key), block};
  const Rows key_rows{arena.get<float>(at_key_rows), row_size};
  const Rows value{arena.get<float>(at_value), block};
  const Rows grad_key{arena.get<float>(at_grad_key), row_size};
  const Rows grad_value{arena.get<float>(at_grad_value), row_size};
  const Rows query{arena.get<float>(at_query), query_size};
  const Rows grad_out{arena.get<float>(at_grad_out), query_size};
  const Rows weights{arena.get<float>(at_weights), block};
  const Rows grad_scores{arena.get<float>(at_grad_scores), block};
  const bool pairs = kPairs<T>;
  const Rows query_depth = pairs ? Rows{arena.get<float>(at_query_pairs), row_size} : query;
  const Rows grad_out_depth =
      pairs ? Rows{arena.get<float>(at_grad_out_pairs), row_size} : grad_out;
  const Rows weights_depth = pairs ? Rows{arena.get<float>(at_weights_pairs), block} : weights;
  const Rows grad_scores_depth =
      pairs ? Rows{arena.get<float>(at_grad_scores_pairs), block} : grad_scores;

  bool first_block = true;
  for (int64_t k0 = task.first_key; k0 < k_end; k0 += kKeyBlock) {
    // Queries before this one see none of these keys.
    const int64_t q_begin = a.causal ? larger(task.first_query, k0) : task.first_query;
    const int64_t n = smaller(kKeyBlock, k_end - k0);
    if (q_begin < q_end) {
      if (masked) find_live_keys(a, s, kv_head, k0, n, addend_row, live_keys);
      const uint8_t* use = masked ? live_keys : nullptr;
      const T* k_rows = at<const T>(a.key, s.batch, s.key_row + k0, kv_head);
      const T* v_rows = at<const T>(a.value, s.batch, s.key_row + k0, kv_head);
      pack_transposed(k_rows, a.key.token_stride, n, head_dim, use, key);
      pack_transposed(v_rows, a.value.token_stride, n, head_dim, use, value);
      if (task.grad_query) {
        pack_depth(k_rows, a.key.token_stride, n, head_dim, use, key_rows);
      }
    }
    bool first_tile = true;
    for (int64_t h = 0; h < task.heads; ++h) {
      const int64_t head = task.first_head + h;
      const Addend addend = addend_of(a, s.batch, head);
      const Statistics statistics = statistics_of(a, s, head);
      for (int64_t r0 = q_begin; r0 < q_end; r0 += kBackwardRows) {
        const int64_t rows = smaller(kBackwardRows, q_end - r0);
        const int64_t diagonal = r0 - k0;
        const int64_t columns = a.causal ? smaller(n, diagonal + rows) : n;
        const int64_t end = round_up(columns);

        for (int64_t r = 0; r < rows; ++r) live_queries[r] = statistics.inverse_sum[r0 + r] != 0.0f;
        const T* query_rows = at<const T>(a.query, s.batch, s.query_row + r0, head);
        const T* grad_rows = at<const T>(a.grad_out, s.batch, s.query_row + r0, head);
        const T* out_rows = at<const T>(a.out, s.batch, s.query_row + r0, head);
        pack_rows(query_rows, a.query.token_stride, rows, head_dim, live_queries, query);
        pack_rows(grad_rows, a.grad_out.token_stride, rows, head_dim, live_queries, grad_out);
        if (pairs && task.grad_key_value) {
          pack_depth(query_rows, a.query.token_stride, rows, head_dim, live_queries, query_depth);
          pack_depth(grad_rows, a.grad_out.token_stride, rows, head_dim, live_queries,
                     grad_out_depth);
        }
        for (int64_t r = 0; r < rows && !all_keys; ++r) {
          VecF dot = zero();
          for (int64_t d = 0; d < head_dim; d += kW) {
            dot += load_first(grad_rows + r * a.grad_out.token_stride + d, head_dim - d) *
                   load_first(out_rows + r * a.out.token_stride + d, head_dim - d);
          }
          delta[r] = live_queries[r] ? reduce_add(dot) : 0.0f;
        }

        product<T>(scores_band, diagonal, false, rows, vectors(columns), head_dim,
                   {query.data, query_size, 1}, key, weights);
        product<T>(scores_band, diagonal, false, rows, vectors(columns), head_dim,
                   {grad_out.data, query_size, 1}, value, grad_scores);
        for (int64_t r = 0; r < rows; ++r) {
          float* p_row = weights.data + r * block;
          float* g_row = grad_scores.data + r * block;
          const int64_t limit = a.causal ? larger(0, smaller(n, diagonal + r + 1)) : n;
          if (addend.any()) addend.fill(r0 + r, k0, n, addend_row);
          const ScoreRow score{p_row, a.scale, addend.any() ? addend_row : nullptr, limit};
          const float maximum = statistics.maximum[r0 + r];
          const float inverse_sum = statistics.inverse_sum[r0 + r];
          uint64_t bits[kKeyBlock / 64];
          RowDropout row_dropout{a.dropout,
                                 static_cast<uint32_t>((s.token + r0 + r) * a.heads + head), k0};
          VecF dot = zero();
          int64_t j = 0;
          for (; j < limit; j += kW) {
            const VecF p = exp(score(j) - maximum) * inverse_sum;
            VecF g = load(g_row + j);
            if (dropout) {
              g = row_dropout(g * a.dropout.scale, j);
              bits[j / 64] = row_dropout.bits;
              store(g_row + j, g);
            }
            store(p_row + j, p);
            dot += p * g;
          }
          const float row_delta = all_keys ? reduce_add(dot) : delta[r];
          for (j = 0; j < limit; j += kW) {
            const VecF p = load(p_row + j);
            const VecF g = p * (load(g_row + j) - row_delta);
            if (task.grad_bias) store(addend_row + j, g);
            store_depth<T>(g_row, j, g);
            store_depth<T>(
                p_row, j,
                dropout ? keep(p * a.dropout.scale, bits[j / 64], static_cast<int>(j % 64)) : p);
          }
          for (; j < end; j += kW) {
            store_depth<T>(p_row, j, zero());
            store_depth<T>(g_row, j, zero());
          }
          if (task.grad_bias) {
            float* to = a.grad_bias + task.batch * a.bias_strides[0] + head * a.bias_strides[1] +
                        (r0 + r) * a.bias_strides[2] + k0 * a.bias_strides[3];
            for (int64_t c = 0; c < limit; ++c) to[c * a.bias_strides[3]] += addend_row[c];
          }
        }
        if (task.grad_key_value) {
          // These queries see the first `columns` keys only.
          if (first_tile && columns < n) {
            const size_t bytes = static_cast<size_t>((n - columns) * row_size) * sizeof(float);
            std::memset(grad_value.data + columns * row_size, 0, bytes);
            std::memset(grad_key.data + columns * row_size, 0, bytes);
          }
          if constexpr (kPairs<T>) {
            const T* p = reinterpret_cast<const T*>(weights.data);
            const T* g = reinterpret_cast<const T*>(grad_scores.data);
            pack_depth(p, 2 * block, rows, end, nullptr, weights_depth);
            pack_depth(g, 2 * block, rows, end, nullptr, grad_scores_depth);
          }
          const Band band = a.causal ? Band::kDepthFrom : Band::kFull;
          product<T>(band, diagonal, !first_tile, columns, row_size / kW, rows,
                     {weights_depth.data, 1, block}, grad_out_depth, grad_value);
          product<T>(band, diagonal, !first_tile, columns, row_size / kW, rows,
                     {grad_scores_depth.data, 1, block}, query_depth, grad_key);
        }
        if (task.grad_query) {
          const int64_t row = h * queries + r0 - task.first_query;
          product<T>(a.causal ? Band::kDepthTo : Band::kFull, diagonal, !first_block, rows,
                     row_size / kW, columns, {grad_scores.data, block, 1}, key_rows,
                     {grad_query + row * row_size, row_size});
        }
        first_tile = false;
      }
    }
    if (task.grad_key_value) {
      for (int64_t r = 0; r < n; ++r) {
        T* to_key = at<T>(a.grad_key, s.batch, s.key_row + k0 + r, kv_head);
        T* to_value = at<T>(a.grad_value, s.batch, s.key_row + k0 + r, kv_head);
        if (first_tile) {
          std::memset(to_key, 0, static_cast<size_t>(head_dim) * sizeof(T));
          std::memset(to_value, 0, static_cast<size_t>(head_dim) * sizeof(T));
        } else {
          store_row(to_key, grad_key.data + r * row_size, head_dim, a.scale);
          store_row(to_value, grad_value.data + r * row_size, head_dim, 1.0f);
        }
      }
    }
    first_block = false;
  }

  if (task.grad_query) {
    for (int64_t h = 0; h < task.heads; ++h) {
      for (int64_t r = 0; r < queries; ++r) {
        T* to =
            at<T>(a.grad_query, s.batch, s.query_row + task.first_query + r, task.first_head + h);
        if (first_block) {
          std::memset(to, 0, static_cast<size_t>(head_dim) * sizeof(T));
        } else {
          store_row(to, grad_query + (h * queries + r) * row_size, head_dim, a.scale);
        }
      }
    }
  }
}

// ---- The work cut into tasks -------------------------------------------------------------------

// Rows behind the last sequence, or the keys behind their length.
template <class T>
void zero_slack(const AttentionArgs& a, const AttentionTensor& t, bool is_query, int64_t heads) {
  const int32_t* ends = is_query ? a.cu_seqlens_q : a.cu_seqlens_k;
  const int64_t length = is_query ? a.query_length : a.key_length;
  if (ends != nullptr) {
    zero_rows<T>(t, ends[a.batch], length - ends[a.batch], heads, a.head_dim);
    return;
  }
  if (is_query || a.key_lengths == nullptr) return;
  for (int64_t b = 0; b < a.batch; ++b) {
    AttentionTensor entry = t;
    entry.data = static_cast<T*>(t.data) + b * t.batch_stride;
    zero_rows<T>(entry, a.key_lengths[b], length - a.key_lengths[b], heads, a.head_dim);
  }
}

template <class T>
void forward_of(const AttentionArgs& a, Parallel& parallel) {
  const int64_t blocks = (a.max_query_length + kForwardQueries - 1) / kForwardQueries;
  zero_slack<T>(a, a.out, true, a.heads);
  parallel.for_each(a.batch * a.kv_heads * blocks, [&](int64_t i) {
    const int64_t block = i % blocks;
    const int64_t unit = i / blocks;
    forward_task<T>(a, unit / a.kv_heads, unit % a.kv_heads, block);
  });
}

template <class T>
void backward_of(const AttentionBackwardArgs& a, Parallel& parallel) {
  const int64_t units = a.batch * a.kv_heads;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t longest = larger(a.max_query_length, a.max_key_length);
  zero_slack<T>(a, a.grad_query, true, a.heads);
  zero_slack<T>(a, a.grad_key, false, a.kv_heads);
  zero_slack<T>(a, a.grad_value, false, a.kv_heads);

  // Enough (sequence, head) pairs to share out, or too short to share: one task writes all three
  // gradients of a pair. Else one pass over blocks of keys and one over blocks of queries, which
  // computes the weights twice (7 products instead of 5).
  constexpr int64_t kEnoughTasks = 16;
  constexpr int64_t kShort = 512;
  if (units >= kEnoughTasks || longest <= kShort) {
    parallel.for_each(units, [&](int64_t i) {
      const int64_t b = i / a.kv_heads;
      backward_task<T>(a, {b, i % a.kv_heads * group, group, 0, a.max_query_length, 0,
                           a.max_key_length, true, true, false});
    });
  } else {
    const int64_t key_blocks = (a.max_key_length + kKeyBlock - 1) / kKeyBlock;
    const int64_t query_blocks = (a.max_query_length + kForwardQueries - 1) / kForwardQueries;
    parallel.for_each(units * (key_blocks + query_blocks), [&](int64_t i) {
      const int64_t unit = i / (key_blocks + query_blocks);
      const int64_t block = i % (key_blocks + query_blocks);
      const int64_t b = unit / a.kv_heads;
      const int64_t head = unit % a.kv_heads * group;
      if (block < key_blocks) {
        backward_task<T>(a, {b, head, group, 0, a.max_query_length, block * kKeyBlock, kKeyBlock,
                             false, true, false});
      } else {
        backward_task<T>(a, {b, head, group, (block - key_blocks) * kForwardQueries,
                             kForwardQueries, 0, a.max_key_length, true, false, false});
      }
    });
  }

  if (a.grad_bias == nullptr) return;
  // One task for each element of the gradient's batch and head axes: it alone adds to that part,
  // in ascending order.
  const int64_t bias_batch = a.bias_strides[0] == 0 ? 1 : a.batch;
  const int64_t bias_heads = a.bias_strides[1] == 0 ? 1 : a.heads;
  parallel.for_each(bias_batch * bias_heads, [&](int64_t i) {
    const int64_t b0 = i / bias_heads;
    const int64_t h0 = i % bias_heads;
    for (int64_t b = b0; b < a.batch; b += bias_batch) {
      for (int64_t h = h0; h < a.heads; h += bias_heads) {
        backward_task<T>(a,
                         {b, h, 1, 0, a.max_query_length, 0, a.max_key_length, false, false, true});
      }
    }
  });
}

void forward(const AttentionArgs& a, Parallel& parallel) {
  if (a.bfloat16) {
    forward_of<struct bfloat16>(a, parallel);
  } else {
    forward_of<float>(a, parallel);
  }
}

void backward(const AttentionBackwardArgs& a, Parallel& parallel) {
  if (a.bfloat16) {
    backward_of<struct bfloat16>(a, parallel);
  } else {
    backward_of<float>(a, parallel);
  }
}

}  // namespace

extern const AttentionKernels attention_kernels = {forward, backward};

}  // namespace transformer_ext::TRANSFORMER_EXT_ISA
