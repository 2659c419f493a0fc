#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace transformer_ext {

namespace {

#if defined(__x86_64__)
// By hand: not all compilers that we build with have a name for it in __builtin_cpu_supports.
bool has_avx_vnni() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || eax < 1) return false;
  __cpuid_count(7, 1, eax, ebx, ecx, edx);
  return (eax >> 4 & 1) != 0;
}
#endif

CpuFeatures detect() {
  CpuFeatures f;
#if defined(__x86_64__)
  __builtin_cpu_init();
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512cd");
  f.avx_vnni = f.avx2 && has_avx_vnni();
  f.vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
  f.bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return f;
}

Isa choose() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("TRANSFORMER_EXT_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i <= static_cast<int>(Isa::avx512_bf16); ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (std::string(wanted) != isa_name(isa)) continue;
    if (isa > best) {
      throw std::runtime_error(std::string("TRANSFORMER_EXT_ISA=") + wanted +
                               ": this machine does not have it; the best it has is " +
                               isa_name(best));
    }
    return isa;
  }
  throw std::runtime_error(std::string("TRANSFORMER_EXT_ISA=") + wanted +
                           ": expected one of baseline, avx2, avx512, avx512_bf16");
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

Isa best_isa() {
  const CpuFeatures& f = cpu_features();
  if (f.bf16 && f.vnni) return Isa::avx512_bf16;
  if (f.avx512) return Isa::avx512;
  if (f.avx2) return Isa::avx2;
  return Isa::baseline;
}

Isa active_isa() {
  static const Isa isa = choose();
#if defined(TRANSFORMER_EXT_ONLY_ISA)
  if (isa != Isa::TRANSFORMER_EXT_ONLY_ISA) {
    throw std::runtime_error(std::string("this build has the kernels of ") +
                             isa_name(Isa::TRANSFORMER_EXT_ONLY_ISA) + " alone, not of " +
                             isa_name(isa));
  }
#endif
  return isa;
}

bool has_vnni(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return false;
    case Isa::avx2:
      return cpu_features().avx_vnni;
    case Isa::avx512:
    case Isa::avx512_bf16:
      return cpu_features().vnni;
  }
  return false;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

}  // namespace transformer_ext
