# The CUDA backend: finds nvcc, compiles the kernels in csrc/cuda to LPLB_CUDA_OBJECTS.
#
#   LPLB_CUDA          0 forbids, 1 demands; empty: in if nvcc is found
#   CUDA_HOME          the toolkit; else nvcc on PATH, else NVIDIA's wheels beside the building interpreter
#   LPLB_CUDA_TARGETS  what to build, as "80 90 compute_90"; empty: LPLB_CUDA_DEFAULT_TARGETS
#   LPLB_NVCC_FLAGS    further words for nvcc, "-Xptxas -v" say
#
# One command per source, not CMake's CUDA language: that links a trial program at configure time, which toolkits made
# of wheels (lib, no lib64) fail.
set(LPLB_CUDA_OLDEST 12.0)
set(LPLB_CUDA_DEFAULT_TARGETS 80 90 100 103 120)  # machine code, of those that nvcc knows
set(LPLB_CUDA_DEFAULT_PTX 90)                     # or the newest before it: what newer devices compile when first used
# What sources are compiled for: a target takes the newest that is not newer than it is. Machine code for all that share
# one is made of the same PTX, which halves the build; csrc has nothing that only later generations could use.
set(LPLB_CUDA_GENERATIONS 80 90)

foreach(setting LPLB_CUDA LPLB_CUDA_TARGETS CUDA_HOME LPLB_NVCC_FLAGS)
  set(${setting} "$ENV{${setting}}" CACHE STRING "see cmake/cuda.cmake")
endforeach()
if(NOT LPLB_CUDA MATCHES "^[01]?$")
  message(FATAL_ERROR "LPLB_CUDA is '${LPLB_CUDA}'; it may be 0 (without), 1 (with) or empty (with it if found)")
endif()

# Folders named nvidia in the building interpreter's site-packages, in those of a build environment as well.
function(lplb_nvidia_wheels result)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import os, sys, sysconfig
places = [*filter(None, sys.path), sysconfig.get_path('purelib'), sysconfig.get_path('platlib')]
print(*dict.fromkeys(f for f in (os.path.join(p, 'nvidia') for p in places) if os.path.isdir(f)), sep=';')"
    OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(${result} "${folders}" PARENT_SCOPE)
endfunction()

