// One step of the decoder's attention, in 6 layers of 8 heads of 64: to the source, and to the
// cache of earlier positions, laid out as the decoder does. Between two steps the weights of the
// model go through the caches of the machine: here each step takes another copy of the problem, so
// many that none is in a cache when it is used again. The bytes are those of the keys and values,
// each once for all beams that have it in common: reading as many of memory in sequence is the
// ceiling.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "ceiling.h"
#include "common/bfloat16.h"
#include "common/thread_pool.h"
#include "engine/cached_attention.h"

namespace transformer_ext {
namespace {

constexpr int64_t kLayers = 6;
constexpr int64_t kHeads = 8;
constexpr int64_t kHeadDim = 64;
constexpr int64_t kWidth = kHeads * kHeadDim;

// The beams have all but so many of the last positions in common.
constexpr int64_t kOwn = 4;

template <class T>
class Problem {
 public:
  Problem(int64_t sentences, int64_t beams, int64_t length, bool source)
      : sentences_(sentences),
        beams_(beams),
        length_(length),
        query_(static_cast<size_t>(sentences * beams * kWidth)),
        out_(query_.size()) {
    for (float& x : query_) x = number();
    const int64_t own = source ? 0 : std::min(kOwn, length);
    shared_ = beams == 1 ? length : length - own;
    bytes_ = static_cast<double>(sizeof(T)) * 2 * kWidth * kLayers *
             static_cast<double>(sentences * (shared_ + beams * (length - shared_)));
    if (source) {
      layer_stride_ = sentences * length * 2 * kWidth;
      add_block(kLayers * layer_stride_);
      path_stride_ = 0;
      for (int64_t i = 0; i < sentences * length; ++i) {
        paths_.push_back(blocks_[0].data() + i * 2 * kWidth);
      }
    } else {
      layer_stride_ = 2 * kWidth;
      path_stride_ = length;
      const int64_t row_stride = kLayers * layer_stride_;
      for (int64_t i = 0; i < length; ++i) add_block(sentences * beams * row_stride);
      for (int64_t row = 0; row < sentences * beams; ++row) {
        for (int64_t i = 0; i < length; ++i) {
          const int64_t at = i < shared_ ? row / beams * beams : row;
          paths_.push_back(blocks_[static_cast<size_t>(i)].data() + at * row_stride);
        }
      }
    }
  }

  void run(Parallel& parallel) {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      parallel.for_each(sentences_, [&](int64_t sentence) {
        CachedAttention a{};
        a.query = query_.data() + sentence * beams_ * kWidth;
        a.out = out_.data() + sentence * beams_ * kWidth;
        a.query_stride = a.out_stride = kWidth;
        a.rows = beams_;
        a.paths = paths_.data() + sentence * (path_stride_ == 0 ? 1 : beams_) * length_;
        a.path_stride = path_stride_;
        a.shared = shared_;
        a.length = length_;
        a.key_offset = layer * layer_stride_;
        a.value_offset = a.key_offset + kWidth;
        a.bfloat16 = sizeof(T) == 2;
        a.heads = a.kv_heads = kHeads;
        a.head_dim = kHeadDim;
        a.kv_end = kHeads;
        a.scale = 0.125f;
        cached_attention_kernels().attend(a);
      });
    }
  }

  double bytes() const { return bytes_; }

 private:
  static float number() { return static_cast<float>(std::rand() % 2001 - 1000) * 1e-3f; }

  void add_block(int64_t size) {
    blocks_.emplace_back(static_cast<size_t>(size));
    for (T& x : blocks_.back()) x = from_float<T>(number());
  }

  int64_t sentences_, beams_, length_, shared_, layer_stride_, path_stride_;
  double bytes_;
  Aligned<float> query_, out_;
  std::vector<Aligned<T>> blocks_;
  std::vector<const void*> paths_;
};

template <class T>
void run(benchmark::State& state, bool source) {
  std::vector<Problem<T>> problems;
  do {
    problems.emplace_back(state.range(0), state.range(1), state.range(2), source);
  } while (problems[0].bytes() * static_cast<double>(problems.size()) < kColdBytes);
  ThreadPool pool(static_cast<int>(state.range(3)));
  size_t next = 0;
  against_read(state, problems[0].bytes(), pool,
               [&] { problems[next++ % problems.size()].run(pool); });
}

template <class T>
void cached_attention_source(benchmark::State& state) {
  run<T>(state, true);
}

template <class T>
void cached_attention_self(benchmark::State& state) {
  run<T>(state, false);
}

void shapes(benchmark::internal::Benchmark* b, const std::vector<int64_t>& lengths) {
  b->ArgNames({"sentences", "beams", "length", "threads"})->Apply(in_turns);
  for (const int64_t sentences : {1, 64}) {
    for (const int64_t beams : {1, 4, 5}) {
      for (const int64_t length : lengths) {
        for (const int64_t threads : {1, 2}) {
          if (sentences > 1 || threads == 1) b->Args({sentences, beams, length, threads});
        }
      }
    }
  }
}

void source_shapes(benchmark::internal::Benchmark* b) { shapes(b, {27}); }
void self_shapes(benchmark::internal::Benchmark* b) { shapes(b, {13, 27, 100}); }

BENCHMARK_TEMPLATE(cached_attention_source, float)->Apply(source_shapes);
BENCHMARK_TEMPLATE(cached_attention_source, bfloat16)->Apply(source_shapes);
BENCHMARK_TEMPLATE(cached_attention_self, float)->Apply(self_shapes);
BENCHMARK_TEMPLATE(cached_attention_self, bfloat16)->Apply(self_shapes);

}  // namespace
}  // namespace transformer_ext
