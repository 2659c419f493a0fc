#include "attention/attention_cuda.h"

#include <algorithm>
#include <cmath>

#include "testing/cuda_test.h"

namespace transformer_ext {
namespace {

using namespace cuda_test;

struct Shape {
  std::vector<int32_t> query_lengths, key_lengths;
  int64_t heads, kv_heads, head_dim;
  bool causal = false;
  double dropout_p = 0.0;
  bool padded = false;  // key_lengths, a mask and a bias; else packed
  int64_t offset = 0;   // of all tensors from an address that vectors could be read from
  bool masked = true;   // padded: the mask and the bias too
  bool tensor_cores = true;
};

std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << s.query_lengths.size() << " sequences, first of " << s.query_lengths[0] << " and "
             << s.key_lengths[0] << ", heads " << s.heads << "/" << s.kv_heads << ", head_dim "
             << s.head_dim << ", causal " << s.causal << ", dropout " << s.dropout_p << ", padded "
             << s.padded;
}

// The same problem in the type of the GPU, and in float32 for the CPU's kernel. What nobody may
// read is NaN: slack rows, padding, what queries that see nothing are asked with.
struct Problem {
  static constexpr int64_t kSlack = 3;
  static constexpr int64_t kRng[3] = {11, 12, 13};
  static constexpr int64_t kSite = 5;

  explicit Problem(const Shape& shape) : shape(shape), batch(shape.query_lengths.size()) {
    longest_query = *std::max_element(shape.query_lengths.begin(), shape.query_lengths.end());
    longest_key = *std::max_element(shape.key_lengths.begin(), shape.key_lengths.end());
    ends_q.push_back(0);
    ends_k.push_back(0);
    for (size_t b = 0; b < batch; ++b) {
      ends_q.push_back(ends_q.back() + shape.query_lengths[b]);
      ends_k.push_back(ends_k.back() + shape.key_lengths[b]);
      lengths.push_back(shape.key_lengths[b]);
    }
    queries = shape.padded ? longest_query : ends_q.back() + kSlack;
    keys = shape.padded ? longest_key : ends_k.back() + kSlack;
    const int64_t sequences = shape.padded ? static_cast<int64_t>(batch) : 1;
    query = random_values(size_t(sequences * queries * shape.heads * shape.head_dim), 1);
    grad_out = random_values(query.size(), 2);
    key = random_values(size_t(sequences * keys * shape.kv_heads * shape.head_dim), 3);
    value = random_values(key.size(), 4);
    if (shape.padded) {
      mask_and_bias();
    } else {
      poison(query, ends_q.back() * shape.heads * shape.head_dim);
      poison(grad_out, ends_q.back() * shape.heads * shape.head_dim);
      poison(key, ends_k.back() * shape.kv_heads * shape.head_dim);
      poison(value, ends_k.back() * shape.kv_heads * shape.head_dim);
    }
  }

  static void poison(std::vector<float>& x, int64_t begin) {
    std::fill(x.begin() + begin, x.end(), kNan);
  }

  // Query 0 of each sequence sees nothing; keys behind a sequence's length hold NaN.
  void mask_and_bias() {
    std::mt19937 random(5);
    mask.resize(batch * size_t(queries * keys), 1);
    bias = random_values(size_t(shape.heads * queries * keys), 6);
    for (uint8_t& m : mask) m = random() % 4 != 0;
    for (float& x : bias) {
      if (random() % 9 == 0) x = -std::numeric_limits<float>::infinity();
    }
    for (size_t b = 0; b < batch; ++b) {
      std::fill_n(mask.begin() + int64_t(b) * queries * keys, keys, uint8_t{0});
      const int64_t row = shape.heads * shape.head_dim;
      if (shape.masked || shape.key_lengths[b] == 0) {
        std::fill_n(query.begin() + int64_t(b) * queries * row, row, kNan);
        std::fill_n(grad_out.begin() + int64_t(b) * queries * row, row, kNan);
      }
      const int64_t key_row = shape.kv_heads * shape.head_dim;
      for (int64_t j = shape.key_lengths[b]; j < keys; ++j) {
        std::fill_n(key.begin() + (int64_t(b) * keys + j) * key_row, key_row, kNan);
        std::fill_n(value.begin() + (int64_t(b) * keys + j) * key_row, key_row, kNan);
      }
    }
  }

