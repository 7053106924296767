// Which ranks set the optimum of one load on one group: the largest set A with load(A) / v(A) = t*, from the flow
// solver.
#pragma once

#include "solve.h"

namespace lplb {
inline namespace LPLB_ISA {

// Empty without tokens. Ranks of sets that fall short of t* by less than 1e-9 of a mean rank load count among them:
// what the flow leaves undecided, some 1e-12 a rank, is well below that.
template <int kWords, class Warp, class AnyGroup>
inline RankSet<kWords> bottleneck_ranks(Warp& warp, const AnyGroup& g, const Workspace& x, const int64_t* loads) {
  constexpr double kTight = 1e-9;
  const detail::Sum sum = detail::gather(warp, g, x, loads);
  if (!(sum.tokens > 0.0)) return RankSet<kWords>::none();
  bottleneck_flow<kWords>(warp, g, x, sum.mean);
  Flow<double, kWords, Warp, AnyGroup> f{warp,   g,       x.y,     x.rank_load,  x.rank_limit, x.reach, x.level,
                                         x.path, x.giver, x.taker, flow::kSlack, {},           {}};
  f.find_reach();
  RankSet<kWords> reached =
      ranks_where<kWords>(warp, g.n_ranks, [&](int r) { return x.rank_load[r] < x.rank_limit[r] - kTight; });
  RankSet<kWords> rest = RankSet<kWords>::first(g.n_ranks).without(reached);
  while (!reached.empty()) {  // tokens of a rank that can go to one with room are not confined
    reached = ranks_within(warp, rest, g.n_ranks, [&](int r) { return !(f.reach_of(r) & reached).empty(); });
    rest = rest.without(reached);
  }
  return rest;
}

}  // namespace LPLB_ISA
}  // namespace lplb
