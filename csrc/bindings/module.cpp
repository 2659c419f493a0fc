// The Python module `transformer_ext._C`: what works without torch.
#include <pybind11/pybind11.h>

#include "common/isa.h"
#include "common/thread_pool.h"
#include "engine_binding.h"
#include "gemm/gemm.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  namespace tx = transformer_ext;
  m.doc() = "Compiled parts of transformer_ext that do not need torch.";
  m.def(
      "isa", [] { return tx::isa_name(tx::active_isa()); },
      "Name of the instruction set whose kernels are in use.");
  m.def(
      "best_isa", [] { return tx::isa_name(tx::best_isa()); },
      "Name of the highest instruction set that this machine has kernels for.");
  m.def(
      "cpu_features",
      [] {
        const tx::CpuFeatures& f = tx::cpu_features();
        py::dict features;
        features["avx2"] = f.avx2;
        features["avx512"] = f.avx512;
        features["avx_vnni"] = f.avx_vnni;
        features["vnni"] = f.vnni;
        features["bf16"] = f.bf16;
        features["amx_bf16"] = f.amx_bf16;
        return features;
      },
      "Instruction sets found by CPUID, as a dict of name to bool.");
  m.def(
      "has_bfloat16", [] { return tx::gemm_has(tx::GemmType::bfloat16); },
      "Whether the instruction set in use multiplies bfloat16.");
  m.def(
      "prefers_int8", [] { return tx::gemm_prefers_int8(); },
      "Whether 8-bit integers are the fastest that the instruction set in use multiplies.");
  m.def(
      "int8_instruction", [] { return tx::gemm_int8_instruction(); },
      "Name of the instruction that multiplies 8-bit integers.");
  m.def("default_threads", &tx::default_thread_count,
        "min(physical cores, cores this process may run on, cgroup CPU quota), at least 1.");
  tx::bind_engine(m);
}
