# The CUDA kernels compiled for the CPU, into csrc_tests alone (csrc/testing/cuda_emulation.h). Each .cu
# file is included by a .cpp of its own, so that no language is set for a file that nvcc may compile
# too.

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/*/*_cuda.cu)
if(NOT TRANSFORMER_EXT_CUDA_EMULATION)
  list(FILTER cuda_sources INCLUDE REGEX "/csrc/testing/")
endif()
set(cuda_emulation_sources csrc/testing/cuda_emulation.cpp)
foreach(source IN LISTS cuda_sources)
  file(RELATIVE_PATH name "${CMAKE_SOURCE_DIR}/csrc" "${source}")
  set(wrapper "${CMAKE_BINARY_DIR}/cuda_emulation/${name}.cpp")
  file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"${name}\"\n")
  list(APPEND cuda_emulation_sources "${wrapper}")
endforeach()
add_library(transformer_ext_cuda_emulation OBJECT ${cuda_emulation_sources})
target_link_libraries(transformer_ext_cuda_emulation PRIVATE transformer_ext_settings)
target_include_directories(transformer_ext_cuda_emulation BEFORE PRIVATE csrc/testing/cuda_emulation)
target_compile_definitions(transformer_ext_cuda_emulation PRIVATE TRANSFORMER_EXT_CUDA_EMULATION)
# -O3 takes twice as long to compile.
target_compile_options(transformer_ext_cuda_emulation PRIVATE -Wno-unknown-pragmas
  $<$<CONFIG:Release>:-O1>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC does not see that a lane uses what it has loaded under the same condition.
  target_compile_options(transformer_ext_cuda_emulation PRIVATE -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
if(TRANSFORMER_EXT_SANITIZE MATCHES "thread")
  # It tells ThreadSanitizer what orders the kernels' threads; its own memory is none of theirs.
  set_source_files_properties(csrc/testing/cuda_emulation.cpp PROPERTIES
    COMPILE_OPTIONS -fno-sanitize=thread COMPILE_DEFINITIONS TRANSFORMER_EXT_THREAD_SANITIZER)
endif()
target_sources(csrc_tests PRIVATE $<TARGET_OBJECTS:transformer_ext_cuda_emulation>)
