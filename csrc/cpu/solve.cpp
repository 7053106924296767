// Compiled once per instruction set: CMakeLists.txt sets LPLB_ISA and the flags.
#include "solve.h"

#include "../core/optimum.h"
#include "../core/solve_traffic.h"

namespace lplb {
inline namespace LPLB_ISA {

void solve_on_one_thread(const Group& g, const Workspace& x, const int64_t* loads, const Fewest& few, Solver solver,
                         int32_t* quota, int64_t* rank_load, Result* result, IterationRow* log) {
  Solo team;
  const GroupPlan plan{quota, rank_load, result};
  const auto nothing = [] {};
  if (set_words(g.n_ranks) == 1)
    solve_group<1>(team, BuiltinAlgebra<kMaxGroup>{}, g, x, loads, few, solver, plan, log, nothing);
  else
    solve_group<2>(team, BuiltinAlgebra<kMaxGroup>{}, g, x, loads, few, solver, plan, log, nothing);
}

void solve_with_traffic(const Group& g, const Workspace& x, const TrafficSpace& f, const int64_t* loads,
                        const Traffic& traffic, int32_t* quota, int64_t* rank_load, Result* result, IterationRow* log) {
  Solo team;
  const GroupPlan plan{quota, rank_load, result};
  if (set_words(g.n_ranks) == 1)
    solve_group_with_traffic<1>(team, BuiltinAlgebra<kMaxGroup>{}, g, x, f, loads, traffic, plan, log);
  else
    solve_group_with_traffic<2>(team, BuiltinAlgebra<kMaxGroup>{}, g, x, f, loads, traffic, plan, log);
}

double optimum_on_one_thread(const Group& g, const Workspace& x, const int64_t* loads) {
  Solo team;
  return set_words(g.n_ranks) == 1 ? optimum<1>(team, g, x, loads) : optimum<2>(team, g, x, loads);
}

double bottleneck_on_one_thread(const Group& g, const Workspace& x, double mean, const WarmStart& start) {
  return set_words(g.n_ranks) == 1 ? warm_bottleneck<1>(g, x, mean, start) : warm_bottleneck<2>(g, x, mean, start);
}

}  // namespace LPLB_ISA
}  // namespace lplb
