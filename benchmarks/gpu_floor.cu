// The floor under the solve kernel, as JSON lines: its dense algebra alone, for every width and team, and the latencies
// that benchmarks/PREDICTIONS.md rests on. benchmarks/bench_cuda.py compiles and runs it. Nothing of the product is
// built differently for it.
//
//     nvcc -std=c++17 -O3 -fmad=false -arch=native -o gpu_floor benchmarks/gpu_floor.cu && ./gpu_floor
//
// With -DLPLB_HAVE_CUSOLVERDX it times cuSolverDx and nothing else: its link takes the LTO-IR that a build with MathDx
// leaves in <build>/mathdx, and all of the file is then compiled to LTO-IR. LPLB_CUSOLVERDX_THREADS_<width> is for how
// many threads the LTO-IR of a width was made.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../csrc/core/linalg.h"
#include "../csrc/cuda/check.h"
#include "../csrc/cuda/team.cuh"

using namespace lplb;
using lplb::cuda::Block;
using lplb::cuda::Warp;

namespace {

constexpr int kRuns = 31;     // launches per figure; their median counts
constexpr int kRepeats = 50;  // of the measured work in a launch
constexpr int kChain = 256;   // dependent operations in a row

double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + x.size() / 2, x.end());
  return x[x.size() / 2];
}

template <class T>
T* device_memory(size_t count) {
  void* p = nullptr;
  LPLB_CUDA_CHECK(cudaMalloc(&p, count * sizeof(T)));
  LPLB_CUDA_CHECK(cudaMemset(p, 0, count * sizeof(T)));
  return static_cast<T*>(p);
}

// Median microseconds of what `launch` puts on the default stream.
template <class F>
double microseconds(F launch) {
  cudaEvent_t begin, end;
  LPLB_CUDA_CHECK(cudaEventCreate(&begin));
  LPLB_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> all;
  for (int i = 0; i < kRuns + 3; ++i) {
    LPLB_CUDA_CHECK(cudaEventRecord(begin));
    launch();
    LPLB_CUDA_CHECK(cudaGetLastError());
    LPLB_CUDA_CHECK(cudaEventRecord(end));
    LPLB_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    LPLB_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) all.push_back(1e3 * ms);
  }
  return median(all);
}

// Teams and algebras

template <class Team>
struct Launch;
template <>
struct Launch<Warp> {
  static constexpr int kThreads = kWarpSize, kBuffer = 0;
  static __device__ Warp make(double*) { return {}; }
};
template <int kSize>
struct Launch<Block<kSize>> {
  static constexpr int kThreads = kSize, kBuffer = reduce::kBufferSize;
  static __device__ Block<kSize> make(double* buffer) { return Block<kSize>(buffer); }
};

#ifdef LPLB_HAVE_CUSOLVERDX
#define CUSOLVERDX(n)                                                                           \
  extern "C" __device__ void lplb_potrf_##n(double*, int*);                                     \
  extern "C" __device__ void lplb_potrs1_##n(double*, double*);                                 \
  extern "C" __device__ void lplb_potrs2_##n(double*, double*);                                 \
  struct CuSolverDx##n {                                                                        \
    template <int kRhs, class Team>                                                             \
    static __device__ bool factor_and_solve(Team& team, int, double* m, double* d, double* b) { \
      auto* info = reinterpret_cast<int*>(d);                                                   \
      lplb_potrf_##n(m, info);                                                                  \
      team.sync();                                                                              \
      if (*info != 0) return false;                                                             \
      lplb_potrs2_##n(m, b);                                                                    \
      team.sync();                                                                              \
      return true;                                                                              \
    }                                                                                           \
    template <class Team>                                                                       \
    static __device__ void solve(Team& team, int, double* m, double*, double* b) {              \
      lplb_potrs1_##n(m, b);                                                                    \
      team.sync();                                                                              \
    }                                                                                           \
  };
}  // namespace
#ifdef LPLB_CUSOLVERDX_THREADS_8
CUSOLVERDX(8)
#endif
#ifdef LPLB_CUSOLVERDX_THREADS_16
CUSOLVERDX(16)
#endif
#ifdef LPLB_CUSOLVERDX_THREADS_32
CUSOLVERDX(32)
#endif
#ifdef LPLB_CUSOLVERDX_THREADS_64
CUSOLVERDX(64)
#endif
#ifdef LPLB_CUSOLVERDX_THREADS_128
CUSOLVERDX(128)
#endif
namespace {
template <int kThreads>
struct TeamOf {
  using type = Block<kThreads>;
};
template <>
struct TeamOf<32> {
  using type = Warp;
};
#endif

// What a launch does `repeats` times.
enum What { kCopyOnly, kFactorAndSolve2, kFactorAndSolve2And1 };

// m0 [n, n], b0 [3, n]: two right-hand sides solved with the factorisation, and one by itself, as in an iteration of
// the interior point. out [3, n].
template <class Team, class Algebra>
__global__ void __launch_bounds__(Launch<Team>::kThreads, 1)
    algebra_kernel(const double* m0, const double* b0, double* out, int n, int repeats, What what, int* failed) {
  extern __shared__ double memory[];
  Team team = Launch<Team>::make(memory);
  double *m = memory + Launch<Team>::kBuffer, *b = m + n * n, *inv_d = b + 3 * n;
  for (int k = 0; k < repeats; ++k) {
    team.each(n * n, [=](int i) { m[i] = m0[i]; });
    team.each(3 * n, [=](int i) { b[i] = b0[i]; });
    team.sync();
    if (what != kCopyOnly && !Algebra::template factor_and_solve<2>(team, n, m, inv_d, b)) *failed = 1;
    if (what == kFactorAndSolve2And1) Algebra::solve(team, n, m, inv_d, b + 2 * n);
    team.sync();
  }
  team.each(3 * n, [=](int i) { out[i] = b[i]; });
}

// M as the interior point has it: a Laplacian with weights of very different size, and a positive diagonal.
struct System {
  int n;
  std::vector<double> m, b;

