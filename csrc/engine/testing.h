// What the tests of the engine's parts share.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "engine/model.h"

namespace transformer_ext {

inline std::vector<float> random(size_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(n);
  for (float& value : values) value = normal(generator);
  return values;
}

namespace engine {

// Random weights of a small model, kept alive beside the views of them.
struct TestWeights {
  ModelConfig config;
  std::vector<std::vector<float>> memory;
  std::map<std::string, Array> arrays;

  Array operator()(const std::string& name) const {
    const auto found = arrays.find(name);
    return found == arrays.end() ? Array() : found->second;
  }
  void add(const std::string& name, const std::vector<int64_t>& shape, float scale) {
    size_t size = 1;
    for (const int64_t n : shape) size *= static_cast<size_t>(n);
    memory.push_back(random(size, static_cast<uint32_t>(memory.size()), scale));
    arrays[name] = {memory.back().data(), shape};
  }
  void linear(const std::string& name, int64_t rows, int64_t columns) {
    add(name + ".weight", {rows, columns}, 1.0f / std::sqrt(static_cast<float>(columns)));
    add(name + ".bias", {rows}, 0.1f);
  }
  void norm(const std::string& name) {
    add(name + ".weight", {config.width}, 1.0f);
    add(name + ".bias", {config.width}, 0.1f);
  }
  // Without attention to sources.
  void layer(const std::string& name) {
    linear(name + ".self_attention.in_projection", config.query_width() + 2 * config.kv_width(),
           config.width);
    linear(name + ".self_attention.out_projection", config.width, config.query_width());
    norm(name + ".self_attention_norm");
    linear(name + ".feed_forward.in_projection", config.inner, config.width);
    linear(name + ".feed_forward.out_projection", config.width, config.inner);
    norm(name + ".feed_forward_norm");
  }
};

}  // namespace engine
}  // namespace transformer_ext
