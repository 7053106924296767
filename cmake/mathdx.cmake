# MathDx: cuSolverDx's Cholesky (and cuBLASDx's product) for csrc/cuda/solve_cusolverdx.cu, linked ahead of time.
#
#   LPLB_MATHDX    0 forbids, 1 demands; empty: in if found, with nvcc of CUDA 12.6.3 or newer
#   MATHDX_HOME    NVIDIA's tarball as download-mathdx.sh unpacks it; else the wheel nvidia-libmathdx-cu<major> beside
#                  the building interpreter
#   LPLB_CUBLASDX  ON: cuBLASDx's product as well (from the wheel; 4 to 25 seconds for each size)
#
# Both ways end in LTO-IR of the same device functions; nvlink makes machine code of it together with the kernels that
# call them. The functions are described in mathdx_lto.py. Nothing of MathDx is needed at run time.

# Ranks (padded) : threads of the block that solves them, as solve_cusolverdx.cu launches it. For potrf the library
# suggests 32, 32, 64, 64, 128, for potrs 32, 32, 32, 128, 128. At 128 ranks potrf needs 1216 bytes of stack with 128
# threads and none with 256.
set(LPLB_MATHDX_TEAMS 8:32 16:32 32:128 64:128 128:256)
# Of the targets, those with cuSolverDx: each costs a minute of one core in nvlink, the longest step of the build.
# Devices of 10.3 run machine code of 10.0; those of 12.x have next to no float64 and take the builtin algebra.
set(LPLB_MATHDX_TARGETS sm_80 sm_90 sm_100)
set(LPLB_MATHDX_OLDEST_NVCC 12.6.85)  # nvcc of CUDA 12.6.3
# 1: products and sums of these kernels, MathDx's and csrc/core's alike, may fuse. Explicit fma() is one either way.
set(LPLB_MATHDX_FMA 0)

foreach(setting LPLB_MATHDX MATHDX_HOME)
  set(${setting} "$ENV{${setting}}" CACHE STRING "see cmake/mathdx.cmake")
endforeach()
option(LPLB_CUBLASDX "cuBLASDx's product, see cmake/mathdx.cmake" OFF)
if(NOT LPLB_MATHDX MATCHES "^[01]?$")
  message(FATAL_ERROR "LPLB_MATHDX is '${LPLB_MATHDX}'; it may be 0 (without), 1 (with) or empty (with it if found)")
endif()