  explicit System(int width) : n(width), m(width * width, 0.0), b(3 * width) {
    std::mt19937_64 random(7 + width);
    std::normal_distribution<double> normal;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < i; ++j) {
        if (random() % 3 == 0) continue;
        const double w = std::exp(2.0 * normal(random));
        m[j * n + i] = m[i * n + j] = -w;
        m[i * n + i] += w;
        m[j * n + j] += w;
      }
    for (int i = 0; i < n; ++i) m[i * n + i] += std::exp(2.0 * normal(random));
    for (double& x : b) x = normal(random);
  }

  // The largest ‖M·x − b‖ / (‖M‖·‖x‖ + ‖b‖) of three solutions, norms of maxima.
  double residual(const std::vector<double>& x) const {
    double worst = 0.0;
    for (int r = 0; r < 3; ++r) {
      double off = 0.0, norm_m = 0.0, norm_x = 0.0, norm_b = 0.0;
      for (int i = 0; i < n; ++i) {
        double sum = -b[r * n + i], row = 0.0;
        for (int j = 0; j < n; ++j) {
          sum += m[j * n + i] * x[r * n + j];
          row += std::abs(m[j * n + i]);
        }
        off = std::max(off, std::abs(sum));
        norm_m = std::max(norm_m, row);
        norm_x = std::max(norm_x, std::abs(x[r * n + i]));
        norm_b = std::max(norm_b, std::abs(b[r * n + i]));
      }
      const double relative = off / (norm_m * norm_x + norm_b);
      worst = relative < worst ? worst : relative;  // NaN stays
    }
    return worst;
  }
};

bool all_good = true;

template <class Team, class Algebra>
void time_algebra(const char* name, int n) {
  const System system(n);
  double *m = device_memory<double>(n * n), *b = device_memory<double>(3 * n), *out = device_memory<double>(3 * n);
  int* failed = device_memory<int>(1);
  LPLB_CUDA_CHECK(cudaMemcpy(m, system.m.data(), n * n * sizeof(double), cudaMemcpyHostToDevice));
  LPLB_CUDA_CHECK(cudaMemcpy(b, system.b.data(), 3 * n * sizeof(double), cudaMemcpyHostToDevice));
  const auto kernel = algebra_kernel<Team, Algebra>;
  const size_t shared = sizeof(double) * (Launch<Team>::kBuffer + n * n + 4 * n);
  LPLB_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  const auto run = [&](What what, int repeats) {
    kernel<<<1, Launch<Team>::kThreads, shared>>>(m, b, out, n, repeats, what, failed);
  };
  const auto each = [&](What what) {
    return (microseconds([&] { run(what, 2 * kRepeats); }) - microseconds([&] { run(what, kRepeats); })) / kRepeats;
  };
  const double copy = each(kCopyOnly), two = each(kFactorAndSolve2), three = each(kFactorAndSolve2And1);
  run(kFactorAndSolve2And1, 1);
  std::vector<double> x(3 * n);
  int pivots = 0;
  LPLB_CUDA_CHECK(cudaMemcpy(x.data(), out, 3 * n * sizeof(double), cudaMemcpyDeviceToHost));
  LPLB_CUDA_CHECK(cudaMemcpy(&pivots, failed, sizeof(int), cudaMemcpyDeviceToHost));
  const double residual = system.residual(x);
  const bool good = pivots == 0 && residual < 1e-13;
  all_good = all_good && good;
  std::printf(
      "{\"kind\": \"algebra\", \"name\": \"%s\", \"width\": %d, \"threads\": %d, \"factor_us\": %.4f, "
      "\"solve_us\": %.4f, \"residual\": %.3g, \"good\": %s}\n",
      name, n, Launch<Team>::kThreads, two - copy, three - two, residual, good ? "true" : "false");
  for (void* p : {static_cast<void*>(m), static_cast<void*>(b), static_cast<void*>(out), static_cast<void*>(failed)})
    LPLB_CUDA_CHECK(cudaFree(p));
}

