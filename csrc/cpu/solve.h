// csrc/core's solve for one thread, compiled once per instruction set.
#pragma once

#include "../core/traffic.h"
#include "../core/warm.h"

namespace lplb::cpu {

// quota [n_physical], rank_load [ep_size]: only the group's own entries are written.
using SolveGroup = void (*)(const Group& g, const Workspace& x, const int64_t* loads, const Fewest& few, Solver solver,
                            int32_t* quota, int64_t* rank_load, Result* result, IterationRow* log);

// The same with a cost on traffic; loads are the sums of its counts.
using SolveGroupWithTraffic = void (*)(const Group& g, const Workspace& x, const TrafficSpace& f, const int64_t* loads,
                                       const Traffic& traffic, int32_t* quota, int64_t* rank_load, Result* result,
                                       IterationRow* log);

// t* of one load, in tokens per unit of speed; core/optimum.h.
using FindOptimum = double (*)(const Group& g, const Workspace& x, const int64_t* loads);

// The same for tokens that the workspace was given already, as warm.h's warm_bottleneck() wants them: t* in units of
// `mean`.
using FindBottleneck = double (*)(const Group& g, const Workspace& x, double mean, const WarmStart& start);

// The best this processor can run, and its name.
struct InstructionSet {
  const char* name;
  SolveGroup solve_group;
  SolveGroupWithTraffic solve_group_with_traffic;
  FindOptimum find_optimum;
  FindBottleneck find_bottleneck;
};
InstructionSet best_instruction_set();

}  // namespace lplb::cpu
