// One block, one group, one load: the kernels, for any team and algebra.
#pragma once

#include "dependent.cuh"
#include "solve.h"
#include "team.cuh"

namespace lplb::cuda {

template <class Team>
struct TeamTraits;
template <>
struct TeamTraits<Warp> {
  static constexpr int kThreads = kWarpSize, kBuffer = 0;
  static __device__ Warp make(double*) { return {}; }
};
template <int kSize>
struct TeamTraits<Block<kSize>> {
  static constexpr int kThreads = kSize, kBuffer = reduce::kBufferSize;
  static __device__ Block<kSize> make(double* buffer) { return Block<kSize>(buffer); }
};

// Doubles that teams of this many threads want for their sums.
inline int sum_buffer(int threads) { return threads == kWarpSize ? TeamTraits<Warp>::kBuffer : reduce::kBufferSize; }

template <class Team, int kWords, class Algebra, Solver kSolver>
__device__ void solve_on(const SolveArguments& a) {
  extern __shared__ __align__(16) std::byte memory[];
  let_next_begin();
  Team team = TeamTraits<Team>::make(reinterpret_cast<double*>(memory));
  solve_block<kWords>(team, Algebra{}, OnlySolver<kSolver>{}, a, blockIdx.x,
                      memory + sizeof(double) * TeamTraits<Team>::kBuffer, [] { wait_for_previous(); });
}

template <class Team, int kWords, class Algebra>
__global__ void __launch_bounds__(TeamTraits<Team>::kThreads, 1) ipm_kernel(const SolveArguments a) {
  solve_on<Team, kWords, Algebra, Solver::ipm>(a);
}

// The algebra is that of no matrix.
template <class Team, int kWords>
__global__ void __launch_bounds__(TeamTraits<Team>::kThreads, 1) flow_kernel(const SolveArguments a) {
  solve_on<Team, kWords, BuiltinAlgebra<8>, Solver::flow>(a);
}

}  // namespace lplb::cuda
