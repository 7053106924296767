// The kernel behind the last stage. Host files include this; assign.cu has the kernel.
#pragma once

#include <cuda_runtime.h>

#include "../core/assign.h"

namespace lplb::cuda {

struct AssignArguments {
  const void* indices;
  void* physical;
  Cut cut;
  Slots slots;  // in device memory
  ShareRule rule;
  const int32_t* prefix;       // [blocks, n_logical] as count left it
  const int32_t* warp_prefix;  // [blocks, warps, n_logical] as count left it
  const int32_t* halt;         // where it is not 0 every token goes to -1
  unsigned int* arrived;       // of count: set to 0, also after counts that overlapped, which they must not
};

// Dynamic shared memory of one block.
size_t assign_shared(int n_logical, int n_copies, int warps);
void allow_assign_shared(size_t bytes);
void launch_assign(const AssignArguments& a, int index_bytes, int blocks, int warps, cudaStream_t stream);

}  // namespace lplb::cuda