  template <class T>
  AttentionTensor view(const std::vector<T>& x, int64_t tokens, int64_t heads) const {
    return {const_cast<T*>(x.data()) + shape.offset, tokens * heads * shape.head_dim,
            heads * shape.head_dim, shape.head_dim};
  }

  // Results: out, gradients of query, key and value, one behind the other.
  template <class T, class Run>
  std::vector<T> solve(Run&& run) const {
    const auto copy = [&](const std::vector<float>& x) {
      std::vector<T> narrow = convert<T>(x);
      narrow.insert(narrow.begin(), size_t(shape.offset), rounded<T>(0.0f));
      return narrow;
    };
    const std::vector<T> q = copy(query), k = copy(key), v = copy(value), g = copy(grad_out);
    std::vector<T> out(q.size(), rounded<T>(kNan)), grad_query = out;
    std::vector<T> grad_key(k.size(), rounded<T>(kNan)), grad_value = grad_key;
    const int64_t rows = (shape.padded ? int64_t(batch) : 1) * shape.heads * queries;
    std::vector<float> statistics(size_t(2 * rows), kNan), delta(size_t(rows), kNan);
    AttentionBackwardArgs a;
    a.batch = int64_t(batch);
    a.heads = shape.heads;
    a.kv_heads = shape.kv_heads;
    a.head_dim = shape.head_dim;
    a.query_length = queries;
    a.key_length = keys;
    a.max_query_length = longest_query;
    a.max_key_length = longest_key;
    a.causal = shape.causal;
    a.scale = float(1.0 / std::sqrt(double(shape.head_dim)));
    if (shape.padded) {
      a.key_lengths = lengths.data();
      if (shape.masked) a.mask = mask.data();
      if (shape.masked) a.bias = bias.data();
      const int64_t mask_strides[4] = {queries * keys, 0, keys, 1};
      const int64_t bias_strides[4] = {0, queries * keys, keys, 1};
      std::copy_n(mask_strides, 4, a.mask_strides);
      std::copy_n(bias_strides, 4, a.bias_strides);
    } else {
      a.cu_seqlens_q = ends_q.data();
      a.cu_seqlens_k = ends_k.data();
    }
    a.query = view(q, queries, shape.heads);
    a.key = view(k, keys, shape.kv_heads);
    a.value = view(v, keys, shape.kv_heads);
    a.out = view(out, queries, shape.heads);
    a.grad_out = view(g, queries, shape.heads);
    a.grad_query = view(grad_query, queries, shape.heads);
    a.grad_key = view(grad_key, keys, shape.kv_heads);
    a.grad_value = view(grad_value, keys, shape.kv_heads);
    a.statistics = statistics.data();
    run(a, delta.data());
    std::vector<T> all;
    for (const std::vector<T>* x : {&out, &grad_query, &grad_key, &grad_value}) {
      all.insert(all.end(), x->begin() + shape.offset, x->end());
    }
    return all;
  }

  // On the CPU, of inputs rounded to T.
  template <class T>
  std::vector<float> expected() const {
    Problem exact = *this;
    exact.shape.offset = 0;
    for (std::vector<float>* x : {&exact.query, &exact.key, &exact.value, &exact.grad_out}) {
      *x = widen(convert<T>(*x));
    }
    return exact.template solve<float>([&](AttentionBackwardArgs a, float*) {
      a.dropout = make_dropout(kRng, kSite, shape.dropout_p);
      Serial serial;
      attention_kernels().forward(a, serial);
      attention_kernels().backward(a, serial);
    });
  }

