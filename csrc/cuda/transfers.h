// The kernels that plan transfers: one block. Host files include this; transfers.cu has the kernels.
#pragma once

#include <cuda_runtime.h>

#include "transfer_block.h"

namespace lplb::cuda {

inline constexpr int kTransferThreads = 256;  // they add up counts; the first warp plans

// Dynamic shared memory of the block, with room for the tables, if they are staged, and `space` bytes of the plan's
// own.
inline size_t transfer_shared(const TransferOffsets& offsets, bool staged, size_t space) {
  const size_t partial = sizeof(int64_t) * transfers::partial_words(offsets.n_experts, kTransferThreads);
  return TransferMemory(offsets, staged).space + (partial > space ? partial : space);
}

void allow_transfer_shared(int n_ranks, size_t bytes);
void launch_joint(const JointArguments& a, size_t shared, cudaStream_t stream);
void launch_llep(const LlepArguments& a, size_t shared, cudaStream_t stream);

}  // namespace lplb::cuda
