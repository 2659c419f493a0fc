# transformer_ext_kernels: everything that knows neither torch nor Python.

file(GLOB sources CONFIGURE_DEPENDS csrc/*/*.cpp)
list(FILTER sources EXCLUDE REGEX "_(cpu|op|op_cuda|test)\\.cpp$|/csrc/(bindings|testing)/")
add_library(transformer_ext_kernels STATIC ${sources})
target_link_libraries(transformer_ext_kernels PUBLIC transformer_ext_settings)

file(GLOB cpu_sources CONFIGURE_DEPENDS csrc/*/*_cpu.cpp)

# The names are those of csrc/common/isa.h: the levels in their order, then those for integers alone.
set(TRANSFORMER_EXT_ISAS baseline)
set(TRANSFORMER_EXT_INT8_ISAS "")
set(flags_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND TRANSFORMER_EXT_ISAS avx2 avx512 avx512_bf16)
  set(flags_avx2 -mavx2 -mfma -mf16c)
  set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd
      -mprefer-vector-width=512)
  set(flags_avx512_bf16 ${flags_avx512} -mavx512bf16 -mavx512vnni)
  set(TRANSFORMER_EXT_INT8_ISAS avx2_vnni avx512_vnni)
  set(flags_avx512_vnni ${flags_avx512} -mavx512vnni)
  # GCC 11, Clang 12 and binutils 2.36 have it. Compiled by others, avx2_vnni is what avx2 is.
  set(flags_avx2_vnni ${flags_avx2})
  include(CheckCXXSourceCompiles)
  set(CMAKE_REQUIRED_FLAGS "-mavx2 -mavxvnni")
  check_cxx_source_compiles("
    #include <immintrin.h>
    int main(int n, char**) {
      const __m256i v = _mm256_set1_epi32(n);
      return _mm256_extract_epi32(_mm256_dpbusd_avx_epi32(v, v, v), 0);
    }" TRANSFORMER_EXT_COMPILER_HAS_AVX_VNNI)
  unset(CMAKE_REQUIRED_FLAGS)
  if(TRANSFORMER_EXT_COMPILER_HAS_AVX_VNNI)
    list(APPEND flags_avx2_vnni -mavxvnni)
  endif()
endif()

if(TRANSFORMER_EXT_ONLY_ISA)
  if(NOT TRANSFORMER_EXT_ONLY_ISA IN_LIST TRANSFORMER_EXT_ISAS)
    message(FATAL_ERROR
      "TRANSFORMER_EXT_ONLY_ISA: got '${TRANSFORMER_EXT_ONLY_ISA}', expected one of ${TRANSFORMER_EXT_ISAS}")
  endif()
  target_compile_definitions(transformer_ext_settings INTERFACE
    TRANSFORMER_EXT_ONLY_ISA=${TRANSFORMER_EXT_ONLY_ISA})
endif()

foreach(isa IN LISTS TRANSFORMER_EXT_ISAS TRANSFORMER_EXT_INT8_ISAS)
  set(isa_sources ${cpu_sources})
  if(isa IN_LIST TRANSFORMER_EXT_INT8_ISAS)
    list(FILTER isa_sources INCLUDE REGEX "_int8_cpu\\.cpp$")
  endif()
  if(TRANSFORMER_EXT_ONLY_ISA AND NOT isa STREQUAL TRANSFORMER_EXT_ONLY_ISA)
    # Tests of products compare all levels in one process.
    list(FILTER isa_sources INCLUDE REGEX "/gemm/")
  endif()
  if(isa_sources)
    set(target transformer_ext_kernels_${isa})
    add_library(${target} OBJECT ${isa_sources})
    target_link_libraries(${target} PRIVATE transformer_ext_settings)
    target_compile_definitions(${target} PRIVATE TRANSFORMER_EXT_ISA=${isa})
    target_compile_options(${target} PRIVATE ${flags_${isa}})
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # GCC 12 takes the undefined lanes inside its own AVX-512 intrinsics for a mistake of ours
      # (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593), and warns that vectors wider than the
      # target's are passed otherwise than before GCC 4.6, which no other compiler unit here sees.
      target_compile_options(${target} PRIVATE -Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi)
    endif()
    target_sources(transformer_ext_kernels PRIVATE $<TARGET_OBJECTS:${target}>)
  endif()
endforeach()