  Shape shape;
  size_t batch;
  int32_t longest_query = 0, longest_key = 0;
  int64_t queries = 0, keys = 0;
  std::vector<int32_t> ends_q, ends_k;
  std::vector<int64_t> lengths;
  std::vector<uint8_t> mask;
  std::vector<float> bias, query, key, value, grad_out;
};

template <class T>
void compare_with_cpu(const Shape& shape) {
  SCOPED_TRACE(testing::Message() << shape);
  const Problem problem(shape);
  const CudaDropout dropout = cuda_dropout(Problem::kRng, Problem::kSite, shape.dropout_p);
  const std::vector<float> got = widen(for_each_schedule([&] {
    return problem.solve<T>([&](const AttentionBackwardArgs& a, float* delta) {
      EXPECT_LAUNCHED(
          attention_forward_cuda(a, float_type<T>(), dropout, shape.tensor_cores, nullptr));
      EXPECT_LAUNCHED(
          attention_backward_cuda(a, float_type<T>(), dropout, delta, shape.tensor_cores, nullptr));
    });
  }));
  const std::vector<float> expected = problem.expected<T>();
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    if (expected[i] == 0.0f) {
      // Nothing was attended to; a rounded output moves a gradient that is 0 by chance.
      ASSERT_NEAR(got[i], 0.0f, 64 * unit<T>()) << i;
    } else {
      ASSERT_NEAR(got[i], expected[i], (16 * unit<T>() + 1e-5) * (1 + std::fabs(expected[i]))) << i;
    }
  }
}

template <class T>
void compare_all() {
  for (const Shape& shape : {
           Shape{{1}, {1}, 1, 1, 1},
           Shape{{5, 0, 33, 0, 0}, {5, 0, 33, 0, 0}, 2, 2, 64, true},
           Shape{{7, 20, 3}, {40, 1, 0}, 4, 2, 17},
           Shape{{35}, {66}, 2, 1, 33, false, 0.3},
           Shape{{40, 9}, {40, 9}, 2, 2, 8, true, 0.5},
           Shape{{18, 3}, {18, 3}, 1, 1, 64, true, 0.1, false, 1},
           Shape{{6, 6, 6}, {37, 2, 0}, 4, 2, 20, false, 0.0, true},
           Shape{{19, 19}, {12, 19}, 2, 2, 12, true, 0.4, true},
           Shape{{3}, {5}, 1, 1, 130},
           Shape{{9}, {9}, 1, 1, 8, false, 1.0},
       }) {
    compare_with_cpu<T>(shape);
  }
}

// Lengths on both sides of what a warp, a tile and two tiles hold.
std::vector<Shape> tensor_core_shapes() {
  return {
      Shape{
          {1, 16, 15, 0, 17, 31, 33, 0, 0}, {1, 16, 15, 0, 17, 31, 33, 0, 0}, 2, 2, 64, true, 0.1},
      Shape{{48, 65, 2}, {49, 63, 0}, 2, 1, 32},
      Shape{{16, 9}, {128, 130}, 1, 1, 64, false, 0.3},
      Shape{{128, 1, 130}, {128, 1, 130}, 1, 1, 64, true},
      Shape{{70}, {200}, 2, 1, 32, true, 0.5},
      Shape{{20, 33}, {40, 7}, 1, 1, 128, false, 0.2},
      Shape{{33, 33, 33}, {33, 18, 0}, 4, 2, 32, true, 0.1, true, 0, false},
      Shape{{9}, {9}, 1, 1, 32, false, 1.0},
  };
}

template <class T>
void compare_kinds() {
  for (const Shape& shape : tensor_core_shapes()) compare_with_cpu<T>(shape);
  Shape simple = tensor_core_shapes()[0];
  simple.tensor_cores = false;
  compare_with_cpu<T>(simple);
}

TEST(AttentionCuda, TensorCoresAgreeWithTheCpu) { compare_kinds<bfloat16>(); }
TEST(AttentionCuda, TensorCoresAgreeWithTheCpuInFloat16) { compare_kinds<half>(); }