// Latencies

enum class Chain { add, multiply, reciprocal, shuffle, shared_load, barrier, warp_barrier, reduce, match, global_load };

// Cycles of one link of a chain of dependent operations, on thread 0.
template <Chain kChainOf>
__global__ void chain_kernel(double x, int* memory, double* cycles, double* sink) {
  __shared__ int next[kWarpSize];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (threadIdx.x < kWarpSize) next[lane] = (lane + 1) % kWarpSize;
  __syncthreads();
  int at = lane;
  unsigned int bits = lane;
  for (int warm = 0; warm < 2; ++warm) {  // the first time fills the instruction cache
    const long long begin = clock64();
#pragma unroll 32
    for (int i = 0; i < kChain; ++i) {
      if constexpr (kChainOf == Chain::add) x += 1.0;
      if constexpr (kChainOf == Chain::multiply) x *= 1.0000001;
      if constexpr (kChainOf == Chain::reciprocal) x = 1.0 / x;
      if constexpr (kChainOf == Chain::shuffle) x = __shfl_sync(0xFFFFFFFF, x, (lane + 1) % kWarpSize);
      if constexpr (kChainOf == Chain::shared_load) at = *static_cast<volatile int*>(next + at);
      if constexpr (kChainOf == Chain::barrier) __syncthreads();
      if constexpr (kChainOf == Chain::warp_barrier) __syncwarp();
      if constexpr (kChainOf == Chain::reduce) bits = __reduce_max_sync(0xFFFFFFFF, bits) + lane;
      if constexpr (kChainOf == Chain::match) bits = __match_any_sync(0xFFFFFFFF, bits) + lane;
      if constexpr (kChainOf == Chain::global_load) at = __ldcg(memory + at);
    }
    const long long end = clock64();
    if (threadIdx.x == 0) *cycles = static_cast<double>(end - begin) / kChain;
  }
  if (x == 1.5 && at == -1 && bits == 77) *sink = x;  // so that nothing is left out
}

template <Chain kChainOf>
void time_chain(const char* name, int threads, int* memory) {
  double* cycles = device_memory<double>(2);
  chain_kernel<kChainOf><<<1, threads>>>(1.25, memory, cycles, cycles + 1);
  LPLB_CUDA_CHECK(cudaGetLastError());
  double found = 0.0;
  LPLB_CUDA_CHECK(cudaMemcpy(&found, cycles, sizeof found, cudaMemcpyDeviceToHost));
  LPLB_CUDA_CHECK(cudaFree(cycles));
  std::printf("{\"kind\": \"latency\", \"name\": \"%s\", \"cycles\": %.2f}\n", name, found);
}

__global__ void empty_kernel() {}

// Kernels that do nothing, in a graph: what a launch costs when the one before it must end first.
void time_launch() {
  constexpr int kNodes = 100;
  cudaStream_t stream;
  LPLB_CUDA_CHECK(cudaStreamCreate(&stream));
  double micros[2];
  for (int k = 0; k < 2; ++k) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    LPLB_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < kNodes * (k + 1); ++i) empty_kernel<<<1, kWarpSize, 0, stream>>>();
    LPLB_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    LPLB_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    micros[k] = microseconds([&] { LPLB_CUDA_CHECK(cudaGraphLaunch(executable, nullptr)); });
    LPLB_CUDA_CHECK(cudaGraphExecDestroy(executable));
    LPLB_CUDA_CHECK(cudaGraphDestroy(graph));
  }
  LPLB_CUDA_CHECK(cudaStreamDestroy(stream));
  std::printf("{\"kind\": \"launch\", \"name\": \"empty kernel in a graph\", \"us\": %.3f}\n",
              (micros[1] - micros[0]) / kNodes);
}

