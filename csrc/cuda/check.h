// CUDA failures become std::runtime_error with file, line and CUDA's words.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace lplb::cuda {

inline void check(cudaError_t error, const char* what, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call starts afresh, unless the device is lost
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what + ": " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

}  // namespace lplb::cuda

#define LPLB_CUDA_CHECK(call) ::lplb::cuda::check(call, #call, __FILE__, __LINE__)

namespace lplb::cuda {

// Lets blocks of `kernel` have this much dynamic shared memory on the current device. The limit belongs to all planners
// of the process, so it is only ever raised; and it is set in any case, or 48 KB would hold for static and dynamic
// memory together. Callers take turns: bind() keeps Python's lock.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
  cudaFuncAttributes now;
  LPLB_CUDA_CHECK(cudaFuncGetAttributes(&now, kernel));
  const int most = std::max(now.maxDynamicSharedSizeBytes, static_cast<int>(bytes));
  LPLB_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

}  // namespace lplb::cuda
