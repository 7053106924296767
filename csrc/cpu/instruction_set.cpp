#include <cstdlib>
#include <cstring>

#include "solve.h"

#define LPLB_DECLARE(isa)                                                                                             \
  namespace lplb::isa {                                                                                               \
  void solve_on_one_thread(const Group&, const Workspace&, const int64_t*, const Fewest&, Solver, int32_t*, int64_t*, \
                           Result*, IterationRow*);                                                                   \
  void solve_with_traffic(const Group&, const Workspace&, const TrafficSpace&, const int64_t*, const Traffic&,        \
                          int32_t*, int64_t*, Result*, IterationRow*);                                                \
  double optimum_on_one_thread(const Group&, const Workspace&, const int64_t*);                                       \
  double bottleneck_on_one_thread(const Group&, const Workspace&, double, const WarmStart&);                          \
  }
LPLB_DECLARE(portable)
#ifdef LPLB_HAVE_AVX2
LPLB_DECLARE(avx2)
#endif

namespace lplb::cpu {

InstructionSet best_instruction_set() {
#ifdef LPLB_HAVE_AVX2
  const char* wanted = std::getenv("LPLB_ISA");  // "portable" keeps to the baseline: for tests and bug reports
  if (__builtin_cpu_supports("avx2") && !(wanted != nullptr && std::strcmp(wanted, "portable") == 0))
    return {"avx2", avx2::solve_on_one_thread, avx2::solve_with_traffic, avx2::optimum_on_one_thread,
            avx2::bottleneck_on_one_thread};
#endif
  return {"portable", portable::solve_on_one_thread, portable::solve_with_traffic, portable::optimum_on_one_thread,
          portable::bottleneck_on_one_thread};
}

}  // namespace lplb::cpu