// A ring through `count` words of memory, so far apart that each is in a line of its own.
int* ring(int count) {
  constexpr int kApart = 1 << 12;
  std::vector<int> next(static_cast<size_t>(count) * kApart, 0);
  for (int i = 0; i < count; ++i)
    for (int lane = 0; lane < kWarpSize; ++lane)
      next[static_cast<size_t>(i) * kApart + lane] = (i + 1) % count * kApart + lane;
  int* memory = device_memory<int>(next.size());
  LPLB_CUDA_CHECK(cudaMemcpy(memory, next.data(), next.size() * sizeof(int), cudaMemcpyHostToDevice));
  return memory;
}

void time_latencies() {
  int* memory = ring(kChain);
  int clock = 0;
  LPLB_CUDA_CHECK(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
  std::printf("{\"kind\": \"clock\", \"name\": \"highest clock\", \"mhz\": %.0f}\n", clock / 1e3);
  time_chain<Chain::add>("float64 add", kWarpSize, memory);
  time_chain<Chain::multiply>("float64 multiply", kWarpSize, memory);
  time_chain<Chain::reciprocal>("float64 1/x", kWarpSize, memory);
  time_chain<Chain::shuffle>("float64 shuffle", kWarpSize, memory);
  time_chain<Chain::shared_load>("shared memory load", kWarpSize, memory);
  time_chain<Chain::warp_barrier>("__syncwarp", kWarpSize, memory);
  time_chain<Chain::barrier>("__syncthreads, 64 threads", 64, memory);
  time_chain<Chain::barrier>("__syncthreads, 128 threads", 128, memory);
  time_chain<Chain::barrier>("__syncthreads, 256 threads", 256, memory);
  time_chain<Chain::reduce>("__reduce_max_sync", kWarpSize, memory);
  time_chain<Chain::match>("__match_any_sync", kWarpSize, memory);
  time_chain<Chain::global_load>("global load, L2", kWarpSize, memory);
  LPLB_CUDA_CHECK(cudaFree(memory));
  time_launch();
}

template <int kMost>
void time_builtin(int n) {
  using Algebra = BuiltinAlgebra<kMost>;
  if (n <= 32) time_algebra<Warp, Algebra>("builtin", n);
  if (n >= 16) time_algebra<Block<64>, Algebra>("builtin", n);
  if (n >= 32) {
    time_algebra<Block<128>, Algebra>("builtin", n);
    time_algebra<Block<256>, Algebra>("builtin", n);
  }
  if (n >= 128) time_algebra<Block<512>, Algebra>("builtin", n);
}

}  // namespace

int main() {
  try {
#ifdef LPLB_HAVE_CUSOLVERDX
#ifdef LPLB_CUSOLVERDX_THREADS_8
    time_algebra<TeamOf<LPLB_CUSOLVERDX_THREADS_8>::type, CuSolverDx8>("cusolverdx", 8);
#endif
#ifdef LPLB_CUSOLVERDX_THREADS_16
    time_algebra<TeamOf<LPLB_CUSOLVERDX_THREADS_16>::type, CuSolverDx16>("cusolverdx", 16);
#endif
#ifdef LPLB_CUSOLVERDX_THREADS_32
    time_algebra<TeamOf<LPLB_CUSOLVERDX_THREADS_32>::type, CuSolverDx32>("cusolverdx", 32);
#endif
#ifdef LPLB_CUSOLVERDX_THREADS_64
    time_algebra<TeamOf<LPLB_CUSOLVERDX_THREADS_64>::type, CuSolverDx64>("cusolverdx", 64);
#endif
#ifdef LPLB_CUSOLVERDX_THREADS_128
    time_algebra<TeamOf<LPLB_CUSOLVERDX_THREADS_128>::type, CuSolverDx128>("cusolverdx", 128);
#endif
#else
    time_latencies();
    time_builtin<16>(8);
    time_builtin<16>(16);
    time_builtin<64>(32);
    time_builtin<64>(64);
    time_builtin<128>(128);
#endif
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return all_good ? 0 : 3;
}
