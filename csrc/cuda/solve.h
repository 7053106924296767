// The kernels behind the middle stage: one block per group and load. Host files include this; solve.cu has the kernels
// with the project's own algebra, solve_cusolverdx.cu those with cuSolverDx.
#pragma once

#include <cuda_runtime.h>

#include "solve_block.h"

namespace lplb::cuda {

// A way to run the solve: which kernels, and how wide the matrix is.
struct SolveKernel {
  const char* algebra;
  int threads, width;                  // width: the matrix for the group size at hand
  void (*ipm)(const SolveArguments);   // launched with `threads` and solve_shared()
  void (*flow)(const SolveArguments);  // likewise; it needs no algebra

  auto of(Solver solver) const { return solver == Solver::flow ? flow : ipm; }
};

// Up to 16 ranks one warp has a row per member and meets no barrier; above 64 ranks the matrix wants more threads.
constexpr int builtin_threads(int n_ranks) { return n_ranks <= 16 ? kWarpSize : n_ranks <= 64 ? 128 : 256; }

// For groups of n_ranks.
SolveKernel builtin_kernel(int n_ranks);
#ifdef LPLB_HAVE_CUSOLVERDX
SolveKernel cusolverdx_kernel(int n_ranks);
#endif

// Dynamic shared memory of a block that solves any of these groups.
size_t solve_shared(const std::vector<DeviceGroup>& groups, int threads);
void allow_solve_shared(const SolveKernel& kernel, size_t bytes);
void launch_solve(const SolveKernel& kernel, const SolveArguments& a, int64_t batch, size_t shared,
                  cudaStream_t stream);

}  // namespace lplb::cuda
