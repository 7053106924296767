// Programmatic dependent launch: a kernel is launched while the one before it in the stream still runs, and stages its
// tables meanwhile. Devices from 9.0 on can; LPLB_PDL=1 in the environment asks for it.
//
// Why it is safe: a kernel so launched touches what others write, or read, behind wait_for_previous() only, which ends
// when all kernels before have ended and their memory is seen. Every thread of it waits, so that its own end tells the
// next one that those before it have ended as well. The first kernel of a run is launched as usual.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "check.h"

namespace lplb::cuda {

// The next kernel may be launched. By every block: a later one's are let in when all have called it, or ended.
__device__ inline void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Nothing to wait for in a kernel that was launched as usual.
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline bool dependent_launch_is_wanted() {
  static const bool wanted = [] {
    const char* setting = std::getenv("LPLB_PDL");
    if (setting == nullptr || *setting == '\0' || std::strcmp(setting, "0") == 0) return false;
    if (std::strcmp(setting, "1") != 0)
      throw std::invalid_argument(std::string("LPLB_PDL is '") + setting + "', allowed is 0 or 1");
    return true;
  }();
  return wanted;
}

// Whether the code that runs on the current device has the instructions above: machine code of an older generation,
// and what the driver makes of older PTX, have not.
template <class Arguments>
bool can_wait(void (*kernel)(Arguments)) {
  cudaFuncAttributes now;
  LPLB_CUDA_CHECK(cudaFuncGetAttributes(&now, kernel));
  return now.ptxVersion >= 90 && now.binaryVersion >= 90;
}

// Launches a kernel that calls wait_for_previous().
template <class Arguments>
void launch_dependent(void (*kernel)(Arguments), const std::remove_const_t<Arguments>& a, int64_t blocks, int threads,
                      size_t shared, cudaStream_t stream) {
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned int>(blocks));
  launch.blockDim = dim3(static_cast<unsigned int>(threads));
  launch.dynamicSmemBytes = shared;
  launch.stream = stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (dependent_launch_is_wanted() && can_wait(kernel)) {
    launch.attrs = &early;
    launch.numAttrs = 1;
  }
  LPLB_CUDA_CHECK(cudaLaunchKernelEx(&launch, kernel, a));
}

}  // namespace lplb::cuda
