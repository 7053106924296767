// The kernel behind the first stage. Host files include this; count.cu has the kernel.
#pragma once

#include <cuda_runtime.h>

#include "../core/count.h"

namespace lplb::cuda {

inline constexpr int kTokenWarps = 16;  // most warps in a block of count and assign

struct CountArguments {
  const void* indices;
  Cut cut;
  int n_logical;
  int32_t* prefix;              // [blocks, n_logical] tokens in the blocks up to and with this one
  int32_t* row;                 // [n_logical] tokens in all of them
  int32_t* warp_prefix;         // [blocks, warps, n_logical]
  unsigned int* arrived;        // blocks that have counted; 0 between launches
  int32_t* halt;                // set to 0: assign may go on
  unsigned long long* outside;  // indices outside [-1, n_logical) in this launch; 0 between launches
  int64_t* faults;              // host memory; [0] is raised by them
};

// Dynamic shared memory of one block.
size_t count_shared(int n_logical, int warps);
void allow_count_shared(size_t bytes);
void launch_count(const CountArguments& a, int index_bytes, int blocks, int warps, cudaStream_t stream);

}  // namespace lplb::cuda
