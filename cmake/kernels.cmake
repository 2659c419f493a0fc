# transformer_ext_kernels: everything that knows neither torch nor Python.

file(GLOB sources CONFIGURE_DEPENDS csrc/*/*.cpp)
list(FILTER sources EXCLUDE REGEX "_(cpu|op|op_cuda|test)\\.cpp$|/csrc/bindings/")
add_library(transformer_ext_kernels STATIC ${sources})
target_link_libraries(transformer_ext_kernels PUBLIC transformer_ext_settings)

file(GLOB cpu_sources CONFIGURE_DEPENDS csrc/*/*_cpu.cpp)

# The names and their order are those of csrc/common/isa.h.
set(TRANSFORMER_EXT_ISAS baseline)
set(flags_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND TRANSFORMER_EXT_ISAS avx2 avx512 avx512_bf16)
  set(flags_avx2 -mavx2 -mfma -mf16c)
  set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd
      -mprefer-vector-width=512)
  set(flags_avx512_bf16 ${flags_avx512} -mavx512bf16 -mavx512vnni)
endif()

foreach(isa IN LISTS TRANSFORMER_EXT_ISAS)
  if(cpu_sources)
    set(target transformer_ext_kernels_${isa})
    add_library(${target} OBJECT ${cpu_sources})
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
