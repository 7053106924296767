// Compiled once per instruction set: CMakeLists.txt sets LPLB_ISA and the flags.
#include "../core/solve.h"

#include "solve.h"

namespace lplb {
inline namespace LPLB_ISA {

void solve_on_one_thread(const Group& g, const Workspace& x, const int64_t* loads, Solver solver, int32_t* quota,
                         int64_t* rank_load, Result* result, IterationRow* log) {
  Solo team;
  solve_group(team, g, x, loads, solver, GroupPlan{quota, rank_load, result}, log);
}

}  // namespace LPLB_ISA
}  // namespace lplb
