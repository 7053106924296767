// The minimum-bottleneck flow of flow.h where most of the answer is known: a bound on t* from a set of ranks that was
// tight before, and a split that was right for other loads, or for a placement not far from this one. t* is the same to
// the last bit, as it is the load of a set of ranks over its size, and these are found exactly. One thread.
#pragma once

#include "flow.h"

namespace lplb {

struct WarmStart {
  double least;   // of t*, not above it; 0 where nothing is known
  uint64_t* cut;  // [words] out: the ranks that are above the mean and `least` together, none where nothing is
};

inline namespace LPLB_ISA {

// x.y has a split to begin with; of an expert for which there is none its first replica is negative. Leaves the optimal
// split there, and its rank loads; all in units of mean, as bottleneck_flow().
template <int kWords, class AnyGroup>
inline double warm_bottleneck(const AnyGroup& g, const Workspace& x, double mean, const WarmStart& start) {
  using Set = RankSet<kWords>;
  Solo team;
  Flow<double, kWords, Solo, AnyGroup> f{team,   g,       x.y,     x.rank_load,  x.rank_limit, x.reach, x.level,
                                         x.path, x.giver, x.taker, flow::kSlack, {},           {}};
  double t = start.least > 1.0 ? start.least : 1.0;
  Set cut = Set::none();
  for (int r = 0; r < g.n_ranks; ++r)
    if (x.a[r] > t) {
      t = x.a[r];
      cut = Set::none();
      cut.add(r);
    }
  for (int r = 0; r < g.n_ranks; ++r) f.load[r] = x.a[r], f.limit[r] = t;
  for (int i = 0; i < g.n_experts; ++i) {
    const int begin = g.expert_begin[i], end = g.expert_begin[i + 1];
    if (f.y[begin] < 0.0) continue;
    for (int p = begin; p < end; ++p) f.load[g.replica_rank[p]] += f.y[p];
  }
  for (int i = 0; i < g.n_experts; ++i)
    if (f.y[g.expert_begin[i]] < 0.0) flow::fill(g, i, x.w[i], f.limit, f.y, f.load);
  f.find_reach();
  for (Set set;;) {
    f.classify();
    if (f.relieve(set)) break;
    const double size = flow::speed_of(team, g, set);
    const double next = static_cast<double>(flow::tokens_of(team, g, x, set)) / (size * mean);
    if (!(next > t)) break;  // what is left is rounding: `set` is tight at this t
    t = next;
    cut = set;
    for (int r = 0; r < g.n_ranks; ++r) f.limit[r] = t;
  }
  cut.write(start.cut);
  return t;
}

}  // namespace LPLB_ISA
}  // namespace lplb
