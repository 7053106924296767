// Kernels whose dense algebra is cuSolverDx (Cholesky, float64, in shared memory). Compiled to LTO-IR and linked with
// what cmake/mathdx.cmake makes of the library.
#include <type_traits>

#include "solve.cuh"

#define LPLB_CUSOLVERDX(n)                                      \
  extern "C" __device__ void lplb_potrf_##n(double*, int*);     \
  extern "C" __device__ void lplb_potrs1_##n(double*, double*); \
  extern "C" __device__ void lplb_potrs2_##n(double*, double*);
LPLB_CUSOLVERDX(8)
LPLB_CUSOLVERDX(16)
LPLB_CUSOLVERDX(32)
LPLB_CUSOLVERDX(64)
LPLB_CUSOLVERDX(128)
#undef LPLB_CUSOLVERDX

namespace lplb::cuda {

namespace {

// The lower triangle of M becomes its Cholesky factor. The library wants all threads of the block, and neither begins
// nor ends with a barrier.
template <int kWidth>
struct CuSolverDx {
  template <int kRhs, class Team>
  __device__ static bool factor_and_solve(Team& team, int, double* m, double* inv_d, double* b) {
    static_assert(kRhs == 2);
    auto* info = reinterpret_cast<int*>(inv_d);  // 1/D is not needed here
    if (team.rank() == 0) *info = 0;             // in case success is not written
    team.sync();
    if constexpr (kWidth == 8) lplb_potrf_8(m, info);
    if constexpr (kWidth == 16) lplb_potrf_16(m, info);
    if constexpr (kWidth == 32) lplb_potrf_32(m, info);
    if constexpr (kWidth == 64) lplb_potrf_64(m, info);
    if constexpr (kWidth == 128) lplb_potrf_128(m, info);
    team.sync();
    if (*info != 0) return false;
    if constexpr (kWidth == 8) lplb_potrs2_8(m, b);
    if constexpr (kWidth == 16) lplb_potrs2_16(m, b);
    if constexpr (kWidth == 32) lplb_potrs2_32(m, b);
    if constexpr (kWidth == 64) lplb_potrs2_64(m, b);
    if constexpr (kWidth == 128) lplb_potrs2_128(m, b);
    team.sync();
    return true;
  }

  template <class Team>
  __device__ static void solve(Team& team, int, double* m, double*, double* b) {
    if constexpr (kWidth == 8) lplb_potrs1_8(m, b);
    if constexpr (kWidth == 16) lplb_potrs1_16(m, b);
    if constexpr (kWidth == 32) lplb_potrs1_32(m, b);
    if constexpr (kWidth == 64) lplb_potrs1_64(m, b);
    if constexpr (kWidth == 128) lplb_potrs1_128(m, b);
    team.sync();
  }
};

// kThreads: as many as cmake/mathdx.cmake had the functions made for. The flow solver's kernel is the builtin one.
template <int kWidth, int kThreads>
SolveKernel kernel_of() {
  static_assert(kThreads == builtin_threads(kWidth), "the flow solver is launched with as many threads");
  using Team = std::conditional_t<kThreads == kWarpSize, Warp, Block<kThreads>>;
  return {"cusolverdx", kThreads, kWidth, ipm_kernel<Team, set_words(kWidth), CuSolverDx<kWidth>>,
          builtin_kernel(kWidth).flow};
}

}  // namespace

SolveKernel cusolverdx_kernel(int n_ranks) {
  if (n_ranks <= 8) return kernel_of<8, LPLB_CUSOLVERDX_THREADS_8>();
  if (n_ranks <= 16) return kernel_of<16, LPLB_CUSOLVERDX_THREADS_16>();
  if (n_ranks <= 32) return kernel_of<32, LPLB_CUSOLVERDX_THREADS_32>();
  if (n_ranks <= 64) return kernel_of<64, LPLB_CUSOLVERDX_THREADS_64>();
  return kernel_of<128, LPLB_CUSOLVERDX_THREADS_128>();
}

}  // namespace lplb::cuda
