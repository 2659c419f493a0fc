// Run-time choice of the instruction set.
//
// Every `csrc/<subject>/<subject>_cpu.cpp` is compiled once per instruction set, each time with
// TRANSFORMER_EXT_ISA set to one of the names below, and puts its kernels into the namespace of
// that name behind one constant table of function pointers. The table is chosen once, at start.
// `csrc/<subject>/<subject>_int8_cpu.cpp` is compiled twice more, as avx2_vnni and avx512_vnni,
// which stand in for avx2 and avx512 where the machine has_vnni().
#pragma once

#include <cstdint>
#include <string>

namespace transformer_ext {

// In ascending order: a machine that runs one runs all before it.
enum class Isa : int {
  baseline = 0,     // what the compiler's default target has (x86-64: SSE2, aarch64: NEON)
  avx2 = 1,         // AVX2 + FMA + F16C
  avx512 = 2,       // AVX-512 F, BW, DQ, VL, CD
  avx512_bf16 = 3,  // the same + AVX512_BF16 + AVX512_VNNI
};

// Instruction sets beyond the levels, each its own flag because not every machine has all.
struct CpuFeatures {
  bool avx2 = false;
  bool avx512 = false;
  bool avx_vnni = false;  // AVX-VNNI: in 256 bits, without AVX-512
  bool vnni = false;      // AVX512_VNNI
  bool bf16 = false;      // AVX512_BF16
  bool amx_bf16 = false;
};

const CpuFeatures& cpu_features();

// The level in use. TRANSFORMER_EXT_ISA=<name> lowers it for tests. Throws std::runtime_error when
// the variable names an unknown level or one that this machine (or this build) lacks.
Isa active_isa();
Isa best_isa();
const char* isa_name(Isa isa);

// Whether the machine has VNNI, the dot products of 8-bit integers, in vectors of the level. That
// is no level of its own, because there would be no order: machines with it in AVX-512 lack it in
// AVX2, and the other way round.
bool has_vnni(Isa isa);

}  // namespace transformer_ext

// The end of a function that returns the table in use. With CMake's TRANSFORMER_EXT_ONLY_ISA no
// other level is linked; active_isa() throws where another is wanted.
#if defined(TRANSFORMER_EXT_ONLY_ISA)
#define TRANSFORMER_EXT_RETURN_IN_USE(Type, name) \
  active_isa();                                   \
  return TRANSFORMER_EXT_ONLY_ISA::name;
#else
#define TRANSFORMER_EXT_RETURN_IN_USE(Type, name)                                   \
  static const Type* const tables[] = {&baseline::name, &avx2::name, &avx512::name, \
                                       &avx512_bf16::name};                         \
  return *tables[static_cast<int>(active_isa())];
#endif

// TRANSFORMER_EXT_KERNELS(AttentionKernels, attention_kernels) declares the table
// `<isa>::attention_kernels` of every level and `attention_kernels()`, the one in use.
#if defined(__x86_64__)
#define TRANSFORMER_EXT_KERNELS(Type, name) \
  namespace baseline {                      \
  extern const Type name;                   \
  }                                         \
  namespace avx2 {                          \
  extern const Type name;                   \
  }                                         \
  namespace avx512 {                        \
  extern const Type name;                   \
  }                                         \
  namespace avx512_bf16 {                   \
  extern const Type name;                   \
  }                                         \
  [[maybe_unused]] static const Type& name() { TRANSFORMER_EXT_RETURN_IN_USE(Type, name) }

// The same for the table of a *_int8_cpu.cpp.
#define TRANSFORMER_EXT_INT8_KERNELS(Type, name)                                       \
  namespace baseline {                                                                 \
  extern const Type name;                                                              \
  }                                                                                    \
  namespace avx2 {                                                                     \
  extern const Type name;                                                              \
  }                                                                                    \
  namespace avx2_vnni {                                                                \
  extern const Type name;                                                              \
  }                                                                                    \
  namespace avx512 {                                                                   \
  extern const Type name;                                                              \
  }                                                                                    \
  namespace avx512_vnni {                                                              \
  extern const Type name;                                                              \
  }                                                                                    \
  namespace avx512_bf16 {                                                              \
  extern const Type name;                                                              \
  }                                                                                    \
  [[maybe_unused]] static const Type& name() {                                         \
    static const Type* const tables[][2] = {{&baseline::name, &baseline::name},        \
                                            {&avx2::name, &avx2_vnni::name},           \
                                            {&avx512::name, &avx512_vnni::name},       \
                                            {&avx512_bf16::name, &avx512_bf16::name}}; \
    return *tables[static_cast<int>(active_isa())][has_vnni(active_isa()) ? 1 : 0];    \
  }
#else
#define TRANSFORMER_EXT_KERNELS(Type, name) \
  namespace baseline {                      \
  extern const Type name;                   \
  }                                         \
  [[maybe_unused]] static const Type& name() { return baseline::name; }
#define TRANSFORMER_EXT_INT8_KERNELS(Type, name) TRANSFORMER_EXT_KERNELS(Type, name)
#endif
