#include "check.h"
#include "count.h"
#include "dependent.cuh"
#include "team.cuh"

namespace lplb::cuda {

namespace {

// The last block to arrive adds up all of them, so counting is one launch.
template <class Index>
__global__ void __launch_bounds__(kTokenWarps* kWarpSize, 1) count_kernel(const CountArguments a) {
  extern __shared__ int32_t counters[];
  __shared__ bool is_last;
  Block<kAnySize> block(nullptr);
  let_next_begin();
  const int c = blockIdx.x, n_blocks = gridDim.x;
  const int outside =
      count_block(block, static_cast<const Index*>(a.indices), a.cut, c, a.n_logical, counters,
                  a.warp_prefix + static_cast<int64_t>(c) * block.n_warps() * a.n_logical, a.prefix + c * a.n_logical);
  const unsigned int bad = __reduce_add_sync(0xFFFFFFFF, static_cast<unsigned int>(outside));
  if (bad != 0 && block.warp().rank() == 0) atomicAdd(a.outside, static_cast<unsigned long long>(bad));
  __threadfence();
  block.sync();
  if (block.rank() == 0) {
    is_last = atomicInc(a.arrived, n_blocks - 1) == static_cast<unsigned int>(n_blocks - 1);  // back to 0 by itself
    if (is_last) *a.halt = 0;
  }
  block.sync();
  if (!is_last) return;
  __threadfence();
  if (block.rank() == 0) {  // atomics do not reach host memory for sure, and nobody else writes this word
    const unsigned long long all = atomicExch(a.outside, 0ull);
    if (all != 0) block.note(a.faults, *static_cast<volatile int64_t*>(a.faults) + static_cast<int64_t>(all));
  }
  scan_blocks(block, n_blocks, a.n_logical, counters, a.prefix, a.row);
}

}  // namespace

size_t count_shared(int n_logical, int warps) {
  const int words = warps * n_logical, members = warps * kWarpSize;
  return sizeof(int32_t) * (words > members ? words : members);
}

void allow_count_shared(size_t bytes) {
  allow_shared(count_kernel<int32_t>, bytes);
  allow_shared(count_kernel<int64_t>, bytes);
}

void launch_count(const CountArguments& a, int index_bytes, int blocks, int warps, cudaStream_t stream) {
  const size_t shared = count_shared(a.n_logical, warps);
  if (index_bytes == 8)
    count_kernel<int64_t><<<blocks, warps * kWarpSize, shared, stream>>>(a);
  else
    count_kernel<int32_t><<<blocks, warps * kWarpSize, shared, stream>>>(a);
  LPLB_CUDA_CHECK(cudaGetLastError());
}

}  // namespace lplb::cuda
