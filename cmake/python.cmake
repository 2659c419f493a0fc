# What Python loads: _ops.so and _ops_cuda.so (ops for torch), _C (pybind11, without torch), build_info.json.

# A .venv in the repository is used without being activated.
if(NOT DEFINED Python_EXECUTABLE AND NOT DEFINED ENV{VIRTUAL_ENV}
   AND EXISTS "${CMAKE_SOURCE_DIR}/.venv/bin/python")
  set(Python_EXECUTABLE "${CMAKE_SOURCE_DIR}/.venv/bin/python")
endif()
set(Python_FIND_VIRTUALENV FIRST)
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

# Torch is only looked at, never imported, and its CMake package is not used: that one would bring
# in CUDA, MKL and protobuf of the build machine. Headers and one library are all that we need.
if(NOT TRANSFORMER_EXT_TORCH)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE TRANSFORMER_EXT_TORCH OUTPUT_STRIP_TRAILING_WHITESPACE
    COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${TRANSFORMER_EXT_TORCH}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "No torch >= 2.11 for ${Python_EXECUTABLE} (looked in '${TRANSFORMER_EXT_TORCH}').\n"
    "Install it there (pip install torch), or name its folder with -DTRANSFORMER_EXT_TORCH=<...>/site-packages/torch")
endif()
file(STRINGS "${TRANSFORMER_EXT_TORCH}/version.py" torch_version REGEX "^__version__ = ")
string(REGEX REPLACE "^__version__ = ['\"](.*)['\"]$" "\\1" torch_version "${torch_version}")
file(STRINGS "${TRANSFORMER_EXT_TORCH}/version.py" torch_cuda REGEX "^cuda(:.*)? = ['\"]")
string(REGEX REPLACE "^cuda.* = ['\"](.*)['\"]$" "\\1" torch_cuda "${torch_cuda}")
message(STATUS "Torch ${torch_version} in ${TRANSFORMER_EXT_TORCH}")

# Only the stable ABI of torch 2.11 may be used; the macro makes any other torch header an error.
# So one binary loads in every later torch.
add_library(transformer_ext_torch INTERFACE)
target_include_directories(transformer_ext_torch SYSTEM INTERFACE "${TRANSFORMER_EXT_TORCH}/include")
target_compile_definitions(transformer_ext_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000ULL)
target_link_libraries(transformer_ext_torch INTERFACE
  transformer_ext_settings "${TRANSFORMER_EXT_TORCH}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX}")

file(GLOB sources CONFIGURE_DEPENDS csrc/ops.cpp csrc/*/*_op.cpp)
add_library(_ops MODULE ${sources})
set_target_properties(_ops PROPERTIES PREFIX "" LIBRARY_OUTPUT_DIRECTORY "${compiled_dir}")
target_link_libraries(_ops PRIVATE transformer_ext_kernels transformer_ext_torch)
set(compiled_targets _ops _C)

include(cmake/cuda.cmake)
if(TRANSFORMER_EXT_WITH_CUDA)
  file(GLOB device_sources CONFIGURE_DEPENDS csrc/*/*_cuda.cu)
  list(FILTER device_sources EXCLUDE REGEX "/csrc/testing/")
  file(GLOB sources CONFIGURE_DEPENDS csrc/*/*_op_cuda.cpp)
  # Kernels see neither torch nor its headers: a unit of torch headers takes nvcc half a minute.
  # nvcc 13 compiles C++20, but CMake 3.25 does not know that it does.
  add_library(transformer_ext_cuda_kernels OBJECT ${device_sources})
  set_target_properties(transformer_ext_cuda_kernels PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON)
  target_link_libraries(transformer_ext_cuda_kernels PRIVATE transformer_ext_settings)
  target_compile_options(transformer_ext_cuda_kernels PRIVATE -O3 --extended-lambda
    $<$<BOOL:${TRANSFORMER_EXT_WERROR}>:-Werror=all-warnings>)

  # The CUDA runtime is linked in (CMake's default), so that nothing ties the file to the version of
  # torch's. libtorch.so is needed although no symbol of it is: it brings libtorch_cuda.so, where
  # there is one, for the weak symbols of csrc/common/torch_op_cuda.h.
  add_library(_ops_cuda MODULE ${sources} $<TARGET_OBJECTS:transformer_ext_cuda_kernels>)
  set_target_properties(_ops_cuda PROPERTIES PREFIX "" LIBRARY_OUTPUT_DIRECTORY "${compiled_dir}"
                        LINKER_LANGUAGE CUDA)
  target_link_libraries(_ops_cuda PRIVATE transformer_ext_torch
    -Wl,--no-as-needed "${TRANSFORMER_EXT_TORCH}/lib/libtorch${CMAKE_SHARED_LIBRARY_SUFFIX}" -Wl,--as-needed)
  list(APPEND compiled_targets _ops_cuda)
endif()

execute_process(
  COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_package(pybind11 REQUIRED CONFIG)
file(GLOB sources CONFIGURE_DEPENDS csrc/bindings/*.cpp)
pybind11_add_module(_C NO_EXTRAS ${sources})
set_target_properties(_C PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${compiled_dir}")
target_link_libraries(_C PRIVATE transformer_ext_kernels)

# A stamp over the sources: at run time a source tree compares it with its own, so that a binary
# older than its source is told. Written last, once everything else is linked.
file(GLOB_RECURSE stamped CONFIGURE_DEPENDS csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh)
list(APPEND stamped "${CMAKE_SOURCE_DIR}/transformer_ext/_build_stamp.py")
list(JOIN TRANSFORMER_EXT_ISAS "," isas)
add_custom_command(
  OUTPUT "${compiled_dir}/build_info.json"
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_SOURCE_DIR}/transformer_ext/_build_stamp.py"
          "${CMAKE_SOURCE_DIR}" "${compiled_dir}/build_info.json"
          "isas=${isas}" "torch=${torch_version}" "build_type=${CMAKE_BUILD_TYPE}"
          "compiler=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
          "avx_vnni=$<BOOL:${TRANSFORMER_EXT_COMPILER_HAS_AVX_VNNI}>"
          "python=${Python_VERSION}" "platform=${CMAKE_SYSTEM_NAME} ${CMAKE_SYSTEM_PROCESSOR}"
          "cuda=${CMAKE_CUDA_COMPILER_VERSION}" "cuda_architectures=${cuda_architectures}"
          "cuda_reason=${cuda_reason}"
  DEPENDS ${stamped} ${compiled_targets}
  VERBATIM)
add_custom_target(build_info ALL DEPENDS "${compiled_dir}/build_info.json")

install(TARGETS ${compiled_targets} LIBRARY DESTINATION transformer_ext/_compiled)
install(FILES "${compiled_dir}/build_info.json" DESTINATION transformer_ext/_compiled)
install(DIRECTORY configs DESTINATION transformer_ext FILES_MATCHING PATTERN "*.yaml")
