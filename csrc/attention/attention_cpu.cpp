#include "attention/attention.h"
#include "common/simd.h"
#include "dropout/philox_simd.h"

namespace transformer_ext::TRANSFORMER_EXT_ISA {
namespace {

// Scores lie transposed, [key][query]: lanes are queries. So maximum, sum and delta of a query need
// no sum across lanes, and of two factors of a product only the one with lanes (queries, or
// gradients of outputs) is transposed, by blocks in registers.

constexpr int64_t kW = kWidth;
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

// A tile of scores.
constexpr int64_t kKeyBlock = 128;
constexpr int64_t kQueryBlock = 64;
// Its rows are an odd number of cache lines apart: a column of it then lies in all sets of the
// first-level cache.
constexpr int64_t kTileStride = kQueryBlock + 16;
// Factors of which single numbers are broadcast lie in slabs of so many elements of the depth.
constexpr int64_t kSlab = 64;
// Queries for which one forward task packs keys and values once.
constexpr int64_t kForwardQueries = 256;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return larger(low, smaller(x, high)); }
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

// Accumulators of a panel: rows x vectors, bound by the number of registers. With fewer vectors
// more rows hide the latency of the multiply-adds.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
constexpr int panel_rows(int columns) {
  return columns == 4 ? 6 : columns == 3 ? 8 : columns == 2 ? 12 : 16;
}
#else
constexpr int kMaxVectors = 2;
constexpr int panel_rows(int columns) { return columns == 2 ? 6 : 12; }
#endif

// Where A has its element (row, depth). The strides are constants: with strides in registers there
// are not enough of these for the addresses of a panel's rows.
template <int64_t Row, int64_t Depth>
struct Layout {
  static constexpr int64_t row = Row;
  static constexpr int64_t depth = Depth;
};
constexpr int kMaxRows = 16;

using Slabs = Layout<kSlab, 1>;              // keys or values, for scores
using TileRows = Layout<kTileStride, 1>;     // a row of C for each key of a tile
using TileColumns = Layout<1, kTileStride>;  // a row of C for each query of a tile

// What becomes of the accumulators.
template <class T>
struct Result {
  float* data;  // [m, stride], as float32
  int64_t stride;
  bool add = false;                // the accumulators begin as what is there,
  const float* factors = nullptr;  // times a factor of each row if not null
  // If not null, the result goes here and not back to `data`, multiplied by a factor, or by one
  // for each row: factor 0 gives 0, whatever it multiplies.
  T* out = nullptr;
  int64_t out_stride = 0;
  int64_t out_columns = 0;
  float out_factor = 1.0f;
  const float* out_factors = nullptr;

  Result at(int64_t r, int64_t column) const {
    Result x = *this;
    x.data += r * stride + column;
    if (factors != nullptr) x.factors += r;
    if (out != nullptr) x.out += r * out_stride + column;
    if (out_factors != nullptr) x.out_factors += r;
    x.out_columns -= column;
    return x;
  }
};

template <class T, class A, int R, int C>
void panel(int64_t depth, const float* a, const float* b, int64_t b_stride, const Result<T>& to) {
  VecF sum[R][C];
  if (to.add) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const VecF factor = broadcast(to.factors == nullptr ? 1.0f : to.factors[r]);
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] = load(to.data + r * to.stride + v * kW) * factor;
    }
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] = zero();
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    VecF x[C];
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) x[v] = load(b + v * kW);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const VecF y = broadcast(a[r * A::row]);
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] = multiply_add<T>(y, x[v], sum[r][v]);
    }
    a += A::depth;
    b += b_stride;
  }
  if (to.out == nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) store(to.data + r * to.stride + v * kW, sum[r][v]);
    }
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const float factor = to.out_factors == nullptr ? to.out_factor : to.out_factors[r];
    T* out = to.out + r * to.out_stride;
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) {
      const VecF x = factor == 0.0f ? zero() : sum[r][v] * factor;
      if (to.out_columns >= (v + 1) * kW) {
        store(out + v * kW, x);
      } else {
        store_partial(out + v * kW, x, larger(0, to.out_columns - v * kW));
      }
    }
  }
}

template <class T, class A, int C, int R = panel_rows(C)>
inline void panel_of(int64_t rows, int64_t depth, const float* a, const float* b, int64_t b_stride,
                     const Result<T>& to) {
  if constexpr (R > 1) {
    if (rows < R) return panel_of<T, A, C, R - 1>(rows, depth, a, b, b_stride, to);
  }
  panel<T, A, R, C>(depth, a, b, b_stride, to);
}

// rows <= panel_rows(columns)
template <class T, class A>
inline void panel_of(int64_t columns, int64_t rows, int64_t depth, const float* a, const float* b,
                     int64_t b_stride, const Result<T>& to) {
  switch (columns) {
    case 1:
      return panel_of<T, A, 1>(rows, depth, a, b, b_stride, to);
    case 2:
      return panel_of<T, A, 2>(rows, depth, a, b, b_stride, to);
#if defined(__AVX512F__)
    case 3:
      return panel_of<T, A, 3>(rows, depth, a, b, b_stride, to);
    case 4:
      return panel_of<T, A, 4>(rows, depth, a, b, b_stride, to);
#endif
  }
}

// Fetches the rows of the next head a few at a time between the panels of this one's products: a
// head's part of a row is a few cache lines far from the next, which hardware does not foresee, and
// all at once would wait for each other.
class Ahead {
 public:
  void add(const void* data, int64_t stride_bytes, int64_t row_bytes) {
    tensors_[count_++] = {static_cast<const char*>(data), stride_bytes, row_bytes};
  }
  // `rows` of each tensor in all, `step` of them a call.
  void begin(int64_t rows, int64_t step) {
    left_ = rows;
    step_ = step;
  }
  void fetch() {
    if (left_ > 0) fetch_rows();
  }

 private:
  void fetch_rows() {
    for (int64_t i = 0; i < step_ && left_ > 0; ++i, --left_) {
      for (int t = 0; t < count_; ++t) {
        Tensor& x = tensors_[t];
        for (int64_t byte = 0; byte < x.bytes; byte += 64) __builtin_prefetch(x.next + byte, 0, 2);
        x.next += x.stride;
      }
    }
  }

  struct Tensor {
    const char* next;
    int64_t stride;
    int64_t bytes;
  };
  Tensor tensors_[4];
  int count_ = 0;
  int64_t left_ = 0;
  int64_t step_ = 0;
};

// What causal masking leaves of a product, where query q of a tile may attend to key k of it iff
// k <= q + diagonal.
enum class Band {
  kFull,
  kScores,   // C is [key, query]; outside of the band it is left undefined
  kQueries,  // C is [query, head_dim], the depth keys
  kKeys,     // C is [key, head_dim], the depth queries
};