# What is wrong with this nvcc, or "" and LPLB_CUDA_VERSION, LPLB_CUDA_INCLUDES, LPLB_CUDA_TOP and LPLB_CUDART of it.
function(lplb_try_nvcc nvcc result)
  set(${result} "" PARENT_SCOPE)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed)
  if(failed OR NOT said MATCHES "release ([0-9]+\\.[0-9]+), V([0-9.]+)")
    set(${result} "${nvcc} --version fails (${failed}): ${said}" PARENT_SCOPE)
    return()
  endif()
  set(release "${CMAKE_MATCH_1}")
  set(version "${CMAKE_MATCH_2}")
  if(version VERSION_LESS LPLB_CUDA_OLDEST)
    set(${result} "${nvcc} is of CUDA ${release}, older than ${LPLB_CUDA_OLDEST}" PARENT_SCOPE)
    return()
  endif()

  # What it would do for an empty kernel names its folders; doing it shows that headers and host compiler go together.
  set(probe "${CMAKE_CURRENT_BINARY_DIR}/cuda/probe.cu")
  file(WRITE "${probe}" "#include <cuda_runtime.h>\n__global__ void probe() {}\n")
  set(compile "${nvcc}" -ccbin "${CMAKE_CXX_COMPILER}" -std=c++17 -c "${probe}" -o "${probe}.o")
  execute_process(COMMAND ${compile} RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
  if(failed)
    set(${result} "${nvcc} (CUDA ${release}) compiles no empty kernel: ${said}" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND ${compile} --dryrun OUTPUT_VARIABLE said ERROR_VARIABLE said)
  string(REGEX MATCH "#\\$ TOP=([^\r\n]*)" said_top "${said}")
  get_filename_component(top "${CMAKE_MATCH_1}" ABSOLUTE)
  string(REGEX MATCHALL "\"-I[^\"]+\"" includes "${said}")
  list(REMOVE_DUPLICATES includes)
  list(TRANSFORM includes REPLACE "^\"-I(.*)\"$" "\\1")
  string(REGEX MATCHALL "\"-L[^\"]+\"" libraries "${said}")
  list(TRANSFORM libraries REPLACE "^\"-L(.*)\"$" "\\1")
  unset(cudart CACHE)
  find_library(cudart NAMES libcudart_static.a PATHS ${libraries} "${top}/lib64" "${top}/lib" NO_DEFAULT_PATH NO_CACHE)
  if(NOT cudart)
    set(${result} "${nvcc} (CUDA ${release}) has no libcudart_static.a in ${top}/lib64 or ${top}/lib" PARENT_SCOPE)
    return()
  endif()
  set(LPLB_CUDA_VERSION "${release}" PARENT_SCOPE)
  set(LPLB_CUDA_FULL_VERSION "${version}" PARENT_SCOPE)
  set(LPLB_CUDA_TOP "${top}" PARENT_SCOPE)
  set(LPLB_CUDA_INCLUDES "${includes}" PARENT_SCOPE)
  set(LPLB_CUDART "${cudart}" PARENT_SCOPE)
endfunction()

# LPLB_NVCC, the first nvcc that works, and what lplb_try_nvcc tells of it; "" when none does, or none is wanted.
set(LPLB_NVCC "")
if(NOT LPLB_CUDA STREQUAL "0")
  set(candidates "")
  set(looked "")  # where in vain, and why
  if(CUDA_HOME)
    list(APPEND candidates "${CUDA_HOME}/bin/nvcc")
  else()
    string(APPEND looked "\n  CUDA_HOME: not set")
  endif()
  find_program(on_path nvcc NO_CACHE NO_PACKAGE_ROOT_PATH NO_CMAKE_PATH NO_CMAKE_ENVIRONMENT_PATH NO_CMAKE_SYSTEM_PATH)
  if(on_path)
    list(APPEND candidates "${on_path}")
  else()
    string(APPEND looked "\n  PATH: no nvcc in $ENV{PATH}")
  endif()
  lplb_nvidia_wheels(wheels)
  foreach(folder IN LISTS wheels)
    file(GLOB found "${folder}/cu[0-9]*/bin/nvcc" "${folder}/cuda_nvcc/bin/nvcc")
    list(SORT found COMPARE NATURAL ORDER DESCENDING)
    list(APPEND candidates ${found})
    if(NOT found)
      string(APPEND looked "\n  wheels: neither cu*/bin/nvcc nor cuda_nvcc/bin/nvcc in ${folder}")
    endif()
  endforeach()
  if(NOT wheels)
    string(APPEND looked "\n  wheels: no NVIDIA package beside ${Python_EXECUTABLE}")
  endif()
  foreach(nvcc IN LISTS candidates)
    if(NOT EXISTS "${nvcc}")
      string(APPEND looked "\n  there is no ${nvcc}")
      continue()
    endif()
    lplb_try_nvcc("${nvcc}" wrong)
    if(wrong STREQUAL "")
      set(LPLB_NVCC "${nvcc}")
      break()
    endif()
    string(APPEND looked "\n  ${wrong}")
  endforeach()
  if(NOT LPLB_NVCC)
    if(LPLB_CUDA STREQUAL "1")
      message(FATAL_ERROR "LPLB_CUDA=1, but no nvcc of CUDA ${LPLB_CUDA_OLDEST} or newer. Looked for in${looked}")
    endif()
    message(STATUS "lplb: without CUDA. Looked for nvcc in${looked}")
  endif()
endif()
if(NOT LPLB_NVCC)
  return()
endif()

# LPLB_CUDA_CODE: sm_80;...;compute_90, in this order.
execute_process(COMMAND "${LPLB_NVCC}" --list-gpu-code OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[0-9]+" known "${known}")
list(SORT known COMPARE NATURAL)
set(LPLB_CUDA_CODE "")
if(LPLB_CUDA_TARGETS)
  string(REGEX MATCHALL "[^;, ]+" wanted "${LPLB_CUDA_TARGETS}")
  foreach(target IN LISTS wanted)
    if(NOT target MATCHES "^(sm_|compute_)?([0-9]+)$" OR CMAKE_MATCH_2 LESS 80 OR NOT CMAKE_MATCH_2 IN_LIST known)
      list(FILTER known EXCLUDE REGEX "^[1-7][0-9]$")
      message(FATAL_ERROR "LPLB_CUDA_TARGETS names '${target}'; nvcc ${LPLB_CUDA_VERSION} allows ${known}, "
                          "alone or after sm_ (machine code) or compute_ (PTX)")
    endif()
    if(NOT CMAKE_MATCH_1)
      set(target "sm_${target}")
    endif()
    list(APPEND LPLB_CUDA_CODE "${target}")
  endforeach()
  list(REMOVE_DUPLICATES LPLB_CUDA_CODE)
else()
  set(ptx "")
  foreach(number IN LISTS known)
    if(number IN_LIST LPLB_CUDA_DEFAULT_TARGETS)
      list(APPEND LPLB_CUDA_CODE "sm_${number}")
    endif()
    if(NOT number GREATER LPLB_CUDA_DEFAULT_PTX)
      set(ptx "compute_${number}")
    endif()
  endforeach()
  list(APPEND LPLB_CUDA_CODE "${ptx}")
endif()
set(LPLB_CUDA_MACHINE_CODE "${LPLB_CUDA_CODE}")
list(FILTER LPLB_CUDA_MACHINE_CODE INCLUDE REGEX "^sm_")
string(REPLACE ";" " " shown "${LPLB_CUDA_CODE}")
message(STATUS "lplb: with CUDA ${LPLB_CUDA_VERSION} (${LPLB_NVCC}) for ${shown}")
if(CUDA_HOME AND NOT LPLB_NVCC STREQUAL "${CUDA_HOME}/bin/nvcc")
  message(WARNING "lplb: passed over CUDA_HOME:${looked}")
endif()

separate_arguments(further UNIX_COMMAND "${LPLB_NVCC_FLAGS}")
set(LPLB_NVCC_WORDS -ccbin "${CMAKE_CXX_COMPILER}" --threads 2 ${further})  # 2 targets at a time

# Compiles one .cu into cuda/<its name>.o and appends that to LPLB_CUDA_OBJECTS; ARGN: targets and what else nvcc gets.
function(lplb_add_cuda source)
  list(JOIN LPLB_HOST_FLAGS "," host_flags)
  cmake_path(GET source STEM name)
  cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}")
  set(object "${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o")
  add_custom_command(
    OUTPUT "${object}"
    COMMAND "${LPLB_NVCC}" ${LPLB_NVCC_WORDS} -std=c++17 -O3 -DNDEBUG
            "-Xcompiler=${host_flags},-fPIC,-fvisibility=hidden" ${ARGN}
            -MD -MF "${object}.d" -MT "${object}" "${source}" -o "${object}"
    DEPENDS "${source}" DEPFILE "${object}.d" COMMENT "nvcc ${name}.cu" VERBATIM)
  set(LPLB_CUDA_OBJECTS ${LPLB_CUDA_OBJECTS} "${object}" PARENT_SCOPE)
endfunction()

# The generation of a target.
function(lplb_generation target result)
  string(REGEX REPLACE "^[a-z]+_" "" number "${target}")
  foreach(generation IN LISTS LPLB_CUDA_GENERATIONS)
    if(NOT generation GREATER number)
      set(${result} "${generation}" PARENT_SCOPE)
    endif()
  endforeach()
endfunction()

set(LPLB_CUDA_OBJECTS "")
set(code "")
foreach(target IN LISTS LPLB_CUDA_CODE)
  if(target MATCHES "^compute_")
    list(APPEND code -gencode "arch=${target},code=${target}")
  else()
    lplb_generation("${target}" generation)
    list(APPEND code -gencode "arch=compute_${generation},code=${target}")
  endif()
endforeach()
foreach(name count assign solve ranges transfers)
  # No fused multiply-add, as on the host: plans have the same bits.
  lplb_add_cuda(csrc/cuda/${name}.cu -c -fmad=false ${code})
endforeach()
