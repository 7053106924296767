// One placement after another of the same experts on the same ranks, on the same batches: each solve begins with what
// the one before left.
#pragma once

#include "draft.h"

namespace lplb {
inline namespace LPLB_ISA {

template <class Solve>
class Rating {
 public:
  // The task's placement is the first, its batches those that all are rated on.
  Rating(const ChangeTask& task, Solve solve) : draft_(task, task.batches, solve) {
    std::vector<int> rows(task.batches);
    for (int b = 0; b < task.batches; ++b) rows[b] = b;
    draft_.look_at(task, rows);
  }

  // The imbalance of a placement [n_physical], group-closed as the first: [batches].
  void rate(const int32_t* phy2log, double* imbalance) {
    draft_.become(phy2log);
    draft_.solve_and_keep(imbalance);
  }

 private:
  Draft<Solve> draft_;
};

}  // namespace LPLB_ISA
}  // namespace lplb
