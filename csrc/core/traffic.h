// What a plan with a cost on traffic is made from beside its loads, and the memory of its solve. ipm_traffic.h has the
// mathematics.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace lplb {

// κ, a token that crosses ranks within a node against one that crosses nodes, as their links are fast: an H100 or H200
// SXM has 450 GB/s of NVLink each way (NVIDIA's data sheets: 900 GB/s in both) and, in NVIDIA's DGX, one ConnectX-7 of
// 400 Gb/s, which is 50 GB/s. A power of two, so that scaling by it is exact.
inline constexpr double kNodeCost = 1.0 / 8.0;

// Whose tokens a plan is for, and what their way costs.
struct Traffic {
  const int32_t* counts;  // [n_ranks, stride] tokens of every source rank, of all groups, by logical expert
  int64_t stride;
  int n_ranks, ranks_per_node;  // nodes are ranks in a row; the last may have fewer
  double weight;                // of the cost: weight · (tokens across nodes + κ · tokens across a node's ranks) / Σ v
};

// The bounded parts, [2, n_replicas] each: own parts, then node parts.
struct Parts {
  double *bound, *x, *k, *z, *w, *dx, *dz, *dw;
  double *inv_n, *e, *f;        // 1/N, 0 where b is; second-order terms
  double *pair_h, *pair_extra;  // [pairs] of far parts and ranks; a Workspace has the replicas' h_p and T_p
};

// Like carve() of problem.h.
template <class AnyGroup>
LPLB_HD inline size_t carve_parts(const AnyGroup& g, std::byte* base, Parts& f) {
  const size_t parts = 2 * static_cast<size_t>(g.n_replicas), pairs = static_cast<size_t>(g.n_replicas) + g.n_ranks;
  size_t used = 0;
  auto take = [&](double*& pointer, size_t count) {
    if (base != nullptr) pointer = reinterpret_cast<double*>(base + used);
    used += (count * sizeof(double) + 63) / 64 * 64;
  };
  take(f.bound, parts);
  take(f.x, parts);
  take(f.k, parts);
  take(f.z, parts);
  take(f.w, parts);
  take(f.dx, parts);
  take(f.dz, parts);
  take(f.dw, parts);
  take(f.inv_n, parts);
  take(f.e, parts);
  take(f.f, parts);
  take(f.pair_h, pairs);
  take(f.pair_extra, pairs);
  return used;
}

}  // namespace lplb
