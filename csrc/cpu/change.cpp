#include "change.h"

#include "solve.h"

namespace lplb::cpu {

ChangePath find_changes(const ChangeTask& task) {
  const FindBottleneck solve = best_instruction_set().find_bottleneck;
  return ChangeSearch<FindBottleneck>(task, solve).run();
}

}  // namespace lplb::cpu
