#include "assign.h"
#include "check.h"
#include "count.h"
#include "dependent.cuh"
#include "team.cuh"

namespace lplb::cuda {

namespace {

template <class Index>
__global__ void __launch_bounds__(kTokenWarps* kWarpSize, 1) assign_kernel(const AssignArguments a) {
  extern __shared__ __align__(16) std::byte memory[];
  Block<kAnySize> block(nullptr);
  auto* physical = static_cast<Index*>(a.physical);
  const int c = blockIdx.x;
  auto* shares = reinterpret_cast<Proportion*>(memory);
  auto* weight = reinterpret_cast<int32_t*>(shares + a.slots.n_copies);
  auto* start = weight + a.slots.n_copies;
  auto* copy_slot = start + a.slots.n_copies;
  auto* to = copy_slot + a.slots.n_copies;
  Slots slots = a.slots;
  block.each(slots.n_copies, [&](int i) { copy_slot[i] = a.slots.copy_slot[i]; });
  block.each(slots.n_logical, [&](int e) { to[e] = a.slots.to[e]; });
  slots.copy_slot = copy_slot;
  slots.to = to;
  wait_for_previous();
  if (c == 0 && block.rank() == 0) *a.arrived = 0;
  if (*a.halt != 0) {
    const Range range = a.cut.of_block(c);
    for (int64_t i = range.begin + block.rank(); i < range.end; i += block.size()) physical[i] = -1;
    return;
  }
  block.sync();
  find_shares(block, slots, a.rule, weight, start, shares);
  block.sync();
  assign_block(block, static_cast<const Index*>(a.indices), physical, a.cut, c, slots, shares, start,
               to + slots.n_logical, a.warp_prefix + static_cast<int64_t>(c) * block.n_warps() * slots.n_logical,
               c > 0 ? a.prefix + (c - 1) * slots.n_logical : nullptr);
}

}  // namespace

size_t assign_shared(int n_logical, int n_copies, int warps) {
  return n_copies * (sizeof(Proportion) + 3 * sizeof(int32_t)) + sizeof(int32_t) * n_logical * (1 + warps);
}

void allow_assign_shared(size_t bytes) {
  allow_shared(assign_kernel<int32_t>, bytes);
  allow_shared(assign_kernel<int64_t>, bytes);
}

void launch_assign(const AssignArguments& a, int index_bytes, int blocks, int warps, cudaStream_t stream) {
  const size_t shared = assign_shared(a.slots.n_logical, a.slots.n_copies, warps);
  if (index_bytes == 8)
    launch_dependent(assign_kernel<int64_t>, a, blocks, warps * kWarpSize, shared, stream);
  else
    launch_dependent(assign_kernel<int32_t>, a, blocks, warps * kWarpSize, shared, stream);
}

}  // namespace lplb::cuda