# What is missing, or "" and LPLB_MATHDX_VERSION, with LPLB_MATHDX_HEADERS or with LPLB_LIBMATHDX, LPLB_NVRTC_FOLDER and
# LPLB_NVRTC_VERSION.
function(lplb_find_mathdx result)
  set(LPLB_MATHDX_VERSION "" PARENT_SCOPE)
  set(${result} "" PARENT_SCOPE)
  if(LPLB_CUDA_FULL_VERSION VERSION_LESS LPLB_MATHDX_OLDEST_NVCC)
    set(${result} "nvcc ${LPLB_CUDA_FULL_VERSION} is older than ${LPLB_MATHDX_OLDEST_NVCC} of CUDA 12.6.3" PARENT_SCOPE)
    return()
  endif()
  if(NOT targets)
    set(${result} "none of ${LPLB_CUDA_CODE} is among its targets ${LPLB_MATHDX_TARGETS}" PARENT_SCOPE)
    return()
  endif()
  if(MATHDX_HOME)
    set(wanted include/cusolverdx/cusolverdx_version.hpp)
    file(GLOB header "${MATHDX_HOME}/${wanted}" "${MATHDX_HOME}/nvidia/mathdx/*/${wanted}"
         "${MATHDX_HOME}/*/nvidia/mathdx/*/${wanted}")
    if(NOT header)
      set(${result} "MATHDX_HOME: no [[*/]nvidia/mathdx/*/]${wanted} in ${MATHDX_HOME}" PARENT_SCOPE)
      return()
    endif()
    list(GET header 0 header)
    file(STRINGS "${header}" numbers REGEX "define CUSOLVERDX_VERSION_(MAJOR|MINOR|PATCH) ")
    string(REGEX MATCHALL "[0-9]+" numbers "${numbers}")
    list(JOIN numbers "." version)
    cmake_path(SET top NORMALIZE "${header}/../../..")
    if(NOT EXISTS "${top}/lib/libcusolverdx.fatbin")  # the wheel nvidia-mathdx has headers only
      set(${result} "MATHDX_HOME: no lib/libcusolverdx.fatbin in ${top}" PARENT_SCOPE)
      return()
    endif()
    set(LPLB_MATHDX_HEADERS "${top}" PARENT_SCOPE)
    set(LPLB_MATHDX_VERSION "cuSolverDx ${version}" PARENT_SCOPE)
    return()
  endif()

  string(REGEX MATCH "^([0-9]+)\\.([0-9]+)" release "${LPLB_CUDA_VERSION}")
  set(major "${CMAKE_MATCH_1}")
  set(minor "${CMAKE_MATCH_2}")
  lplb_nvidia_wheels(wheels)
  set(library "")
  set(builtins "")
  foreach(folder IN LISTS wheels)
    file(GLOB found "${folder}/cu${major}/lib/libmathdx.so.[0-9]*")
    list(APPEND library ${found})
    file(GLOB found "${folder}/*/lib/libnvrtc-builtins.so.${major}.*")
    list(APPEND builtins ${found})
  endforeach()
  if(NOT library)
    set(${result} "neither MATHDX_HOME nor the wheel nvidia-libmathdx-cu${major} beside ${Python_EXECUTABLE}"
        PARENT_SCOPE)
    return()
  endif()
  # NVRTC writes the LTO-IR; nvlink reads that of its own and of earlier minors.
  file(GLOB found "${LPLB_CUDA_TOP}/lib64/libnvrtc-builtins.so.${major}.*"
       "${LPLB_CUDA_TOP}/lib/libnvrtc-builtins.so.${major}.*")
  set(nvrtc "")
  set(seen "")
  foreach(file IN LISTS builtins found)
    if(file MATCHES "^(.*)/libnvrtc-builtins\\.so\\.${major}\\.([0-9]+)$")
      list(APPEND seen "${major}.${CMAKE_MATCH_2}")
      if(NOT CMAKE_MATCH_2 GREATER minor AND NOT nvrtc AND EXISTS "${CMAKE_MATCH_1}/libnvrtc.so.${major}")
        set(nvrtc "${CMAKE_MATCH_1}")
        set(LPLB_NVRTC_FOLDER "${nvrtc}")
        set(LPLB_NVRTC_VERSION "${major}.${CMAKE_MATCH_2}")
      endif()
    endif()
  endforeach()
  if(NOT nvrtc)
    set(${result} "libmathdx needs NVRTC ${major}.0 to ${LPLB_CUDA_VERSION} (nvidia-cuda-nvrtc), found '${seen}'"
        PARENT_SCOPE)
    return()
  endif()
  list(GET library 0 library)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/mathdx_lto.py" "${library}" "${nvrtc}"
            "${LPLB_NVRTC_VERSION}" version
    RESULT_VARIABLE failed OUTPUT_VARIABLE version ERROR_VARIABLE said OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(failed)
    set(${result} "${library} does not load: ${said}" PARENT_SCOPE)
    return()
  endif()
  set(LPLB_LIBMATHDX "${library}" PARENT_SCOPE)
  set(LPLB_NVRTC_FOLDER "${nvrtc}" PARENT_SCOPE)
  set(LPLB_NVRTC_VERSION "${LPLB_NVRTC_VERSION}" PARENT_SCOPE)
  set(LPLB_MATHDX_VERSION "${version}" PARENT_SCOPE)
endfunction()

set(targets "${LPLB_CUDA_MACHINE_CODE}")
foreach(target IN LISTS LPLB_CUDA_MACHINE_CODE)
  if(NOT target IN_LIST LPLB_MATHDX_TARGETS)
    list(REMOVE_ITEM targets "${target}")
  endif()
endforeach()
set(LPLB_MATHDX_VERSION "")
set(why "LPLB_MATHDX=0")
if(NOT LPLB_MATHDX STREQUAL "0")
  lplb_find_mathdx(why)
endif()
if(LPLB_MATHDX_VERSION STREQUAL "")
  if(LPLB_MATHDX STREQUAL "1")
    message(FATAL_ERROR "LPLB_MATHDX=1, but ${why}")
  endif()
  message(STATUS "lplb: without MathDx: ${why}")
  return()
endif()
if(LPLB_CUBLASDX AND LPLB_MATHDX_HEADERS)
  message(FATAL_ERROR "LPLB_CUBLASDX=ON needs the wheel nvidia-libmathdx; MATHDX_HOME is ${MATHDX_HOME}")
endif()
message(STATUS "lplb: with MathDx ${LPLB_MATHDX_VERSION}")