// Attention of one head as written in textbooks, forward and backward; `round` after each operation
// that would be a tensor's.
template <class F>
std::vector<double> composition(const Problem& p, F&& round) {
  const int64_t rows = p.shape.query_lengths[0], columns = p.shape.key_lengths[0];
  const int64_t width = p.shape.head_dim;
  using Matrix = std::vector<double>;
  // c[i, j] = sum of a[i * a_row + k * a_column] * b[k * b_row + j * b_column] over k.
  const auto product = [&](const auto& a, int64_t a_row, int64_t a_column, const auto& b,
                           int64_t b_row, int64_t b_column, int64_t n, int64_t k, int64_t m) {
    Matrix c(size_t(n * m));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        double sum = 0;
        for (int64_t l = 0; l < k; ++l) {
          sum += double(a[i * a_row + l * a_column]) * b[l * b_row + j * b_column];
        }
        c[i * m + j] = round(sum);
      }
    }
    return c;
  };
  const double scale = 1.0 / std::sqrt(double(width));
  Matrix scores = product(p.query, width, 1, p.key, 1, width, rows, width, columns);
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0, top = -INFINITY;
    const auto last = p.shape.causal ? std::min(columns, i + 1) : columns;
    for (int64_t j = 0; j < last; ++j) {
      scores[i * columns + j] = round(scores[i * columns + j] * scale);
      top = std::max(top, scores[i * columns + j]);
    }
    for (int64_t j = 0; j < last; ++j) sum += std::exp(scores[i * columns + j] - top);
    for (int64_t j = 0; j < columns; ++j) {
      double& x = scores[i * columns + j];
      x = j < last ? round(std::exp(x - top) / sum) : 0.0;
    }
  }
  const Matrix& weights = scores;
  Matrix grads = product(p.grad_out, width, 1, p.value, 1, width, rows, width, columns);
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < columns; ++j) sum += weights[i * columns + j] * grads[i * columns + j];
    for (int64_t j = 0; j < columns; ++j) {
      double& x = grads[i * columns + j];
      x = round(round(weights[i * columns + j] * (x - sum)) * scale);
    }
  }
  Matrix all;
  for (const Matrix& x : {
           product(weights, columns, 1, p.value, width, 1, rows, columns, width),
           product(grads, columns, 1, p.key, width, 1, rows, columns, width),
           product(grads, 1, columns, p.query, width, 1, columns, rows, width),
           product(weights, 1, columns, p.grad_out, width, 1, columns, rows, width),
       }) {
    all.insert(all.end(), x.begin(), x.end());
  }
  return all;
}

template <class T>
void expect_precise(const Shape& shape) {
  SCOPED_TRACE(testing::Message() << shape);
  Problem p(shape);
  for (std::vector<float>* x : {&p.query, &p.key, &p.value, &p.grad_out}) {
    *x = widen(convert<T>(*x));
  }
  const std::vector<float> ours =
      widen(p.solve<T>([&](const AttentionBackwardArgs& a, float* delta) {
        EXPECT_LAUNCHED(attention_forward_cuda(a, float_type<T>(), {}, true, nullptr));
        EXPECT_LAUNCHED(attention_backward_cuda(a, float_type<T>(), {}, delta, true, nullptr));
      }));
  const std::vector<double> exact = composition(p, [](double x) { return x; });
  const std::vector<double> peer =
      composition(p, [](double x) { return double(value(rounded<T>(float(x)))); });
  // `ours` has slack rows behind each tensor.
  const size_t width = size_t(shape.head_dim);
  const size_t rows[4] = {size_t(shape.query_lengths[0]), size_t(shape.query_lengths[0]),
                          size_t(shape.key_lengths[0]), size_t(shape.key_lengths[0])};
  size_t at = 0, ours_at = 0;
  for (size_t tensor = 0; tensor < 4; ++tensor) {
    double error = 0, peer_error = 0;
    for (size_t i = 0; i < rows[tensor] * width; ++i) {
      error += std::pow(ours[ours_at + i] - exact[at + i], 2);
      peer_error += std::pow(peer[at + i] - exact[at + i], 2);
    }
    EXPECT_LE(std::sqrt(error), 2 * std::sqrt(peer_error)) << "tensor " << tensor;
    at += rows[tensor] * width;
    ours_at += (rows[tensor] + Problem::kSlack) * width;
  }
}

