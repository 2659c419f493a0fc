#pragma once

namespace transformer_ext {

enum class Activation : int {
  relu = 0,
  gelu = 1,       // x * Phi(x), by the error function
  gelu_tanh = 2,  // its approximation by tanh
  silu = 3,       // x * sigmoid(x)
  swiglu = 4,     // silu(gate) * up
  geglu = 5,      // gelu(gate) * up
  reglu = 6,      // relu(gate) * up
};
constexpr int kActivations = 7;

[[maybe_unused]] static inline bool is_gated(Activation kind) { return kind >= Activation::swiglu; }

}  // namespace transformer_ext