# Generations needed, for nvcc -dc, and targets, for nvcc -dlink.
set(generations "")
set(lto_code "")
set(machine_code "")
foreach(target IN LISTS targets)
  string(REGEX REPLACE "^sm_" "" number "${target}")
  list(APPEND machine_code -gencode "arch=compute_${number},code=sm_${number}")
  lplb_generation("${target}" generation)
  list(APPEND generations "${generation}")
endforeach()
list(REMOVE_DUPLICATES generations)
list(SORT generations COMPARE NATURAL)
list(GET generations 0 oldest)  # whose functions serve all: nvlink makes the same bytes of those for 80 and for 90
foreach(generation IN LISTS generations)
  list(APPEND lto_code -gencode "arch=compute_${generation},code=lto_${generation}")
endforeach()

set(functions potrf potrs1 potrs2)
set(definitions LPLB_HAVE_CUSOLVERDX)
if(LPLB_CUBLASDX)
  list(APPEND functions gemm)
  list(APPEND definitions LPLB_HAVE_CUBLASDX)
endif()
set(folder "${CMAKE_CURRENT_BINARY_DIR}/mathdx")
file(MAKE_DIRECTORY "${folder}")
set(linked "")  # what nvlink gets beside the kernels
set(lto_objects "")
# NOTE: nvlink takes LTO-IR of one -fmad only, and MathDx's has fmad=true; what decides is the -fma nvlink hands on.
set(lto_words -dc -fmad=true ${lto_code})

