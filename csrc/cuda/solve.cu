#include "check.h"
#include "solve.cuh"

namespace lplb::cuda {

SolveKernel builtin_kernel(int n_ranks) {
  const int width = BuiltinAlgebra<kMaxGroup>::width(n_ranks);
  const int threads = builtin_threads(n_ranks);
  if (n_ranks <= 16) return {"builtin", threads, width, ipm_kernel<Warp, 1, BuiltinAlgebra<16>>, flow_kernel<Warp, 1>};
  if (n_ranks <= 64) {
    using Team = Block<builtin_threads(64)>;
    return {"builtin", threads, width, ipm_kernel<Team, 1, BuiltinAlgebra<64>>, flow_kernel<Team, 1>};
  }
  using Team = Block<builtin_threads(128)>;
  return {"builtin", threads, width, ipm_kernel<Team, 2, BuiltinAlgebra<128>>, flow_kernel<Team, 2>};
}

size_t solve_shared(const std::vector<DeviceGroup>& groups, int threads) {
  return sizeof(double) * sum_buffer(threads) + solve_block_bytes(groups);
}

void allow_solve_shared(const SolveKernel& kernel, size_t bytes) {
  allow_shared(kernel.ipm, bytes);
  allow_shared(kernel.flow, bytes);
}

void launch_solve(const SolveKernel& kernel, const SolveArguments& a, int64_t batch, size_t shared,
                  cudaStream_t stream) {
  const int64_t blocks = batch * a.n_groups;
  if (blocks > INT32_MAX)
    throw std::invalid_argument("a batch of " + std::to_string(batch) + " loads of " + std::to_string(a.n_groups) +
                                " groups, allowed are " + std::to_string(INT32_MAX) + " groups per launch");
  launch_dependent(kernel.of(a.solver), a, blocks, kernel.threads, shared, stream);
}

}  // namespace lplb::cuda