// n counts vectors. T: what the operands were packed from.
template <class T, class A>
void product(Band band, int64_t diagonal, int64_t m, int64_t n, int64_t depth, const float* a,
             const float* b, int64_t b_stride, const Result<T>& to, Ahead& ahead) {
  const int64_t chunks = (n + kMaxVectors - 1) / kMaxVectors;
  const int64_t chunk = (n + chunks - 1) / chunks;
  for (int64_t v0 = 0; v0 < n; v0 += chunk) {
    const int64_t columns = smaller(chunk, n - v0);
    const int64_t most = panel_rows(static_cast<int>(columns));
    const int64_t panels = (m + most - 1) / most;
    int64_t rows = 0;
    for (int64_t p = 0, r = 0; p < panels; ++p, r += rows) {
      rows = (m - r + panels - p - 1) / (panels - p);
      int64_t begin = 0;
      int64_t end = depth;
      int64_t first = v0;
      if (band == Band::kScores) first = larger(v0, larger(0, r - diagonal) / kW);
      if (first >= v0 + columns) continue;
      ahead.fetch();
      if (band == Band::kQueries) end = clamp(r + rows + diagonal, 0, depth);
      if (band == Band::kKeys) begin = clamp(r - diagonal, 0, depth);
      if (kPairs<T>) begin = begin == end ? depth_elements<T>(end) : begin / 2;
      panel_of<T, A>(v0 + columns - first, rows, depth_elements<T>(end) - begin,
                     a + r * A::row + begin * A::depth, b + begin * b_stride + first * kW, b_stride,
                     to.at(r, first * kW));
    }
  }
}

// ---- Packing: from the caller's tensors into dense float32 rows of whole vectors ---------------

template <class T>
inline VecF load_first(const T* p, int64_t n) {
  return n >= kW ? load(p) : load_partial(p, n);
}

#if defined(__AVX512BF16__)
typedef uint16_t VecH32 __attribute__((vector_size(64)));

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

// Operands are packed into slabs, [slab][row][kSlab]; `slab` is the size of one.

constexpr int64_t slabs_of(int64_t n) { return (n + kSlab - 1) / kSlab; }

template <int Vectors, class T>
inline void copy_rows(const T* source, int64_t stride, int64_t rows, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      store(to + v * kW, load_depth(source + v * kStep<T>, kStep<T>));
    }
    source += stride;
    to += kSlab;
  }
}

// Operand of a product over head_dim, or of one over the rows where there are no pairs.
template <class T>
void pack_slabs(const T* source, int64_t stride, int64_t rows, int64_t head_dim,
                const uint8_t* live, int64_t slab, float* to) {
  constexpr int64_t step = kSlab * kStep<T> / kW;
  for (; head_dim > 0; head_dim -= step, source += step, to += slab) {
    // Half a slab is a head of 64 as pairs.
    const int64_t n = vectors(depth_elements<T>(smaller(step, head_dim)));
    if (live == nullptr && head_dim >= step) {
      copy_rows<kSlab / kW>(source, stride, rows, to);
    } else if (live == nullptr && 2 * head_dim == step) {
      copy_rows<kSlab / kW / 2>(source, stride, rows, to);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        const bool dead = live != nullptr && !live[r];
        for (int64_t v = 0; v < n; ++v) {
          const int64_t d = v * kStep<T>;
          store(to + r * kSlab + v * kW,
                dead ? zero() : load_depth(source + r * stride + d, head_dim - d));
        }
      }
    }
  }
}

// Operand of a product over the rows. Pairs: two rows interleaved.
template <class T>
void pack_depth(const T* source, int64_t stride, int64_t rows, int64_t head_dim,
                const uint8_t* live, int64_t slab, float* to) {
  if constexpr (!kPairs<T>) {
    pack_slabs(source, stride, rows, head_dim, live, slab, to);
  } else {
#if defined(__AVX512BF16__)
    VecH32 first, second;
    for (int i = 0; i < 32; ++i) {
      first[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      second[i] = static_cast<uint16_t>(first[i] + 16);
    }
    for (; head_dim > 0; head_dim -= kSlab, source += kSlab, to += slab) {
      const int64_t n = smaller(kSlab, head_dim);
      for (int64_t r = 0; r < rows; r += 2) {
        const bool use_low = live == nullptr || live[r];
        const bool use_high = r + 1 < rows && (live == nullptr || live[r + 1]);
        const T* low = source + r * stride;
        float* out = to + r / 2 * kSlab;
        for (int64_t d = 0; d < n; d += 2 * kW) {
          const __m512i a = use_low ? (__m512i)load_pairs(low + d, n - d) : __m512i{};
          const __m512i b = use_high ? (__m512i)load_pairs(low + stride + d, n - d) : __m512i{};
          store(out + d, (VecF)_mm512_permutex2var_epi16(a, (__m512i)first, b));
          store(out + d + kW, (VecF)_mm512_permutex2var_epi16(a, (__m512i)second, b));
        }
      }
    }
#endif
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

// Operand with lanes of a product over head_dim: to[d, r] = source[r, d], d counting elements, rows
// kQueryBlock apart; columns from `rows` up to whole vectors are 0.
template <class T>
void pack_transposed(const T* source, int64_t stride, int64_t rows, int64_t head_dim,
                     const uint8_t* live, float* to) {
  const int64_t elements = depth_elements<T>(head_dim);
  for (int64_t r = 0; r < rows; r += kW) {
    for (int64_t e = 0; e < elements; e += kW) {
      const int64_t d = e * (kStep<T> / kW);
      VecF x[kWidth];
      const T* from = source + r * stride + d;
      float* out = to + e * kQueryBlock + r;
      if (live == nullptr && r + kW <= rows && d + kStep<T> <= head_dim) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kW; ++i) x[i] = load_depth(from + i * stride, kStep<T>);
        transpose_stage<kWidth / 2>(x);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kW; ++i) store(out + i * kQueryBlock, x[i]);
        continue;
      }
#pragma GCC unroll 16
      for (int64_t i = 0; i < kW; ++i) {
        const bool use = r + i < rows && (live == nullptr || live[r + i]);
        x[i] = use ? load_depth(from + i * stride, head_dim - d) : zero();
      }
      transpose_stage<kWidth / 2>(x);
      const int64_t n = smaller(kW, elements - e);
      for (int64_t i = 0; i < n; ++i) store(out + i * kQueryBlock, x[i]);
    }
  }
}

// Both operands that queries, or gradients of outputs, become.
template <class T>
void pack_both(const T* source, int64_t stride, int64_t rows, int64_t head_dim, const uint8_t* live,
               int64_t slab, float* depth, float* transposed) {
  pack_depth(source, stride, rows, head_dim, live, slab, depth);
  if constexpr (kPairs<T>) {
    pack_transposed(source, stride, rows, head_dim, live, transposed);
  } else {
    for (int64_t d = 0; d < head_dim; d += kSlab) {
      pack_transposed<float>(depth + d / kSlab * slab, kSlab, rows, smaller(kSlab, head_dim - d),
                             nullptr, transposed + d * kQueryBlock);
    }
  }
}