if(LPLB_MATHDX_HEADERS)
  # NOTE: written from NVIDIA's documentation; the tarball was never at hand to compile it.
  set(source "#include <cusolverdx.hpp>
#ifdef __CUDA_ARCH__
constexpr unsigned kSm = __CUDA_ARCH__;
#else
constexpr unsigned kSm = 800;
#endif
using namespace cusolverdx;
template <unsigned kThreads>
using Place = decltype(Precision<double>() + Type<type::real>() + FillMode<fill_mode::lower>() + SM<kSm>() + Block() +
                       BlockDim<kThreads>());
")
  foreach(team IN LISTS LPLB_MATHDX_TEAMS)
    string(REGEX MATCH "^(.*):(.*)$" team "${team}")
    set(n "${CMAKE_MATCH_1}")
    set(place "Place<${CMAKE_MATCH_2}>()")
    string(APPEND source "
extern \"C\" __device__ void lplb_potrf_${n}(double* a, int* info) {
  decltype(Size<${n}, ${n}>() + Function<potrf>() + Arrangement<col_major>() + ${place})().execute(a, info);
}
")
    foreach(columns 1 2)
      string(APPEND source "extern \"C\" __device__ void lplb_potrs${columns}_${n}(double* a, double* b) {
  decltype(Size<${n}, ${n}, ${columns}>() + Function<potrs>() + Arrangement<col_major, col_major>() +
           ${place})().execute(a, b);
}
")
    endforeach()
  endforeach()
  file(CONFIGURE OUTPUT mathdx/functions.cu CONTENT "${source}" @ONLY)
  lplb_add_cuda("${folder}/functions.cu" ${lto_words} --expt-relaxed-constexpr
                "-I${LPLB_MATHDX_HEADERS}/include" "-I${LPLB_MATHDX_HEADERS}/external/cutlass/include")
  list(APPEND lto_objects "${CMAKE_CURRENT_BINARY_DIR}/cuda/functions.o")
  list(APPEND linked "${LPLB_MATHDX_HEADERS}/lib/libcusolverdx.fatbin")
else()
  set(writer "${CMAKE_CURRENT_LIST_DIR}/mathdx_lto.py")
  set(write "${Python_EXECUTABLE}" "${writer}" "${LPLB_LIBMATHDX}" "${LPLB_NVRTC_FOLDER}" "${LPLB_NVRTC_VERSION}")
  set(needs "${writer}" "${LPLB_LIBMATHDX}")
  add_custom_command(OUTPUT "${folder}/cusolverdx.fatbin" COMMAND ${write} library "${folder}/cusolverdx.fatbin"
                     DEPENDS ${needs} COMMENT "cuSolverDx library" VERBATIM)
  list(APPEND linked "${folder}/cusolverdx.fatbin")
  foreach(team IN LISTS LPLB_MATHDX_TEAMS)
    string(REPLACE ":" ";" team "${team}")
    list(GET team 0 n)
    list(GET team 1 threads)
    list(TRANSFORM functions REPLACE "(.+)" "${folder}/\\1_${n}.ltoir" OUTPUT_VARIABLE files)
    list(TRANSFORM functions REPLACE "(.+)" "\\1=${folder}/\\1_${n}.ltoir" OUTPUT_VARIABLE pairs)
    add_custom_command(OUTPUT ${files} COMMAND ${write} functions ${n} ${threads} ${oldest} ${pairs}
                       DEPENDS ${needs} COMMENT "MathDx for ${n} ranks" VERBATIM)
    foreach(function IN LISTS functions)
      set(name "${folder}/${function}_${n}")
      add_custom_command(OUTPUT "${name}.fatbin"
                         COMMAND "${LPLB_CUDA_TOP}/bin/fatbinary" -64 "--create=${name}.fatbin"
                                 "--image3=kind=nvvm,sm=${oldest},file=${name}.ltoir"
                         DEPENDS "${name}.ltoir" COMMENT "fatbinary ${function}_${n}" VERBATIM)
      list(APPEND linked "${name}.fatbin")
    endforeach()
  endforeach()
endif()

# nvlink finds libnvvm only in nvvm/lib64 of its toolkit, which ones made of wheels lack: there, links stand for them.
set(linker "${LPLB_CUDA_TOP}/bin/nvcc")
if(NOT EXISTS "${LPLB_CUDA_TOP}/nvvm/lib64/libnvvm.so")
  file(GLOB nvvm "${LPLB_CUDA_TOP}/lib64/libnvvm.so*" "${LPLB_CUDA_TOP}/lib/libnvvm.so*"
       "${LPLB_CUDA_TOP}/nvvm/lib64/libnvvm.so*")
  if(NOT nvvm)
    message(FATAL_ERROR "MathDx needs libnvvm.so, which is in none of nvvm/lib64, lib64 and lib of ${LPLB_CUDA_TOP}; "
                        "LPLB_MATHDX=0 builds without")
  endif()
  set(links "${folder}/toolkit")
  file(REMOVE_RECURSE "${links}")
  file(MAKE_DIRECTORY "${links}/bin" "${links}/nvvm/lib64")
  foreach(inside . bin nvvm)
    file(GLOB entries RELATIVE "${LPLB_CUDA_TOP}/${inside}" "${LPLB_CUDA_TOP}/${inside}/*")
    list(REMOVE_ITEM entries bin nvvm lib64)
    foreach(entry IN LISTS entries)
      file(CREATE_LINK "${LPLB_CUDA_TOP}/${inside}/${entry}" "${links}/${inside}/${entry}" SYMBOLIC)
    endforeach()
  endforeach()
  file(CREATE_LINK "${links}/lib" "${links}/lib64" SYMBOLIC)
  list(GET nvvm 0 nvvm)
  file(CREATE_LINK "${nvvm}" "${links}/nvvm/lib64/libnvvm.so" SYMBOLIC)
  set(linker "${links}/bin/nvcc")
endif()

foreach(team IN LISTS LPLB_MATHDX_TEAMS)
  string(REGEX REPLACE "(.*):(.*)" "LPLB_CUSOLVERDX_THREADS_\\1=\\2" team "${team}")
  list(APPEND definitions "${team}")
endforeach()
list(TRANSFORM definitions PREPEND "-D" OUTPUT_VARIABLE defined)
lplb_add_cuda(csrc/cuda/solve_cusolverdx.cu ${lto_words} ${defined})
list(APPEND lto_objects "${CMAKE_CURRENT_BINARY_DIR}/cuda/solve_cusolverdx.o")
set(object "${CMAKE_CURRENT_BINARY_DIR}/cuda/solve_cusolverdx_link.o")
add_custom_command(
  OUTPUT "${object}"
  COMMAND "${linker}" ${LPLB_NVCC_WORDS} -dlink -dlto ${machine_code} -Xcompiler=-fPIC
          -Xnvlink=-Xnvvm=-fma=${LPLB_MATHDX_FMA} ${lto_objects} ${linked} -o "${object}"
  DEPENDS ${lto_objects} ${linked} COMMENT "nvlink solve_cusolverdx.o" VERBATIM)
list(APPEND LPLB_CUDA_OBJECTS "${object}")

string(REPLACE ";" "\\;" targets "${targets}")
target_compile_definitions(lplb_module PRIVATE ${definitions} "LPLB_MATHDX_VERSION=\"${LPLB_MATHDX_VERSION}\""
                                               "LPLB_CUSOLVERDX_TARGETS=\"${targets}\"")
