// One load on one group, from tokens per logical expert to whole-token quotas with a certificate.
#pragma once

#include "ipm.h"
#include "rounding.h"

namespace lplb {
inline namespace LPLB_ISA {

// quota [n_physical], rank_load [ep_size]: only the group's own entries are written.
struct GroupPlan {
  int32_t* quota;
  int64_t* rank_load;
  Result* result;
};

namespace detail {

// Tokens per rank and expert, and both scaled by the mean, which is returned (tokens per unit of speed).
template <class Team>
LPLB_HD inline double gather(Team& team, const Group& g, const Workspace& x, const int64_t* loads) {
  team.each(g.n_ranks, [&](int r) {
    int64_t tokens = 0;
    for (int i = g.single_begin[r]; i < g.single_begin[r + 1]; ++i) tokens += loads[g.single_logical[i]];
    x.single_tokens[r] = tokens;
  });
  team.each(g.n_experts, [&](int e) { x.tokens[e] = loads[g.expert_logical[e]]; });
  team.sync();
  // whole numbers below 2^53: exact in any order
  const double total = team.sum(g.n_ranks, [&](int r) { return static_cast<double>(x.single_tokens[r]); }) +
                       team.sum(g.n_experts, [&](int e) { return static_cast<double>(x.tokens[e]); });
  const double mean = total / team.sum(g.n_ranks, [&](int r) { return g.speed[r]; });
  const double inv = mean > 0.0 ? 1.0 / mean : 0.0;
  team.each(g.n_ranks, [&](int r) { x.a[r] = static_cast<double>(x.single_tokens[r]) * inv; });
  team.each(g.n_experts, [&](int e) { x.w[e] = static_cast<double>(x.tokens[e]) * inv; });
  team.sync();
  return mean;
}

template <int kWords>
LPLB_HD inline Result finish(const Group& g, const Workspace& x, double mean, double objective, double bound,
                             int iterations, Status status) {
  const WholeOutcome whole = whole_tokens<kWords>(g, x, mean, bound * mean);
  bound *= mean;
  if (whole.bound > bound) bound = whole.bound;
  if (whole.level < bound) bound = whole.level;  // reached, so no bound; above it by rounding alone
  double gap = bound > 0.0 ? (objective * mean - bound) / bound : 0.0;
  if (!(gap > 0.0)) gap = 0.0;
  const bool whole_optimum = static_cast<double>(whole.max_load) <= std::ceil(bound * (1.0 - rounding::kBoundNoise));
  if (gap <= kGapTolerance || whole_optimum)
    status = Status::solved;
  else if (status == Status::solved)  // a solver's word is not enough
    status = Status::numerical;
  return {whole.max_load, bound, gap, iterations, status};
}

template <int kWords, class Team>
LPLB_HD inline void solve_group(Team& team, const Group& g, const Workspace& x, const int64_t* loads, Solver solver,
                                const GroupPlan& plan, IterationRow* log) {
  const double mean = gather(team, g, x, loads);
  const bool movable = team.max(g.n_experts, [&](int e) { return x.w[e]; }) > 0.0;
  // Nothing to share out: the busiest rank is a bound by itself.
  IpmOutcome out{0.0, 0.0, 0, Status::solved};
  if (!movable) {
    out.objective = out.bound = team.max(g.n_ranks, [&](int r) { return x.a[r] / g.speed[r]; });
    team.each(g.n_replicas, [&](int p) { x.y[p] = 0.0; });
  } else if (solver == Solver::ipm) {
    out = interior_point(team, g, x, log);
  }
  team.sync();
  if (team.rank() == 0) {
    if (movable && solver == Solver::flow) {
      const FlowOutcome f = bottleneck_flow<kWords>(g, x, mean);
      out = {f.objective, f.bound, f.cuts, Status::solved};
    }
    *plan.result = finish<kWords>(g, x, mean, out.objective, out.bound, out.iterations, out.status);
  }
  team.sync();
  team.each(g.n_replicas, [&](int p) { plan.quota[g.replica_slot[p]] = static_cast<int32_t>(x.quota[p]); });
  team.each(g.n_singles,
            [&](int i) { plan.quota[g.single_slot[i]] = static_cast<int32_t>(loads[g.single_logical[i]]); });
  team.each(g.n_ranks, [&](int r) { plan.rank_load[g.first_rank + r] = x.rank_tokens[r]; });
  team.sync();
}

}  // namespace detail

template <class Team>
LPLB_HD inline void solve_group(Team& team, const Group& g, const Workspace& x, const int64_t* loads, Solver solver,
                                const GroupPlan& plan, IterationRow* log = nullptr) {
  if (g.n_ranks <= 64)
    detail::solve_group<1>(team, g, x, loads, solver, plan, log);
  else
    detail::solve_group<2>(team, g, x, loads, solver, plan, log);
}

}  // namespace LPLB_ISA
}  // namespace lplb