template <class T>
void zero_head(T* to, int64_t stride, int64_t rows, int64_t head_dim) {
  for (int64_t r = 0; r < rows; ++r) {
    std::memset(to + r * stride, 0, static_cast<size_t>(head_dim) * sizeof(T));
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

// Masks and bias of one (sequence, head).
struct Addend {
  const uint8_t* mask;
  const float* bias;
  int64_t mask_query, mask_key, bias_query, bias_key;

  float operator()(int64_t query, int64_t key) const {
    if (mask != nullptr && !mask[query * mask_query + key * mask_key]) return -kInfinity;
    return bias == nullptr ? 0.0f : bias[query * bias_query + key * bias_key];
  }

  // A tile of what is added to the scores, 0 behind the last query.
  void fill(int64_t query, int64_t queries, int64_t key, int64_t keys, float* tile) const {
    const bool uniform =
        (mask == nullptr || mask_query == 0) && (bias == nullptr || bias_query == 0);
    for (int64_t j = 0; j < keys; ++j) {
      float* to = tile + j * kTileStride;
      if (uniform) {
        const VecF x = broadcast((*this)(0, key + j) * kLog2E);
        for (int64_t i = 0; i < queries; i += kW) store(to + i, x);
      } else {
        for (int64_t i = queries; i < round_up(queries); ++i) to[i] = 0.0f;
        for (int64_t i = 0; i < queries; ++i) to[i] = (*this)(query + i, key + j) * kLog2E;
      }
    }
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

// live[j] = whether any of the queries may attend to key k0 + j. What no query may attend to must
// be packed as 0: a weight of 0 times NaN would be NaN.
void find_live_keys(const AttentionArgs& a, const Sequence& s, int64_t first_head, int64_t heads,
                    int64_t first_query, int64_t last_query, int64_t k0, int64_t keys,
                    uint8_t* live) {
  for (int64_t j = 0; j < keys; ++j) live[j] = 0;
  for (int64_t h = first_head; h < first_head + heads; ++h) {
    const Addend addend = addend_of(a, s.batch, h);
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t first = a.causal ? larger(first_query, k0 + j) : first_query;
      for (int64_t i = first; i < last_query && !live[j]; ++i) {
        live[j] = addend(i, k0 + j) != -kInfinity;
      }
    }
  }
}

// ---- A tile of scores --------------------------------------------------------------------------

inline VecI lanes() {
  VecI lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane;
}

// 2^x for x that is not above 0 (but for rounding), relative error below 1e-7; exactly 0 below
// -126, NaN for NaN. With log2(e) in the scale of the scores, exponentials need a third fewer
// operations than by exp(): no reduction by ln 2, no overflow.
inline VecF exp2_of_negative(VecF x) {
  const VecI too_low = x < -126.0f;
#if defined(__AVX512F__)
  const VecF n = (VecF)_mm512_roundscale_ps((__m512)x, 8);
#elif defined(__AVX2__)
  const VecF n = (VecF)_mm256_round_ps((__m256)x, 8);
#else
  const VecF magic = broadcast(12582912.0f);  // 1.5 * 2^23: see exp()
  const VecF n = (x + magic) - magic;
#endif
  const VecF r = x - n;
  // 1 + r p(r) with the least greatest relative error, 2e-9, over |r| <= 1/2.
  VecF p = broadcast(0.00015353362f);
  p = p * r + 0.0013398874f;
  p = p * r + 0.009618437f;
  p = p * r + 0.055503324f;
  p = p * r + 0.24022648f;
  p = p * r + 0.6931472f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return select(too_low, zero(), (VecF)_mm512_scalef_ps((__m512)p, (__m512)n));
#else
  // Out-of-range lanes must not reach the float-to-int conversion with an undefined value.
  const VecI in_range = ~too_low & (x == x);
  const VecI exponent = __builtin_convertvector(select(in_range, n, zero()), VecI);
  return select(too_low, zero(), p * (VecF)((exponent + 127) << 23));
#endif
}

// Dropout of W queries: the rounds of keep_bits(), but the lanes are rows, because the weights of a
// short row would leave most of its 64 columns unused.
class LaneDropout {
 public:
  // Lane i is row first_row + i * row_step.
  LaneDropout(const Dropout& dropout, uint32_t first_row, uint32_t row_step)
      : dropout_(dropout), first_row_(first_row), row_step_(row_step) {
#if defined(__AVX2__)
    const uint64_t product = static_cast<uint64_t>(kPhiloxMultiplier1) * dropout.step;
    const uint32_t key = static_cast<uint32_t>(product >> 32) ^ dropout.key0;
    for (int half = 0; half < 2; ++half) {
      uint64_t rows[kWidth / 2];
      for (int i = 0; i < kWidth / 2; ++i) {
        rows[i] = first_row + static_cast<uint32_t>(2 * i + half) * row_step;
      }
      PhiloxVec row;
      std::memcpy(&row, rows, sizeof row);
      second_[half] = philox_multiply(kPhiloxMultiplier0, philox_xor(row, philox_broadcast(key)));
    }
#endif
  }

  // The random numbers of columns 8 * block .. 8 * block + 7.
  void draw(uint32_t block) {
#if defined(__AVX2__)
    uint32_t key0 = dropout_.key0;
    uint32_t key1 = dropout_.key1;
    // Of the first two rounds only second_ depends on the row.
    const uint64_t step_product = static_cast<uint64_t>(kPhiloxMultiplier1) * dropout_.step;
    const uint64_t block_product = static_cast<uint64_t>(kPhiloxMultiplier0) * block;
    const uint32_t first2 = static_cast<uint32_t>(block_product >> 32) ^ dropout_.site ^ key1;
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
    const uint64_t second_product = static_cast<uint64_t>(kPhiloxMultiplier1) * first2;
    const uint32_t second0 =
        static_cast<uint32_t>(second_product >> 32) ^ static_cast<uint32_t>(step_product) ^ key0;
    const uint32_t second2 = static_cast<uint32_t>(block_product) ^ key1;
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
    const uint64_t third_product = static_cast<uint64_t>(kPhiloxMultiplier0) * second0;
    PhiloxVec word[2][4];
    for (int half = 0; half < 2; ++half) {
      PhiloxVec product1 = philox_multiply(
          kPhiloxMultiplier1, philox_xor(philox_high(second_[half]), philox_broadcast(second2)));
      PhiloxVec word0 = philox_xor(philox_high(product1),
                                   philox_broadcast(static_cast<uint32_t>(second_product) ^ key0));
      PhiloxVec word1 = product1;
      PhiloxVec word2 = philox_xor(
          second_[half], philox_broadcast(static_cast<uint32_t>(third_product >> 32) ^ key1));
      PhiloxVec word3 = philox_broadcast(static_cast<uint32_t>(third_product));
      uint32_t k0 = key0;
      uint32_t k1 = key1;
      for (int i = 3; i < kPhiloxRounds; ++i) {
        k0 += kPhiloxKeyStep0;
        k1 += kPhiloxKeyStep1;
        const PhiloxVec product0 = philox_multiply(kPhiloxMultiplier0, word0);
        product1 = philox_multiply(kPhiloxMultiplier1, word2);
        word0 = philox_xor(philox_high(product1), word1, philox_broadcast(k0));
        word1 = product1;
        word2 = philox_xor(philox_high(product0), word3, philox_broadcast(k1));
        word3 = product0;
      }
      word[half][0] = word0;
      word[half][1] = word1;
      word[half][2] = word2;
      word[half][3] = word3;
    }
    for (int w = 0; w < 4; ++w) {
#if defined(__AVX512F__)
      words_[w] = (VecU)_mm512_mask_shuffle_epi32(word[0][w], 0xAAAA, word[1][w], _MM_PERM_CCAA);
#else
      words_[w] = (VecU)_mm256_blend_epi32(word[0][w], _mm256_slli_epi64(word[1][w], 32), 0xAA);
#endif
    }
#else
    for (int i = 0; i < kWidth; ++i) {
      const PhiloxWords words =
          dropout_words(dropout_, first_row_ + static_cast<uint32_t>(i) * row_step_, block);
      for (int w = 0; w < 4; ++w) words_[w][i] = words.word[w];
    }
#endif
  }

  // x where the lane keeps column `column`, which lies in the block drawn last; else 0.
  VecF keep(VecF x, int64_t column) const { return select(kept(column), x, zero()); }

  VecI kept(int64_t column) const {
    const VecU word = words_[column / 2 % 4];
    const VecU value = column % 2 == 0 ? word & 0xffffu : word >> 16;
    return (VecI)value >= static_cast<int32_t>(dropout_.threshold);
  }

 private:
  const Dropout& dropout_;
  [[maybe_unused]] uint32_t first_row_;
  [[maybe_unused]] uint32_t row_step_;
  VecU words_[4] = {};
#if defined(__AVX2__)
  PhiloxVec second_[2];
#endif
};

template <int N>
struct Slot {
  static constexpr int value = N;
};

// A tile of scores, of which W queries are looked at.
struct Scores {
  float* data;          // before scaling
  const float* addend;  // null, or a tile of bias times log2(e), and -inf where masked
  float scale;          // times log2(e)
  int64_t keys;
  int64_t rows;  // of the tile, >= keys: the weights of those behind the keys become 0
  bool causal;
  int64_t diagonal;  // query q may attend to key k iff k <= q + diagonal

  // Calls body(slot, key, score) for all keys that one of the W queries may attend to, in ascending
  // order. The slot, 0 to 3, has the parity of the key: the sums of the slots are added up last.
  template <class Body>
  __attribute__((always_inline)) void for_each(int64_t query, Body&& body) const {
    if (addend == nullptr) {
      for_each_of(query, body, [&](int64_t at) __attribute__((always_inline)) {
        return load(data + at) * scale;
      });
    } else {
      for_each_of(query, body, [&](int64_t at) __attribute__((always_inline)) {
        const VecF add = load(addend + at);
        return select(add == -kInfinity, add, load(data + at) * scale + add);
      });
    }
  }

  int64_t limit(int64_t query) const {
    return causal ? clamp(query + diagonal + kW, 0, keys) : keys;
  }

 private:
  template <class Body, class Score>
  __attribute__((always_inline)) void for_each_of(int64_t query, Body&& body, Score&& score) const {
    const int64_t full = causal ? clamp(query + diagonal + 1, 0, keys) : keys;
    int64_t key = 0;
    for (; key + 4 <= full; key += 4) {
      const int64_t at = key * kTileStride + query;
      body(Slot<0>{}, key, score(at));
      body(Slot<1>{}, key + 1, score(at + kTileStride));
      body(Slot<2>{}, key + 2, score(at + 2 * kTileStride));
      body(Slot<3>{}, key + 3, score(at + 3 * kTileStride));
    }
    const VecI lane = lanes();
    for (const int64_t end = limit(query); key < end; ++key) {
      VecF x = score(key * kTileStride + query);
      if (key >= full) {
        x = select(lane >= static_cast<int32_t>(key - query - diagonal), x, broadcast(-kInfinity));
      }
      if (key % 2 == 0) {
        body(Slot<0>{}, key, x);
      } else {
        body(Slot<1>{}, key, x);
      }
    }
  }
};

// Operand of a product over the keys: two rows of a tile in the 32 bits of a float.
inline VecF interleave(VecF low, VecF high) {
#if defined(__AVX512BF16__)
  VecH32 order;
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  return (VecF)_mm512_permutexvar_epi16((__m512i)order,
                                        (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  return (VecF)(((VecU)from_bfloat16(round_to_bfloat16(low)) >> 16) |
                (VecU)from_bfloat16(round_to_bfloat16(high)));
#endif
}

// 2^(score - maximum) of W queries over their scores, dropped where dropout is on, 0 where no query
// may attend; as float32, or pairs of rows in the first half of the rows. Returns their sum before
// dropout.
template <class T, bool kDropout>
VecF exponentials(const Scores& scores, int64_t query, VecF maximum, LaneDropout* dropout,
                  int64_t first_key) {
  float* tile = scores.data + query;
  VecF sum[4] = {};
  [[maybe_unused]] VecF even = zero();
  scores.for_each(query, [&](auto slot, int64_t j, VecF score) __attribute__((always_inline)) {
    VecF p = exp2_of_negative(score - maximum);
    constexpr int i = decltype(slot)::value;
    sum[i] += p;
    if constexpr (kDropout) {
      if (i == 0 && j % 8 == 0) dropout->draw(static_cast<uint32_t>((first_key + j) / 8));
      p = dropout->keep(p, j);
    }
    if constexpr (kPairs<T>) {
      if (i % 2 == 1) store(tile + j / 2 * kTileStride, interleave(even, p));
      even = p;
    } else {
      store(tile + j * kTileStride, p);
    }
  });
  const int64_t limit = scores.limit(query);
  if constexpr (kPairs<T>) {
    if (limit % 2 == 1) store(tile + limit / 2 * kTileStride, interleave(even, zero()));
    for (int64_t j = (limit + 1) / 2; j < (scores.rows + 1) / 2; ++j) {
      store(tile + j * kTileStride, zero());
    }
  } else {
    for (int64_t j = limit; j < scores.rows; ++j) store(tile + j * kTileStride, zero());
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

inline VecF greatest(const Scores& scores, int64_t query, VecF least) {
  VecF most[4] = {least, least, least, least};
  scores.for_each(query, [&](auto slot, int64_t, VecF score) __attribute__((always_inline)) {
    constexpr int i = decltype(slot)::value;
    most[i] = max(score, most[i]);
  });
  return max(max(most[0], most[1]), max(most[2], most[3]));
}

// ---- Forward -----------------------------------------------------------------------------------

// A product for each slab of the depth.
template <class T>
void score_product(Band band, int64_t diagonal, int64_t keys, int64_t queries, int64_t head_dim,
                   const float* a, int64_t slab, const float* b, float* tile, Ahead& ahead) {
  constexpr int64_t step = kPairs<T> ? 2 * kSlab : kSlab;
  Result<T> to{tile, kTileStride};
  for (int64_t d = 0; d < head_dim; d += step) {
    product<T, Slabs>(band, diagonal, keys, vectors(queries), smaller(step, head_dim - d), a, b,
                      kQueryBlock, to, ahead);
    to.add = true;
    a += slab;
    b += kSlab * kQueryBlock;
  }
}

// A product for each slab of the columns.
template <class T, class A>
void head_product(Band band, int64_t diagonal, int64_t rows, int64_t head_dim, int64_t depth,
                  const float* a, const float* b, int64_t slab, const Result<T>& to, Ahead& ahead) {
  for (int64_t d = 0; d < head_dim; d += kSlab) {
    product<T, A>(band, diagonal, rows, vectors(smaller(kSlab, head_dim - d)), depth, a, b, kSlab,
                  to.at(0, d), ahead);
    b += slab;
  }
}

template <class T>
void forward_task(const AttentionArgs& a, int64_t b, int64_t kv_head, int64_t query_block,
                  bool prefetch) {
  const Sequence s = sequence_of(a, b);
  const int64_t q0 = query_block * kForwardQueries;
  if (q0 >= s.queries) return;
  const int64_t q_end = smaller(q0 + kForwardQueries, s.queries);
  const int64_t keys = a.causal ? smaller(s.keys, q_end) : s.keys;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t head_dim = a.head_dim;
  const int64_t chunks = (q_end - q0 + kQueryBlock - 1) / kQueryBlock;
  const int64_t block = smaller(kKeyBlock, keys);
  const int64_t slabs = slabs_of(head_dim);
  const int64_t row_size = slabs * kSlab;
  const bool masked = a.mask != nullptr || a.bias != nullptr;
  const bool one_block = keys <= kKeyBlock;

  Arena arena;
  const int64_t query_size = slabs_of(depth_elements<T>(head_dim)) * kSlab * kQueryBlock;
  const int64_t key_slab = block * kSlab;
  const int64_t value_slab = depth_elements<T>(block) * kSlab;
  const size_t at_key = arena.add<float>(slabs_of(depth_elements<T>(head_dim)) * key_slab);
  const size_t at_value = arena.add<float>(slabs * value_slab);
  const size_t at_tile = arena.add<float>(block * kTileStride);
  const size_t at_addend = arena.add<float>(masked ? block * kTileStride : 0);
  const size_t at_query = arena.add<float>(group * chunks * query_size);
  const size_t at_out = arena.add<float>(one_block ? 0 : group * chunks * kQueryBlock * row_size);
  const size_t at_max = arena.add<float>(group * chunks * kQueryBlock);
  const size_t at_sum = arena.add<float>(group * chunks * kQueryBlock);
  const size_t at_factor = arena.add<float>(kQueryBlock);
  const size_t at_live = arena.add<uint8_t>(kKeyBlock);
  arena.allocate();
  float* key = arena.get<float>(at_key);
  float* value = arena.get<float>(at_value);
  float* tile = arena.get<float>(at_tile);
  float* addend_tile = masked ? arena.get<float>(at_addend) : nullptr;
  float* factor = arena.get<float>(at_factor);
  uint8_t* live = arena.get<uint8_t>(at_live);

  Ahead ahead;
  for (int64_t k0 = 0; k0 < keys || k0 == 0; k0 += kKeyBlock) {
    const int64_t n = smaller(kKeyBlock, keys - k0);
    if (masked) find_live_keys(a, s, kv_head * group, group, q0, q_end, k0, n, live);
    const uint8_t* use = masked ? live : nullptr;
    pack_slabs(at<const T>(a.key, s.batch, s.key_row + k0, kv_head), a.key.token_stride, n,
               head_dim, use, key_slab, key);
    pack_depth(at<const T>(a.value, s.batch, s.key_row + k0, kv_head), a.value.token_stride, n,
               head_dim, use, value_slab, value);

    for (int64_t i = 0; i < group * chunks; ++i) {
      const int64_t head = kv_head * group + i / chunks;
      const int64_t r0 = q0 + i % chunks * kQueryBlock;
      const int64_t rows = smaller(kQueryBlock, q_end - r0);
      const int64_t chunk_keys = a.causal ? smaller(keys, r0 + rows) : keys;
      if (k0 > 0 && k0 >= chunk_keys) continue;
      const int64_t columns = smaller(n, chunk_keys - k0);
      const bool last = k0 + kKeyBlock >= chunk_keys;
      const int64_t diagonal = r0 - k0;
      float* query = arena.get<float>(at_query) + i * query_size;
      float* maximum = arena.get<float>(at_max) + i * kQueryBlock;
      float* sum = arena.get<float>(at_sum) + i * kQueryBlock;
      if (k0 == 0) {
        pack_transposed(at<const T>(a.query, s.batch, s.query_row + r0, head), a.query.token_stride,
                        rows, head_dim, nullptr, query);
      }
      if (prefetch && k0 == 0 && i == 0) {
        const T* next_query = at<const T>(a.query, s.batch, s.query_row, head + group);
        const T* next_key = at<const T>(a.key, s.batch, s.key_row, kv_head + 1);
        const T* next_value = at<const T>(a.value, s.batch, s.key_row, kv_head + 1);
        const auto bytes = [](int64_t n) { return n * static_cast<int64_t>(sizeof(T)); };
        ahead.add(next_query, bytes(a.query.token_stride), bytes(head_dim));
        ahead.add(next_key, bytes(a.key.token_stride), bytes(head_dim));
        ahead.add(next_value, bytes(a.value.token_stride), bytes(head_dim));
        ahead.begin(smaller(smaller(s.queries, s.keys), kKeyBlock), 4);
      }
      score_product<T>(a.causal ? Band::kScores : Band::kFull, diagonal, columns, rows, head_dim,
                       key, key_slab, query, tile, ahead);

      if (masked) addend_of(a, s.batch, head).fill(r0, rows, k0, columns, addend_tile);
      const Scores scores{tile,    addend_tile, a.scale * kLog2E, columns,
                          columns, a.causal,    diagonal};
      const Statistics statistics = statistics_of(a, s, head);
      for (int64_t q = 0; q < rows; q += kW) {
        const VecF before = k0 == 0 ? broadcast(-kInfinity) : load(maximum + q);
        const VecF now = greatest(scores, q, before);
        // A row without any key so far: its exponentials must be 0, not e^(-inf + inf).
        const VecF shift = select(now == -kInfinity, zero(), now);
        VecF total;
        if (a.dropout.threshold == 0) {
          total = exponentials<T, false>(scores, q, shift, nullptr, k0);
        } else {
          LaneDropout dropout(a.dropout, static_cast<uint32_t>((s.token + r0 + q) * a.heads + head),
                              static_cast<uint32_t>(a.heads));
          total = exponentials<T, true>(scores, q, shift, &dropout, k0);
        }
        if (k0 > 0) {
          const VecF old = select(now == before, broadcast(1.0f), exp2_of_negative(before - now));
          store(factor + q, old);
          total += load(sum + q) * old;
        }
        const VecI dead = total == 0.0f;
        const VecF inverse = select(dead, zero(), 1.0f / total);
        store(maximum + q, now);
        store(sum + q, last ? inverse * a.dropout.scale : total);
        if (last && a.statistics != nullptr) {
          const int64_t count = smaller(kW, rows - q);
          store_partial(statistics.maximum + r0 + q, select(dead, zero(), now), count);
          store_partial(statistics.inverse_sum + r0 + q, inverse, count);
        }
      }

      Result<T> to{one_block ? nullptr : arena.get<float>(at_out) + i * kQueryBlock * row_size,
                   row_size};
      to.add = k0 > 0;
      to.factors = k0 > 0 ? factor : nullptr;
      if (last) {
        to.out = at<T>(a.out, s.batch, s.query_row + r0, head);
        to.out_stride = a.out.token_stride;
        to.out_columns = head_dim;
        to.out_factors = sum;
      }
      head_product<T, TileColumns>(a.causal ? Band::kQueries : Band::kFull, diagonal, rows,
                                   head_dim, columns, tile, value, value_slab, to, ahead);
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
  bool prefetch;  // the next key/value head
};

// Operands of products over the queries: a row of a tile as bfloat16 lies in its first half.
template <class T>
inline void store_row(float* row, int64_t query, VecF x) {
  if constexpr (kPairs<T>) {
    store(reinterpret_cast<T*>(row) + query, x);
  } else {
    store(row + query, x);
  }
}

// W queries of a tile. From scores and dP to dropped weights and dS, in place; dS in pairs of rows
// goes to `pairs` too.
template <class T, bool kDropout>
void grad_lanes(const Scores& scores, float* grad, int64_t query, VecF maximum, VecF inverse_sum,
                const VecF* given_delta, LaneDropout* dropout, float dropout_scale,
                int64_t first_key, [[maybe_unused]] float* pairs) {
  float* weights = scores.data;
  VecF sum[4] = {};
  // A weight that is dropped is kept as negative (or -0) until the second pass.
  const VecU sign = VecU{} + 0x80000000u;
  scores.for_each(query, [&](auto slot, int64_t j, VecF score) __attribute__((always_inline)) {
    constexpr int i = decltype(slot)::value;
    const VecF p = exp2_of_negative(score - maximum) * inverse_sum;
    float* g_at = grad + j * kTileStride + query;
    VecF g = load(g_at);
    VecF marked = p;
    if constexpr (kDropout) {
      if (i == 0 && j % 8 == 0) dropout->draw(static_cast<uint32_t>((first_key + j) / 8));
      const VecI kept = dropout->kept(j);
      g = select(kept, g * dropout_scale, zero());
      marked = select(kept, p, (VecF)((VecU)p | sign));
      store(g_at, g);
    }
    sum[i] += p * g;
    store(weights + j * kTileStride + query, marked);
  });
  const VecF delta = given_delta != nullptr ? *given_delta : (sum[0] + sum[1]) + (sum[2] + sum[3]);

  const int64_t limit = scores.limit(query);
  const auto finish = [&](int64_t j) __attribute__((always_inline)) {
    float* p_row = weights + j * kTileStride;
    float* g_row = grad + j * kTileStride;
    VecF p = load(p_row + query);
    const VecF weight = kDropout ? (VecF)((VecU)p & ~sign) : p;
    const VecF g = weight * (load(g_row + query) - delta);
    if (kDropout) p = select((VecI)p < 0, zero(), p * dropout_scale);
    store_row<T>(p_row, query, p);
    store_row<T>(g_row, query, g);
    return g;
  };
  int64_t j = 0;
  if constexpr (kPairs<T>) {
    for (; j + 2 <= limit; j += 2) {
      const VecF low = finish(j);
      store(pairs + j / 2 * kTileStride + query, interleave(low, finish(j + 1)));
    }
    if (j < limit) {
      store(pairs + j / 2 * kTileStride + query, interleave(finish(j), zero()));
      ++j;
    }
    for (int64_t i = (limit + 1) / 2; i < (scores.rows + 1) / 2; ++i) {
      store(pairs + i * kTileStride + query, zero());
    }
  } else {
    for (; j < limit; ++j) finish(j);
  }
  for (; j < scores.rows; ++j) {
    store_row<T>(weights + j * kTileStride, query, zero());
    store_row<T>(grad + j * kTileStride, query, zero());
  }
}

// With P the weights, dropped those after dropout and D the keep factor of dropout:
//   dV = dropped^T dO,  dP = D * (dO V^T),  dS = P * (dP - rowsum(dO * O)),
//   dQ = scale dS K,    dK = scale dS^T Q,  dBias = dS.
template <class T>
void backward_task(const AttentionBackwardArgs& a, const BackwardTask& task) {
  const Sequence s = sequence_of(a, task.batch);
  const int64_t kv_head = task.first_head / (a.heads / a.kv_heads);
  const int64_t q_end = smaller(task.first_query + task.queries, s.queries);
  const int64_t k_end = smaller(task.first_key + task.keys, s.keys);
  const int64_t head_dim = a.head_dim;
  const int64_t slabs = slabs_of(head_dim);
  const int64_t row_size = slabs * kSlab;
  const int64_t queries = larger(0, q_end - task.first_query);
  const int64_t block = clamp(k_end - task.first_key, 1, kKeyBlock);
  const int64_t tile_rows = clamp(queries, 1, kQueryBlock);
  const bool masked = a.mask != nullptr || a.bias != nullptr;
  const bool dropout = a.dropout.threshold != 0;
  // With all keys of a query at hand, rowsum(dO * O) is taken as rowsum(P * dP): the same number,
  // but the rounding errors of P and dP cancel, and so does that of O in bfloat16.
  const bool all_keys = task.first_key == 0 && s.keys <= smaller(task.keys, kKeyBlock);
  const bool one_key_block = k_end - task.first_key <= kKeyBlock;

  // Where a product runs over the queries or keys, its pairs are those of two rows: other copies
  // are needed than for the products over head_dim.
  constexpr bool pairs = kPairs<T>;
  const int64_t element_slabs = slabs_of(depth_elements<T>(head_dim));
  const int64_t key_slab = block * kSlab;
  const int64_t key_depth_slab = depth_elements<T>(block) * kSlab;
  const int64_t query_slab = depth_elements<T>(tile_rows) * kSlab;
  Arena arena;
  const size_t at_key = arena.add<float>(element_slabs * key_slab);
  const size_t at_value = arena.add<float>(element_slabs * key_slab);
  const size_t at_key_depth = arena.add<float>(pairs ? slabs * key_depth_slab : 0);
  const size_t at_grad_key = arena.add<float>(row_size * block);
  const size_t at_grad_value = arena.add<float>(row_size * block);
  const size_t at_query = arena.add<float>(element_slabs * kSlab * kQueryBlock);
  const size_t at_grad_out = arena.add<float>(element_slabs * kSlab * kQueryBlock);
  const size_t at_query_depth = arena.add<float>(slabs * query_slab);
  const size_t at_grad_out_depth = arena.add<float>(slabs * query_slab);
  const size_t at_weights = arena.add<float>(block * kTileStride);
  const size_t at_grad_scores = arena.add<float>(block * kTileStride);
  const size_t at_pairs = arena.add<float>(pairs ? (block + 1) / 2 * kTileStride : 0);
  const size_t at_addend = arena.add<float>(masked ? block * kTileStride : 0);
  const size_t at_delta = arena.add<float>(kQueryBlock);
  const size_t at_live_keys = arena.add<uint8_t>(kKeyBlock);
  const size_t at_live_queries = arena.add<uint8_t>(kQueryBlock);
  const size_t at_grad_query =
      arena.add<float>(task.grad_query && !one_key_block ? task.heads * queries * row_size : 0);
  arena.allocate();
  float* key = arena.get<float>(at_key);
  float* value = arena.get<float>(at_value);
  float* key_depth = pairs ? arena.get<float>(at_key_depth) : key;
  float* query = arena.get<float>(at_query);
  float* grad_out = arena.get<float>(at_grad_out);
  float* query_depth = arena.get<float>(at_query_depth);
  float* grad_out_depth = arena.get<float>(at_grad_out_depth);
  float* weights = arena.get<float>(at_weights);
  float* grad_scores = arena.get<float>(at_grad_scores);
  float* grad_scores_pairs = pairs ? arena.get<float>(at_pairs) : grad_scores;
  float* addend_tile = masked ? arena.get<float>(at_addend) : nullptr;
  float* delta = arena.get<float>(at_delta);
  uint8_t* live_keys = arena.get<uint8_t>(at_live_keys);
  uint8_t* live_queries = arena.get<uint8_t>(at_live_queries);

  Ahead ahead;
  for (int64_t k0 = task.first_key; k0 < k_end; k0 += kKeyBlock) {
    // Queries before this one see none of these keys.
    const int64_t q_begin = a.causal ? larger(task.first_query, k0) : task.first_query;
    const int64_t n = smaller(kKeyBlock, k_end - k0);
    if (q_begin >= q_end) {
      if (task.grad_key_value) {
        zero_head(at<T>(a.grad_key, s.batch, s.key_row + k0, kv_head), a.grad_key.token_stride, n,
                  head_dim);
        zero_head(at<T>(a.grad_value, s.batch, s.key_row + k0, kv_head), a.grad_value.token_stride,
                  n, head_dim);
      }
      continue;
    }
    if (masked) {
      find_live_keys(a, s, task.first_head, task.heads, q_begin, q_end, k0, n, live_keys);
    }
    const uint8_t* use = masked ? live_keys : nullptr;
    const T* key_rows = at<const T>(a.key, s.batch, s.key_row + k0, kv_head);
    const T* value_rows = at<const T>(a.value, s.batch, s.key_row + k0, kv_head);
    pack_slabs(key_rows, a.key.token_stride, n, head_dim, use, key_slab, key);
    pack_slabs(value_rows, a.value.token_stride, n, head_dim, use, key_slab, value);
    if (pairs && task.grad_query) {
      pack_depth(key_rows, a.key.token_stride, n, head_dim, use, key_depth_slab, key_depth);
    }

    bool first_tile = true;
    for (int64_t h = 0; h < task.heads; ++h) {
      const int64_t head = task.first_head + h;
      const Statistics statistics = statistics_of(a, s, head);
      for (int64_t r0 = q_begin; r0 < q_end; r0 += kQueryBlock) {
        const int64_t rows = smaller(kQueryBlock, q_end - r0);
        const int64_t diagonal = r0 - k0;
        const int64_t columns = a.causal ? smaller(n, diagonal + rows) : n;
        const bool last_tile = h + 1 == task.heads && r0 + kQueryBlock >= q_end;

        bool all_live = true;
        for (int64_t r = 0; r < rows; ++r) {
          live_queries[r] = statistics.inverse_sum[r0 + r] != 0.0f;
          all_live &= live_queries[r] != 0;
        }
        const uint8_t* use_queries = all_live ? nullptr : live_queries;
        const T* query_rows = at<const T>(a.query, s.batch, s.query_row + r0, head);
        const T* grad_rows = at<const T>(a.grad_out, s.batch, s.query_row + r0, head);
        pack_both(query_rows, a.query.token_stride, rows, head_dim, use_queries, query_slab,
                  query_depth, query);
        pack_both(grad_rows, a.grad_out.token_stride, rows, head_dim, use_queries, query_slab,
                  grad_out_depth, grad_out);
        if (!all_keys) {
          const T* out_rows = at<const T>(a.out, s.batch, s.query_row + r0, head);
          for (int64_t r = 0; r < round_up(rows); ++r) {
            VecF dot = zero();
            for (int64_t d = 0; r < rows && live_queries[r] && d < head_dim; d += kW) {
              dot += load_first(grad_rows + r * a.grad_out.token_stride + d, head_dim - d) *
                     load_first(out_rows + r * a.out.token_stride + d, head_dim - d);
            }
            delta[r] = reduce_add(dot);
          }
        }

        if (task.prefetch && first_tile && k0 == task.first_key) {
          const int64_t next = head + task.heads;
          const auto bytes = [](int64_t n) { return n * static_cast<int64_t>(sizeof(T)); };
          ahead.add(at<const T>(a.query, s.batch, s.query_row, next), bytes(a.query.token_stride),
                    bytes(head_dim));
          ahead.add(at<const T>(a.grad_out, s.batch, s.query_row, next),
                    bytes(a.grad_out.token_stride), bytes(head_dim));
          ahead.add(at<const T>(a.key, s.batch, s.key_row, kv_head + 1), bytes(a.key.token_stride),
                    bytes(head_dim));
          ahead.add(at<const T>(a.value, s.batch, s.key_row, kv_head + 1),
                    bytes(a.value.token_stride), bytes(head_dim));
          ahead.begin(smaller(smaller(s.queries, s.keys), kKeyBlock), 2);
        }
        const Band scores_band = a.causal ? Band::kScores : Band::kFull;
        score_product<T>(scores_band, diagonal, columns, rows, head_dim, key, key_slab, query,
                         weights, ahead);
        score_product<T>(scores_band, diagonal, columns, rows, head_dim, value, key_slab, grad_out,
                         grad_scores, ahead);

        if (masked) addend_of(a, s.batch, head).fill(r0, rows, k0, columns, addend_tile);
        // A panel of the products below may hold keys that none of these queries sees.
        const int64_t tile_keys = smaller(n, columns + kMaxRows);
        const Scores scores{weights,   addend_tile, a.scale * kLog2E, columns,
                            tile_keys, a.causal,    diagonal};
        for (int64_t q = 0; q < rows; q += kW) {
          const int64_t count = smaller(kW, rows - q);
          const VecF maximum = load_partial(statistics.maximum + r0 + q, count);
          const VecF inverse_sum = load_partial(statistics.inverse_sum + r0 + q, count);
          const VecF row_delta = all_keys ? zero() : load(delta + q);
          const VecF* given = all_keys ? nullptr : &row_delta;
          const auto run = [&](auto with_dropout, LaneDropout* lane_dropout) {
            constexpr bool kDropout = decltype(with_dropout)::value;
            if (task.grad_bias) {
              grad_lanes<float, kDropout>(scores, grad_scores, q, maximum, inverse_sum, given,
                                          lane_dropout, a.dropout.scale, k0, nullptr);
            } else {
              grad_lanes<T, kDropout>(scores, grad_scores, q, maximum, inverse_sum, given,
                                      lane_dropout, a.dropout.scale, k0, grad_scores_pairs);
            }
          };
          if (dropout) {
            LaneDropout lane_dropout(a.dropout,
                                     static_cast<uint32_t>((s.token + r0 + q) * a.heads + head),
                                     static_cast<uint32_t>(a.heads));
            run(BoolConstant<true>{}, &lane_dropout);
          } else {
            run(BoolConstant<false>{}, nullptr);
          }
        }
        if (task.grad_bias) {
          float* to = a.grad_bias + task.batch * a.bias_strides[0] + head * a.bias_strides[1] +
                      r0 * a.bias_strides[2] + k0 * a.bias_strides[3];
          if (a.bias_strides[2] == 0) {
            // First over the lanes: less is rounded than one by one.
            for (int64_t j = 0; j < columns; ++j) {
              VecF sum = zero();
              for (int64_t r = 0; r < rows; r += kW) sum += load(grad_scores + j * kTileStride + r);
              to[j * a.bias_strides[3]] += reduce_add(sum);
            }
          }
          for (int64_t r = 0; r < rows && a.bias_strides[2] != 0; ++r) {
            const int64_t limit = a.causal ? clamp(diagonal + r + 1, 0, columns) : columns;
            for (int64_t j = 0; j < limit; ++j) {
              to[r * a.bias_strides[2] + j * a.bias_strides[3]] += grad_scores[j * kTileStride + r];
            }
          }
        }
        if (task.grad_key_value) {
          // The rows of keys that none of these queries sees come from the tiles before, or are 0.
          const Band band = a.causal ? Band::kKeys : Band::kFull;
          Result<T> to{arena.get<float>(at_grad_value), row_size};
          to.add = !first_tile;
          to.out_columns = head_dim;
          if (last_tile) {
            to.out = at<T>(a.grad_value, s.batch, s.key_row + k0, kv_head);
            to.out_stride = a.grad_value.token_stride;
          }
          head_product<T, TileRows>(band, diagonal, n, head_dim, rows, weights, grad_out_depth,
                                    query_slab, to, ahead);
          to.data = arena.get<float>(at_grad_key);
          to.out_factor = a.scale;
          if (last_tile) {
            to.out = at<T>(a.grad_key, s.batch, s.key_row + k0, kv_head);
            to.out_stride = a.grad_key.token_stride;
          }
          head_product<T, TileRows>(band, diagonal, n, head_dim, rows, grad_scores, query_depth,
                                    query_slab, to, ahead);
        }
        if (task.grad_query) {
          const int64_t row = h * queries + r0 - task.first_query;
          Result<T> to{one_key_block ? nullptr : arena.get<float>(at_grad_query) + row * row_size,
                       row_size};
          to.add = k0 > task.first_key;
          if (k0 + kKeyBlock >= k_end || (a.causal && k0 + kKeyBlock >= r0 + rows)) {
            to.out = at<T>(a.grad_query, s.batch, s.query_row + r0, head);
            to.out_stride = a.grad_query.token_stride;
            to.out_columns = head_dim;
            to.out_factor = a.scale;
          }
          head_product<T, TileColumns>(a.causal ? Band::kQueries : Band::kFull, diagonal, rows,
                                       head_dim, columns, grad_scores_pairs, key_depth,
                                       key_depth_slab, to, ahead);
        }
        first_tile = false;
      }
    }
  }

  if (task.grad_query && k_end <= task.first_key) {
    for (int64_t h = 0; h < task.heads && queries > 0; ++h) {
      zero_head(at<T>(a.grad_query, s.batch, s.query_row + task.first_query, task.first_head + h),
                a.grad_query.token_stride, queries, head_dim);
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

// Key/value heads of a sequence that one task computes one after the other: several where there are
// tasks enough, so that one head can fetch the rows of the next. `tensors`: that are read or
// written. Where these lie in the cache anyway, fetching costs 5 to 10 % (16 tokens, float32).
int64_t heads_of_task(const AttentionArgs& a, int64_t tensors) {
  constexpr int64_t kFar = 12 << 20;
  const int64_t tokens = a.cu_seqlens_q == nullptr ? a.batch * a.query_length : a.query_length;
  const int64_t bytes = tensors * tokens * a.heads * a.head_dim * (a.bfloat16 ? 2 : 4);
  return a.batch * a.kv_heads >= 64 && bytes >= kFar ? smaller(4, a.kv_heads) : 1;
}

template <class T>
void forward_of(const AttentionArgs& a, Parallel& parallel) {
  const int64_t blocks = (a.max_query_length + kForwardQueries - 1) / kForwardQueries;
  zero_slack<T>(a, a.out, true, a.heads);
  const int64_t chunk = heads_of_task(a, 4);
  const int64_t chunks = (a.kv_heads + chunk - 1) / chunk;
  parallel.for_each(a.batch * chunks * blocks, [&](int64_t i) {
    const int64_t block = i % blocks;
    const int64_t unit = i / blocks;
    const int64_t first = unit % chunks * chunk;
    const int64_t end = smaller(first + chunk, a.kv_heads);
    for (int64_t head = first; head < end; ++head) {
      forward_task<T>(a, unit / chunks, head, block, head + 1 < end);
    }
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
    const int64_t chunk = heads_of_task(a, 7);
    const int64_t chunks = (a.kv_heads + chunk - 1) / chunk;
    parallel.for_each(a.batch * chunks, [&](int64_t i) {
      const int64_t first = i % chunks * chunk;
      const int64_t end = smaller(first + chunk, a.kv_heads);
      for (int64_t head = first; head < end; ++head) {
        backward_task<T>(a, {i / chunks, head * group, group, 0, a.max_query_length, 0,
                             a.max_key_length, true, true, false, head + 1 < end});
      }
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
                             false, true, false, false});
      } else {
        backward_task<T>(a, {b, head, group, (block - key_blocks) * kForwardQueries,
                             kForwardQueries, 0, a.max_key_length, true, false, false, false});
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
        backward_task<T>(
            a, {b, h, 1, 0, a.max_query_length, 0, a.max_key_length, false, false, true, false});
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