// With so many sequences a block takes more queries than its warps hold, one part after another.
TEST(AttentionCuda, TensorCoresTakeManySequences) {
  Shape shape{std::vector<int32_t>(1024), std::vector<int32_t>(1024), 1, 1, 32, true, 0.1};
  shape.query_lengths[3] = 150;
  shape.key_lengths[3] = 140;
  shape.query_lengths[700] = 70;
  shape.key_lengths[700] = 90;
  compare_with_cpu<bfloat16>(shape);
}

// Compute capability 8.6 and 8.9 have less of it than the longest of the short sequences take.
TEST(AttentionCuda, TensorCoresNeedLittleSharedMemory) {
  cuda_emulation::set_most_shared(99 * 1024);
  compare_with_cpu<half>(Shape{{30, 70}, {5, 100}, 1, 1, 128});
  compare_with_cpu<half>(Shape{{3}, {128}, 2, 1, 64});
  cuda_emulation::set_most_shared(227 * 1024);
}

TEST(AttentionCuda, TensorCoresAreAsPreciseAsTheComposition) {
  for (const bool causal : {false, true}) {
    expect_precise<bfloat16>(Shape{{65}, {65}, 1, 1, 64, causal});
    expect_precise<half>(Shape{{40}, {140}, 1, 1, 32, causal});
  }
}

// More than 48 KiB must be allowed on each GPU of a process, and a launch asks no more than once.
TEST(AttentionCuda, SharedMemoryIsAllowedOnceOnEachDevice) {
  const Shape shape{{3}, {128}, 1, 1, 128};
  for (const int device : {5, 6}) {
    cuda_emulation::set_device(device);
    const int before = cuda_emulation::allowed_times();
    compare_with_cpu<bfloat16>(shape);
    const int first = cuda_emulation::allowed_times();
    EXPECT_GT(first, before);
    EXPECT_LE(first, before + 3);  // forward, and backward in two sizes, for all schedules
    compare_with_cpu<bfloat16>(shape);
    EXPECT_EQ(cuda_emulation::allowed_times(), first);
  }
  cuda_emulation::set_device(0);
}

// One text says what was asked of which device, nothing else is launched, and the next call is
// well.
TEST(AttentionCuda, AFailedLaunchSaysWhatWasAsked) {
  const Problem problem(Shape{{3}, {130}, 1, 1, 256});
  std::string text;
  const auto forward = [&](const AttentionBackwardArgs& a, float*) {
    const char* const error = attention_forward_cuda(a, FloatType::float32, {}, true, nullptr);
    text = error == nullptr ? "" : error;
  };
  const auto expect = [&](const char* part) {
    problem.solve<float>(forward);
    EXPECT_NE(text.find(part), std::string::npos) << text;
    EXPECT_NE(text.find("cuda:0, compute capability 9.0"), std::string::npos) << text;
    problem.solve<float>(forward);
    EXPECT_EQ(text, "");
  };
  cuda_emulation::fail_next(209);  // cudaErrorNoKernelImageForDevice
  expect("; the kernels are compiled for compute capability ");
  cuda_emulation::fail_next(700);  // cudaErrorIllegalAddress
  expect("CUDA_LAUNCH_BLOCKING=1");
  cuda_emulation::fail_next(1);
  expect("2 x 1 blocks of 128 threads and 0 bytes of shared memory)");
  cuda_emulation::set_most_shared(64 * 1024);
  cuda_emulation::set_device(2);
  problem.solve<float>(forward);
  EXPECT_NE(text.find("(cuda:2, compute capability 9.0; 84992"), std::string::npos) << text;
  EXPECT_NE(text.find(" bytes of shared memory a block, of 65536)"), std::string::npos) << text;
  cuda_emulation::set_most_shared(227 * 1024);
  cuda_emulation::set_device(0);
  problem.solve<float>(forward);
  EXPECT_EQ(text, "");
}

