#include "check.h"
#include "dependent.cuh"
#include "team.cuh"
#include "transfers.h"

namespace lplb::cuda {

namespace {

template <int kWords>
__global__ void __launch_bounds__(kTransferThreads, 1) joint_kernel(const JointArguments a) {
  extern __shared__ __align__(16) std::byte memory[];
  Block<kTransferThreads> block(nullptr);
  let_next_begin();
  wait_for_previous();
  joint_block<kWords>(block, a, memory);
}

template <int kWords>
__global__ void __launch_bounds__(kTransferThreads, 1) llep_kernel(const LlepArguments a) {
  extern __shared__ __align__(16) std::byte memory[];
  Block<kTransferThreads> block(nullptr);
  let_next_begin();
  wait_for_previous();
  llep_block<kWords>(block, a, memory);
}

}  // namespace

void allow_transfer_shared(int n_ranks, size_t bytes) {
  allow_shared(set_words(n_ranks) == 1 ? joint_kernel<1> : joint_kernel<2>, bytes);
  allow_shared(set_words(n_ranks) == 1 ? llep_kernel<1> : llep_kernel<2>, bytes);
}

void launch_joint(const JointArguments& a, size_t shared, cudaStream_t stream) {
  launch_dependent(set_words(a.offsets.n_ranks) == 1 ? joint_kernel<1> : joint_kernel<2>, a, 1, kTransferThreads,
                   shared, stream);
}

void launch_llep(const LlepArguments& a, size_t shared, cudaStream_t stream) {
  launch_dependent(set_words(a.offsets.n_ranks) == 1 ? llep_kernel<1> : llep_kernel<2>, a, 1, kTransferThreads, shared,
                   stream);
}

}  // namespace lplb::cuda
