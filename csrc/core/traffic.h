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
  Sources from;   // of all groups
  double weight;  // of the cost: weight · (tokens across nodes + κ · tokens across a node's ranks) / Σ v
};

// Where one solve works beside its Workspace. A node of an expert, the replicas that it has on one node, goes by the
// number of the first of them; the entries of the others are empty.
struct TrafficSpace {
  int32_t *node_begin, *node_end;                // [n_replicas] the node of each replica; of nodes: behind their last
  double *bound, *x, *k, *z, *w, *dx, *dz, *dw;  // [2, n_replicas] bounded parts: of replicas, then of nodes
  double *inv_n, *e, *f;                         // [2, n_replicas] 1/N, 0 where b is; second-order terms
  double *y, *pair_z, *pair_dz, *h, *extra;      // [pairs] as in a Workspace: replicas, ranks, then nodes
  double* replica_h;                             // [n_replicas] h before nodes are eliminated
  double *inv_node, *excess;                     // [n_replicas] of nodes: 1/(S + H), T - G
};

inline namespace LPLB_ISA {

template <class AnyGroup>
LPLB_HD inline int n_traffic_pairs(const AnyGroup& g) {
  return 2 * g.n_replicas + g.n_ranks;
}

// Like carve() of problem.h.
template <class AnyGroup>
LPLB_HD inline size_t carve_traffic(const AnyGroup& g, std::byte* base, TrafficSpace& f) {
  const size_t n = g.n_replicas, pairs = n_traffic_pairs(g);
  size_t used = 0;
  auto take = [&](auto*& pointer, size_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    if (base != nullptr) pointer = reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
  };
  take(f.bound, 2 * n);
  take(f.x, 2 * n);
  take(f.k, 2 * n);
  take(f.z, 2 * n);
  take(f.w, 2 * n);
  take(f.dx, 2 * n);
  take(f.dz, 2 * n);
  take(f.dw, 2 * n);
  take(f.inv_n, 2 * n);
  take(f.e, 2 * n);
  take(f.f, 2 * n);
  take(f.y, pairs);
  take(f.pair_z, pairs);
  take(f.pair_dz, pairs);
  take(f.h, pairs);
  take(f.extra, pairs);
  take(f.replica_h, n);
  take(f.inv_node, n);
  take(f.excess, n);
  take(f.node_begin, n);
  take(f.node_end, n);
  return used;
}

}  // namespace LPLB_ISA
}  // namespace lplb
