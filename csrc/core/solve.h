// One load on one group, from tokens per logical expert to whole-token quotas with a certificate.
#pragma once

#include "ipm.h"
#include "rounding.h"
#include "shares.h"

namespace lplb {
inline namespace LPLB_ISA {

// quota [n_physical], rank_load [ep_size]: only the group's own entries are written.
struct GroupPlan {
  int32_t* quota;
  int64_t* rank_load;
  Result* result;
};

namespace detail {

// All tokens, and their mean per unit of speed.
struct Sum {
  double tokens, mean;
};

// Tokens per rank and expert, and both scaled by the mean.
template <class Team, class AnyGroup>
LPLB_HD inline Sum gather(Team& team, const AnyGroup& g, const Workspace& x, const int64_t* loads) {
  team.each(g.n_ranks, [&](int r) {
    int64_t tokens = 0;
    in_order<8, true>(
        g.single_begin[r], g.single_begin[r + 1], [&](int i) { return loads[g.single_logical[i]]; },
        [&](int, int64_t load) { tokens += load; });
    x.single_tokens[r] = tokens;
  });
  team.each(g.n_experts, [&](int e) { x.tokens[e] = loads[g.expert_logical[e]]; });
  team.sync();
  // whole numbers below 2^53: exact in any order
  const auto ranks = team.few_sums(
      g.n_ranks, [&](int r) { return static_cast<double>(x.single_tokens[r]); }, [&](int r) { return g.speed[r]; });
  const auto experts = team.sums(g.n_experts, [&](int e) { return static_cast<double>(x.tokens[e]); });
  const double tokens = ranks[0] + experts[0], mean = tokens / ranks[1];
  const double inv = mean > 0.0 ? 1.0 / mean : 0.0;
  team.each(g.n_ranks, [&](int r) { x.a[r] = static_cast<double>(x.single_tokens[r]) * inv; });
  team.each(g.n_experts, [&](int e) { x.w[e] = static_cast<double>(x.tokens[e]) * inv; });
  team.sync();
  return {tokens, mean};
}

// Every source's tokens by the fixed split. Leaves whole tokens per replica and rank where round_down does.
template <class Team, class AnyGroup>
LPLB_HD inline void split_fixed(Team& team, const AnyGroup& g, const Workspace& x, const Fewest& few) {
  team.each(g.n_experts, [&](int e) {
    const int begin = g.expert_begin[e], n = g.expert_begin[e + 1] - begin;
    const Copies copies{g.expert_logical[e], n, g.replica_slot + begin, nullptr, few.slots_per_rank};
    for (int i = 0; i < n; ++i) x.quota[begin + i] = 0;
    add_fixed_shares(few.from, copies, [&](int i, int64_t tokens) { x.quota[begin + i] += tokens; });
  });
  team.sync();
  rounding::add_up_ranks(team, g, x);
}

// What is known of a fixed split: no rank has less than its single experts' tokens, and the busiest not less than the
// mean.
template <class Warp, class AnyGroup>
LPLB_HD inline Result rate_fixed(Warp& warp, const AnyGroup& g, const Workspace& x, double mean) {
  const double level =
      warp.few_maxima(g.n_ranks, [&](int r) { return static_cast<double>(x.rank_tokens[r]) / g.speed[r]; })[0];
  const double single =
      warp.few_maxima(g.n_ranks, [&](int r) { return static_cast<double>(x.single_tokens[r]) / g.speed[r]; })[0];
  double bound = single > mean ? single : mean;
  if (level < bound) bound = level;  // by rounding alone
  const double gap = bound > 0.0 ? (level - bound) / bound : 0.0;
  return {static_cast<int64_t>(std::ceil(level)), bound, gap, 0, Status::skipped};
}

// What is known before rounding, in scaled loads.
struct Fractional {
  double objective, bound;
  int iterations;
  Status status;
};

template <int kWords, class Warp, class AnyGroup>
LPLB_HD inline Result finish(Warp& warp, const AnyGroup& g, const Workspace& x, double mean, Fractional f) {
  const WholeOutcome whole = whole_tokens<kWords>(warp, g, x, f.bound * mean);
  double bound = f.bound * mean;
  if (whole.bound > bound) bound = whole.bound;
  if (whole.level < bound) bound = whole.level;  // reached, so no bound; above it by rounding alone
  double gap = bound > 0.0 ? (f.objective * mean - bound) / bound : 0.0;
  if (!(gap > 0.0)) gap = 0.0;
  const bool whole_optimum = static_cast<double>(whole.max_load) <= std::ceil(bound * (1.0 - rounding::kBoundNoise));
  if (gap <= kGapTolerance || whole_optimum)
    f.status = Status::solved;
  else if (f.status == Status::solved)  // a solver's word is not enough
    f.status = Status::numerical;
  return {whole.max_load, bound, gap, f.iterations, f.status};
}

// Quotas and rank loads, as the rounding left them, to where the plan wants them.
template <class Team, class AnyGroup>
LPLB_HD inline void write_plan(Team& team, const AnyGroup& g, const Workspace& x, const int64_t* loads,
                               const GroupPlan& plan) {
  team.each(g.n_replicas, [&](int p) { plan.quota[g.replica_slot[p]] = static_cast<int32_t>(x.quota[p]); });
  team.each(g.n_singles,
            [&](int i) { plan.quota[g.single_slot[i]] = static_cast<int32_t>(loads[g.single_logical[i]]); });
  team.each(g.n_ranks, [&](int r) { plan.rank_load[g.first_rank + r] = x.rank_tokens[r]; });
  team.sync();
}

}  // namespace detail

// A solver that is known when the code is compiled; then the other's is left out.
template <Solver kSolver>
struct OnlySolver {
  LPLB_HD constexpr operator Solver() const { return kSolver; }
};

namespace detail {

template <class AnySolver, Solver kSolver>
inline constexpr bool kMayBe = true;
template <Solver kOne, Solver kSolver>
inline constexpr bool kMayBe<OnlySolver<kOne>, kSolver> = kOne == kSolver;

}  // namespace detail

// kWords: of the group's rank sets, see set_words(). solver: a Solver, or OnlySolver<…>. matrix_is_free() is called by
// all members, between barriers, when the matrix's memory is no longer needed and before the rank sets of `g` are.
template <int kWords, class Team, class Algebra, class AnyGroup, class AnySolver, class F>
LPLB_HD inline void solve_group(Team& team, Algebra algebra, const AnyGroup& g, const Workspace& x,
                                const int64_t* loads, const Fewest& few, AnySolver solver, const GroupPlan& plan,
                                IterationRow* log, F matrix_is_free) {
  const detail::Sum sum = detail::gather(team, g, x, loads);
  const bool skipped = sum.tokens < static_cast<double>(few.least);
  const bool movable = !skipped && team.maxima(g.n_experts, [&](int e) { return x.w[e]; })[0] > 0.0;
  // Nothing to share out: the busiest rank is a bound by itself.
  detail::Fractional found{0.0, 0.0, 0, Status::solved};
  if (!movable) {
    found.objective = found.bound = team.few_maxima(g.n_ranks, [&](int r) { return x.a[r] / g.speed[r]; })[0];
    team.each(g.n_replicas, [&](int p) { x.y[p] = 0.0; });
  } else if (solver == Solver::ipm) {
    if constexpr (detail::kMayBe<AnySolver, Solver::ipm>) {
      const IpmOutcome out = interior_point(team, algebra, g, x, log);
      found = {out.objective, out.bound, out.iterations, out.status};
    }
  }
  team.sync();
  matrix_is_free();
  team.sync();
  if constexpr (detail::kMayBe<AnySolver, Solver::flow>) {
    if (movable && solver == Solver::flow)
      team.first_warp([&](auto& warp) {
        const FlowOutcome out = bottleneck_flow<kWords>(warp, g, x, sum.mean);
        found = {out.objective, out.bound, out.cuts, Status::solved};
      });
  }
  if (skipped)
    detail::split_fixed(team, g, x, few);
  else
    rounding::round_down(team, g, x, sum.mean);
  team.first_warp([&](auto& warp) {
    const Result result =
        skipped ? detail::rate_fixed(warp, g, x, sum.mean) : detail::finish<kWords>(warp, g, x, sum.mean, found);
    if (warp.rank() == 0) *plan.result = result;
  });
  detail::write_plan(team, g, x, loads, plan);
}

}  // namespace LPLB_ISA
}  // namespace lplb
