// The kernels that map tokens by range, after count.cu has counted the same tokens: one finds the source's ranges, one
// maps. Host files include this; ranges.cu has the kernels.
#pragma once

#include <cuda_runtime.h>

#include "../core/ranges.h"
#include "transfer_tables.h"

namespace lplb::cuda {

struct RangeArguments {
  RangeTables tables;  // in device memory
  ServingPlan plan;
  CountTable counts;
  int source;
  const int32_t* row;     // [n_experts] the source's tokens as count left them
  Ranges ranges;          // memory
  int64_t* send;          // [n_ranks · width] of zeros
  int64_t* faults;        // host memory; [1] is 1 + an expert that has other tokens than were planned for
  unsigned int* arrived;  // of count: set to 0, also after counts that overlapped, which they must not
};

struct RouteArguments {
  const void* indices;
  void* slots;
  Cut cut;
  RangeTables tables;
  Ranges ranges;
  const int32_t* prefix;       // [blocks, n_experts] as count left it
  const int32_t* warp_prefix;  // [blocks, warps, n_experts] as count left it
};

inline constexpr int kExpertsPerBlock = kWarpSize;  // a lane each; blocks of one warp, for many multiprocessors
inline int64_t range_blocks(int n_experts) { return (n_experts + kExpertsPerBlock - 1) / kExpertsPerBlock; }

// Dynamic shared memory of one block of the second.
size_t route_shared(int n_experts, int warps);
void allow_route_shared(size_t bytes);
void launch_find_ranges(const RangeArguments& a, cudaStream_t stream);
void launch_route(const RouteArguments& a, int index_bytes, int blocks, int warps, cudaStream_t stream);

}  // namespace lplb::cuda
