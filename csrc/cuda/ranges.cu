#include "check.h"
#include "count.h"
#include "dependent.cuh"
#include "ranges.h"
#include "team.cuh"

namespace lplb::cuda {

namespace {

template <class Count>
__global__ void __launch_bounds__(kExpertsPerBlock, 1) range_kernel(const RangeArguments a) {
  let_next_begin();
  wait_for_previous();
  Warp warp;
  const auto from = a.counts.as<Count>();
  const int begin = blockIdx.x * kExpertsPerBlock, n = a.tables.n_experts;
  const int end = begin + kExpertsPerBlock < n ? begin + kExpertsPerBlock : n;
  if (begin == 0 && warp.rank() == 0) *a.arrived = 0;
  warp.each(end - begin, [&](int i) {
    const int e = begin + i;
    if (a.row[e] != tokens_of(from, a.source, e)) warp.note(a.faults + 1, 1 + e);
  });
  find_ranges(warp, a.tables, a.plan, from, a.source, begin, end, a.ranges, a.send);
}

template <class Index>
__global__ void __launch_bounds__(kTokenWarps* kWarpSize, 1) route_kernel(const RouteArguments a) {
  extern __shared__ int32_t memory[];
  Block<kAnySize> block(nullptr);
  const int c = blockIdx.x, n = a.tables.n_experts;
  int32_t* only = memory;
  wait_for_previous();
  find_only(block, a.tables, a.ranges, only);
  block.sync();
  route_block(block, a.tables, a.ranges, only, static_cast<const Index*>(a.indices), static_cast<Index*>(a.slots),
              a.cut, c, memory + n, a.warp_prefix + static_cast<int64_t>(c) * block.n_warps() * n,
              c > 0 ? a.prefix + (c - 1) * n : nullptr);
}

}  // namespace

size_t route_shared(int n_experts, int warps) { return sizeof(int32_t) * n_experts * (1 + warps); }

void allow_route_shared(size_t bytes) {
  allow_shared(route_kernel<int32_t>, bytes);
  allow_shared(route_kernel<int64_t>, bytes);
}

void launch_find_ranges(const RangeArguments& a, cudaStream_t stream) {
  const int64_t blocks = range_blocks(a.tables.n_experts);
  if (a.counts.bytes == 8)
    launch_dependent(range_kernel<int64_t>, a, blocks, kExpertsPerBlock, 0, stream);
  else
    launch_dependent(range_kernel<int32_t>, a, blocks, kExpertsPerBlock, 0, stream);
}

void launch_route(const RouteArguments& a, int index_bytes, int blocks, int warps, cudaStream_t stream) {
  const size_t shared = route_shared(a.tables.n_experts, warps);
  if (index_bytes == 8)
    launch_dependent(route_kernel<int64_t>, a, blocks, warps * kWarpSize, shared, stream);
  else
    launch_dependent(route_kernel<int32_t>, a, blocks, warps * kWarpSize, shared, stream);
}

}  // namespace lplb::cuda
