// One load on one group with a cost on traffic, end to end: solve.h's way, with the interior point of ipm_traffic.h.
#pragma once

#include "ipm_traffic.h"
#include "solve.h"

namespace lplb {
inline namespace LPLB_ISA {

namespace detail {

// Where tokens go costs something, so what rounding down leaves of an expert goes to the replicas that lost most to it.
template <class Team, class AnyGroup>
LPLB_HD inline void place_by_remainder(Team& team, const AnyGroup& g, const Workspace& x, double mean) {
  team.each(g.n_experts, [&](int e) {
    LPLB_LOOP
    for (; x.tokens[e] > 0; --x.tokens[e]) {
      int chosen = g.expert_begin[e];
      double most = -1e300;
      in_order<4>(
          g.expert_begin[e], g.expert_begin[e + 1],
          [&](int p) { return x.y[p] * mean - static_cast<double>(x.quota[p]); },
          [&](int p, double remainder) {
            if (remainder > most) most = remainder, chosen = p;
          });
      ++x.quota[chosen];
    }
  });
  team.sync();
  rounding::add_up_ranks(team, g, x);
}

// To whole tokens at the least level that the fractional split's maximum allows. That level, not the bound, which has
// costs in it: what is moved on the way down to it is about a token per replica, and so is what that costs.
template <int kWords, class Warp, class AnyGroup>
LPLB_HD inline Result finish_with_traffic(Warp& warp, const AnyGroup& g, const Workspace& x, double mean,
                                          const TrafficOutcome& found) {
  const WholeOutcome whole = whole_tokens<kWords>(warp, g, x, found.max_load * mean);
  const IpmOutcome& out = found.ipm;
  double gap = out.bound > 0.0 ? (out.objective - out.bound) / out.bound : 0.0;
  if (!(gap > 0.0)) gap = 0.0;
  Status status = out.status;
  if (gap <= kGapTolerance)
    status = Status::solved;
  else if (status == Status::solved)  // a solver's word is not enough
    status = Status::numerical;
  return {whole.max_load, out.bound * mean, gap, out.iterations, status};
}

}  // namespace detail

// loads: of all source ranks, the sums of traffic's counts. lower_bound and gap of the result are those of
// max_load + traffic_weight · (tokens across nodes + κ · tokens across a node's ranks) / Σ v. `f` is from
// carve_traffic().
template <int kWords, class Team, class Algebra, class AnyGroup>
LPLB_HD inline void solve_group_with_traffic(Team& team, Algebra algebra, const AnyGroup& g, const Workspace& x,
                                             const TrafficSpace& f, const int64_t* loads, const Traffic& traffic,
                                             const GroupPlan& plan, IterationRow* log) {
  const double mean = detail::gather(team, g, x, loads).mean;
  const bool movable = team.maxima(g.n_experts, [&](int e) { return x.w[e]; })[0] > 0.0;
  TrafficOutcome found{{0.0, 0.0, 0, Status::solved}, 0.0};
  if (movable) {
    const double speeds = team.few_sums(g.n_ranks, [&](int r) { return g.speed[r]; })[0];
    traffic::find_bounds(team, g, f, traffic, 1.0 / mean);
    found = interior_point_with_traffic(team, algebra, g, x, f, traffic.weight / speeds, log);
  } else {  // nothing to share out: the busiest rank is a bound by itself
    found.max_load = team.few_maxima(g.n_ranks, [&](int r) { return x.a[r] / g.speed[r]; })[0];
    found.ipm.objective = found.ipm.bound = found.max_load;
    team.each(g.n_replicas, [&](int p) { x.y[p] = 0.0; });
  }
  team.sync();
  rounding::round_down(team, g, x, mean);
  detail::place_by_remainder(team, g, x, mean);
  team.first_warp([&](auto& warp) {
    const Result result = detail::finish_with_traffic<kWords>(warp, g, x, mean, found);
    if (warp.rank() == 0) *plan.result = result;
  });
  detail::write_plan(team, g, x, loads, plan);
}

}  // namespace LPLB_ISA
}  // namespace lplb