TEST(AttentionCuda, AgreesWithTheCpuInFloat32) { compare_all<float>(); }
TEST(AttentionCuda, AgreesWithTheCpuInBfloat16) { compare_all<bfloat16>(); }
TEST(AttentionCuda, AgreesWithTheCpuInFloat16) { compare_all<half>(); }

// Exactly 0, forward and backward, where a query sees nothing and where there is no query; NaN
// comes out of a query that sees one, and of no other.
TEST(AttentionCuda, WhatIsMaskedIsExactlyZero) {
  const Shape shape{{4, 4}, {9, 6}, 2, 2, 16, false, 0.0, true};
  Problem problem(shape);
  const int64_t row = shape.heads * shape.head_dim;
  const auto run = [&](const AttentionBackwardArgs& a, float* delta) {
    EXPECT_LAUNCHED(attention_forward_cuda(a, FloatType::float32, {}, true, nullptr));
    EXPECT_LAUNCHED(attention_backward_cuda(a, FloatType::float32, {}, delta, true, nullptr));
  };
  std::vector<float> got = problem.solve<float>(run);
  for (const float x : got) ASSERT_FALSE(std::isnan(x));
  const size_t gradients = problem.query.size();
  for (size_t sequence : {0, 1}) {
    for (int64_t i = 0; i < row; ++i) {
      const size_t at = sequence * size_t(4 * row + 0) + size_t(i);
      EXPECT_EQ(got[at], 0.0f);
      EXPECT_EQ(got[gradients + at], 0.0f);
    }
  }
  for (int64_t j = 6; j < 9; ++j) {
    for (int64_t i = 0; i < row; ++i) {
      EXPECT_EQ(got[2 * gradients + size_t((9 + j) * row + i)], 0.0f);
    }
  }
  // Key 3 of sequence 0 is seen by query 2 alone.
  for (int64_t query = 0; query < 4; ++query) {
    problem.mask[size_t(query * 9 + 3)] = query == 2;
  }
  std::fill(problem.bias.begin(), problem.bias.end(), 0.0f);
  std::fill_n(problem.value.begin() + 3 * row, row, kNan);
  got = problem.solve<float>(run);
  for (int64_t query = 0; query < 4; ++query) {
    EXPECT_EQ(std::isnan(got[size_t(query * row)]), query == 2) << query;
  }
}

// The tensor cores multiply by weights of 0 too: without dropout, a NaN in value row j of a causal
// sequence is told to all queries from the one on that begins j's 16, and to no other sequence. The
// simple kernels tell it to queries that attend to j.
TEST(AttentionCuda, HowFarANanReaches) {
  for (const bool tensor_cores : {true, false}) {
    Problem problem(Shape{{70, 20}, {70, 20}, 1, 1, tensor_cores ? 32 : 31, true});
    const int64_t width = problem.shape.head_dim;
    const int64_t bad = 40;
    problem.value[size_t(bad * width)] = kNan;
    problem.value[size_t(bad * width + 1)] = std::numeric_limits<float>::infinity();
    const std::vector<bfloat16> out =
        problem.solve<bfloat16>([](const AttentionBackwardArgs& a, float*) {
          EXPECT_LAUNCHED(attention_forward_cuda(a, FloatType::bfloat16, {}, true, nullptr));
        });
    const int64_t from = tensor_cores ? bad / 16 * 16 : bad;
    for (int64_t i = 0; i < 90; ++i) {
      const bool reached = i >= from && i < 70;
      EXPECT_EQ(std::isnan(value(out[size_t(i * width)])), reached) << i;
      EXPECT_EQ(std::isfinite(value(out[size_t(i * width + 1)])), !reached) << i;
      EXPECT_TRUE(std::isfinite(value(out[size_t(i * width + 2)]))) << i;
    }
  }
}

}  // namespace
}  // namespace transformer_ext
